"""Summarise a validation report: a row per stage, and the figures closest to their limits.

`omniport.export.validation.report_page` draws the HTML page from the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
from omniport.runtime.bundle.parts import PARTS

from ..evaluation.metrics import figure_text
from .tolerances import LIMITS
from .types import FAIL, NOT_RUN, PASS, Check, ValidationReport

#: figures whose limit is the smallest value that passes
_AT_LEAST = frozenset(what.rpartition(".")[2] for (what, _), limit in LIMITS.items() if limit.at_least)


@dataclass(frozen=True)
class Worst:
    """A figure with its limit. ``used``: share of the limit that the figure reaches; above 1 it fails."""

    figure: str
    value: float
    limit: float
    used: float
    check: str

    @property
    def text(self) -> str:
        """``rel_rms 2.1e-06 <= 0.0001``"""
        sign = ">=" if at_least(self.figure) else "<="
        return f"{self.figure} {figure_text(self.value)} {sign} {figure_text(self.limit)}"


@dataclass(frozen=True)
class StageRow:
    """One stage of the summary."""

    stage: str
    status: str
    checks: int
    failed: int
    not_run: int
    worst: Worst | None
    emulated: bool


def at_least(figure: str) -> bool:
    """Whether a figure's limit is the smallest value that passes."""
    return figure.rpartition(".")[2] in _AT_LEAST


def stage_rows(report: ValidationReport) -> list[StageRow]:
    """The summary: a row for each stage that has checks."""
    shown = ("preprocess", "positions", *PARTS, "conditioning", "solver", "end_to_end", "speech")
    known = [*shown, *sorted({check.stage for check in report.checks} - set(shown))]
    return [row for stage in known if (row := _row(report, stage)) is not None]


def _row(report: ValidationReport, stage: str) -> StageRow | None:
    checks = [check for check in report.checks if check.stage == stage]
    if not checks:
        return None
    failed = sum(check.status == FAIL for check in checks)
    not_run = sum(check.status == NOT_RUN for check in checks)
    status = FAIL if failed else NOT_RUN if not_run == len(checks) else PASS
    worst = (figure for check in checks for figure in limited_figures(check))
    return StageRow(
        stage=stage,
        status=status,
        checks=len(checks),
        failed=failed,
        not_run=not_run,
        worst=max(worst, key=lambda figure: figure.used, default=None),
        emulated=stage in report.emulated,
    )


def limited_figures(check: Check) -> Iterator[Worst]:
    """The figures of a check that have limits."""
    for figure, bound in check.limits.items():
        value = check.figures.get(figure)
        if value is None or isinstance(value, str):
            value = math.inf  # JSON has no infinity: it comes back as null
        yield Worst(figure, float(value), bound, _used(figure, float(value), bound), check.name)


def _used(figure: str, value: float, bound: float) -> float:
    if not math.isfinite(value):
        return math.inf
    if at_least(figure):
        # a level in dB may be negative: the distance below the bound counts
        return bound / value if value > 0 and bound > 0 else 1.0 + max(0.0, bound - value)
    if bound > 0:
        return value / bound
    return 0.0 if value <= bound else 1.0 + value - bound


def failures(report: ValidationReport) -> Iterator[Check]:
    """Checks that failed, in the order in which they ran."""
    return (check for check in report.checks if check.status == FAIL)


def encode(report: ValidationReport) -> bytes:
    """The report as JSON, as docs/validate.md describes it. Infinity and NaN are null."""
    return msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n"
