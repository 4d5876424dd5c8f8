"""HTML page of a validation report: arranges the checks and draws the pictures for ``validation.html.j2``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..evaluation import html, plots
from ..evaluation.metrics import figure_text
from .summary import at_least, limited_figures, stage_rows
from .types import FAIL, Check, ValidationReport

#: the figure that "error by case" and "error by layer" draw
ERROR_FIGURE = "rel_rms"
_AXIS = "relative RMS error"
_SPEECH = ("reference", "whole", "streamed")
_REPLY = "reply"  # the spoken reply that a speech recogniser transcribed
_RATE = 24000
_LAYER = re.compile(r"layer (\d+),")


def render(report: ValidationReport, artifacts: Mapping[str, NDArray[Any]]) -> str:
    """The page.

    Args:
        artifacts: arrays by the names that ``Check.artifacts`` holds. Roles ``reference``, ``whole`` and ``streamed``
            are waveforms float32 [n] at 24 kHz, and so is ``reply``.
    """
    return html.render(
        __package__,
        "validation.html.j2",
        report=report,
        rows=stage_rows(report),
        layers=dict(_by_layer(report)),
        cases=dict(_by_case(report)),
        speech=list(_speech(report, artifacts)),
        replies=[check for check in report.checks if check.stage == "end_to_end" and "equal" in check.figures],
        limits=_limits(report),
        environment={**report.environment, "checkpoint": report.fingerprint},
        sign=_sign,
        figures=lambda check: list(_figures(check)),
        beyond=_beyond,
    )


def _by_layer(report: ValidationReport) -> Iterator[tuple[str, str]]:
    """(stage, picture) of the stages that were traced layer by layer."""
    for stage, checks in _grouped(check for check in report.checks if _layer(check) is not None).items():
        points = [_layer(check) or 0 for check in checks]
        bounds = [check.limits.get(ERROR_FIGURE, np.nan) for check in checks]
        yield stage, plots.layers(stage, points, [_error(check) for check in checks], bounds, _AXIS)


def _by_case(report: ValidationReport) -> Iterator[tuple[str, str]]:
    """(stage, picture) of all other checks that have the error figure."""
    measured = (check for check in report.checks if ERROR_FIGURE in check.limits and _layer(check) is None)
    for stage, checks in _grouped(measured).items():
        bounds = [check.limits[ERROR_FIGURE] for check in checks]
        yield stage, plots.bars([_short(c.name) for c in checks], [_error(c) for c in checks], bounds, _AXIS)


def _speech(
    report: ValidationReport, artifacts: Mapping[str, NDArray[Any]]
) -> Iterator[tuple[Check, str, dict[str, str]]]:
    """(check, spectrograms, players by role) of each check that kept enough sound to compare by ear."""
    for check in report.checks:
        found = ((role, artifacts.get(check.artifacts.get(role, ""))) for role in (*_SPEECH, _REPLY))
        sounds = {role: np.asarray(a, np.float32) for role, a in found if a is not None and a.ndim == 1 and a.size}
        complete = sounds.keys() >= set(_SPEECH) or _REPLY in sounds
        if complete or (len(sounds) > 1 and (check.status == FAIL or check.stage == "end_to_end")):
            players = {role: plots.sound_uri(samples, _RATE) for role, samples in sounds.items()}
            yield check, plots.spectrograms(sounds, _RATE), players


def _figures(check: Check) -> Iterator[str]:
    """The figures of a check, without those that say only that nothing is wrong and without long texts."""
    for key, value in check.figures.items():
        if key in check.limits:
            yield _with_limit(check, key)
        elif value is not True and not key.endswith("saturation") and not (isinstance(value, str) and len(value) > 40):
            yield f"{key} {figure_text(value)}"


def _beyond(check: Check) -> list[str]:
    """The figures beyond their limits; all of them if the check failed for another reason."""
    found = [limited.figure for limited in limited_figures(check) if limited.used > 1]
    return [_with_limit(check, figure) for figure in found or check.limits]


def _with_limit(check: Check, figure: str) -> str:
    limit = f"{_sign(figure)} {figure_text(check.limits[figure])}"
    return f"{figure} {figure_text(check.figures.get(figure))} (allowed {limit})"


def _sign(figure: str) -> str:
    return "≥" if at_least(figure) else "≤"


def _limits(report: ValidationReport) -> list[tuple[tuple[str, str, float], set[str]]]:
    """((figure, reason, limit), stages), sorted."""
    known: dict[tuple[str, str, float], set[str]] = {}
    for check in report.checks:
        for figure, bound in check.limits.items():
            known.setdefault((figure, check.reasons.get(figure, ""), bound), set()).add(check.stage)
    return sorted(known.items())


def _grouped(checks: Iterable[Check]) -> dict[str, list[Check]]:
    found: dict[str, list[Check]] = {}
    for check in checks:
        found.setdefault(check.stage, []).append(check)
    return found


def _layer(check: Check) -> int | None:
    """Which layer's hidden state a check of the layer trace compares."""
    match = _LAYER.match(check.name)
    return None if match is None else int(match[1])


def _error(check: Check) -> float:
    value = check.figures.get(ERROR_FIGURE)
    return float(value) if isinstance(value, int | float) else float("inf")


def _short(name: str) -> str:
    """A name that fits next to a bar."""
    return name if len(name) <= 48 else f"{name[:30]}...{name[-15:]}"
