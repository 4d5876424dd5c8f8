"""The report as one HTML page: no script, no network, readable on paper."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..evaluation import plots
from ..evaluation.html import cell, code, image, mark, page, short, status, table
from .summary import at_least, figure_text, stage_rows
from .types import FAIL, NOT_RUN, Check, ValidationReport

#: the figure that "error by case" and "error by layer" draw
ERROR_FIGURE = "rel_rms"
_SOUNDS = ("reference", "whole", "streamed")
_REPLY = "reply"  # the spoken reply that a recogniser heard
_RATE = 24000
_TEXTS = ("text", "heard")
_LAYER = re.compile(r"layer (\d+),")


def render(report: ValidationReport, artifacts: Mapping[str, NDArray[Any]]) -> str:
    """The page.

    Args:
        artifacts: arrays by the names that ``Check.artifacts`` holds. Roles ``reference``, ``whole`` and ``streamed``
            are waveforms float32 [n] at 24 kHz, and so is ``reply``.
    """
    sections = [
        _head(report),
        _summary(report),
        _failures(report),
        _by_layer(report),
        _by_case(report),
        _sounds(report, artifacts),
        _alignments(report),
        _all_checks(report),
        _limits(report),
        _surroundings(report),
    ]
    body = "\n".join(section for section in sections if section)
    return page(f"Validation of {report.bundle}", body)


def _head(report: ValidationReport) -> str:
    ran = sum(check.status != NOT_RUN for check in report.checks)
    failed = sum(check.status == FAIL for check in report.checks)
    if failed:
        verdict, kind = f"{failed} of {ran} checks fail: this bundle does not match its checkpoint.", "fail"
    elif not ran:
        verdict, kind = "Nothing ran: this report proves nothing.", "fail"
    else:
        verdict, kind = f"All {ran} checks hold.", "pass"
    left = len(report.checks) - ran
    if left and ran:
        verdict += f" {left} did not run, see below."
    emulated = f" Emulated: {escape(', '.join(report.emulated))}." if report.emulated else ""
    return (
        f"<h1>{escape(report.bundle)}</h1>\n<p>Compared with {escape(report.checkpoint)} in transformers, float32. "
        f"Backend <b>{escape(report.backend)}</b>, precision <b>{escape(report.precision)}</b>, suite "
        f"{escape(report.suite)}; {report.seconds:.0f} s, peak memory {report.peak_memory_bytes / 1e9:.2f} GB."
        f"{emulated}</p>\n"
        f'<p class="verdict {kind}">{verdict}</p>'
    )


def _summary(report: ValidationReport) -> str:
    rows = []
    for row in stage_rows(report):
        worst = row.worst
        rows.append(
            (
                cell(row.stage + (" (emulated)" if row.emulated else ""), "name"),
                status(row.status),
                cell(row.checks, "number"),
                cell(row.failed or "", "number"),
                cell(row.not_run or "", "number"),
                cell(worst.text if worst else "", "name"),
                cell(worst.check if worst else ""),
            )
        )
    head = ("graph or stage", "", "#checks", "#failed", "#not run", "closest to its limit", "in")
    return "<h2>Summary</h2>\n" + table(head, rows)


def _failures(report: ValidationReport) -> str:
    parts = []
    for wanted, title in ((FAIL, "What fails"), (NOT_RUN, "What did not run")):
        checks = [check for check in report.checks if check.status == wanted]
        if checks:
            rows = [(cell(c.stage, "name"), cell(c.name), cell(c.message or _beyond(c))) for c in checks]
            parts.append(f"<h2>{title}</h2>\n" + table(("stage", "check", "why"), rows))
    return "\n".join(parts)


def _beyond(check: Check) -> str:
    pairs = (_figure_line(check, figure) for figure in check.limits)
    return "; ".join(pairs)


def _figure_line(check: Check, figure: str) -> str:
    sign = "≥" if at_least(figure) else "≤"
    return f"{figure} {figure_text(check.figures.get(figure))} (allowed {sign} {figure_text(check.limits[figure])})"


def _by_layer(report: ValidationReport) -> str:
    parts = []
    for stage, checks in _grouped(check for check in report.checks if _layer(check) is not None).items():
        points = [_layer(check) or 0 for check in checks]
        bounds = [check.limits.get(ERROR_FIGURE, np.nan) for check in checks]
        picture = plots.layers(stage, points, [_error(check) for check in checks], bounds, _axis())
        parts.append(f"<h3>{escape(stage)}</h3>\n{image(picture, f'error by layer of {stage}')}")
    if not parts:
        parts = ['<p class="quiet">Not measured in this run: --trace thinker and --trace talker do.</p>']
    return "<h2>Error by layer</h2>\n" + "\n".join(parts)


def _by_case(report: ValidationReport) -> str:
    parts = []
    measured = (c for c in report.checks if ERROR_FIGURE in c.limits and _layer(c) is None)
    for stage, checks in _grouped(measured).items():
        names = [check.name for check in checks]
        bounds = [check.limits[ERROR_FIGURE] for check in checks]
        picture = plots.bars(short(names), [_error(check) for check in checks], bounds, _axis())
        alternative = f"error by case of {stage}"
        parts.append(f'<div class="block"><h3>{escape(stage)}</h3>\n{image(picture, alternative)}</div>')
    note = '<p class="quiet">Relative root mean square of the difference; the grey mark is the limit.</p>\n'
    return "<h2>Error by case</h2>\n" + note + "\n".join(parts) if parts else ""


def _sounds(report: ValidationReport, artifacts: Mapping[str, NDArray[Any]]) -> str:
    """Spectrograms side by side and players, a row for each check that kept sound."""
    parts = []
    for check in report.checks:
        found = ((role, artifacts.get(check.artifacts.get(role, ""))) for role in (*_SOUNDS, _REPLY))
        named = [(role, np.asarray(a, np.float32)) for role, a in found if a is not None and a.ndim == 1 and a.size]
        roles = {role for role, _ in named}
        whole_row = roles >= set(_SOUNDS) or _REPLY in roles
        if not whole_row and not (len(named) > 1 and (check.status == FAIL or check.stage == "end_to_end")):
            continue
        players = "".join(
            f'<div>{role}<br><audio controls src="{plots.sound_uri(samples, _RATE)}"></audio></div>'
            for role, samples in named
        )
        picture = image(plots.spectrograms(named, _RATE), f"spectrograms of {check.name}")
        words = "".join(f"<p>{key}: {escape(str(check.figures[key]))}</p>" for key in _TEXTS if key in check.figures)
        parts.append(
            f'<div class="block"><h3>{escape(check.name)} {mark(check.status)}</h3>\n{picture}\n'
            f'<div class="players">{players}</div>{words}</div>'
        )
    return "<h2>Speech</h2>\n" + "\n".join(parts) if parts else ""


def _alignments(report: ValidationReport) -> str:
    """How far each reply is the reference's, and the tokens of both around the first difference."""
    replies = [check for check in report.checks if check.stage == "end_to_end" and "equal" in check.figures]
    rows = [
        (
            cell(check.name),
            status(check.status),
            cell(figure_text(check.figures.get("count")), "number"),
            cell(figure_text(check.figures["equal"]), "number"),
            cell(figure_text(check.figures.get("choice_gap")), "number"),
        )
        for check in replies
    ]
    parts = []
    for check in replies:
        lines = [
            f"{key}:\n  {text}" for key, text in check.figures.items() if isinstance(text, str) and "tokens" in key
        ]
        if lines:
            heading = f"{escape(check.name)}: around the first difference {mark(check.status)}"
            parts.append(f'<div class="block"><h3>{heading}</h3><pre>{escape(chr(10).join(lines))}</pre></div>')
    if not rows:
        return ""
    head = ("greedy reply", "", "#tokens", "#equal from the start", "#gap at the first difference")
    return "<h2>Tokens of the replies</h2>\n" + table(head, rows) + "\n" + "\n".join(parts)


def _all_checks(report: ValidationReport) -> str:
    rows = []
    for check in report.checks:
        figures = "; ".join(
            _figure_line(check, key) if key in check.limits else f"{key} {figure_text(value)}"
            for key, value in check.figures.items()
            if value is not True  # as expected
            and not key.endswith("saturation")  # a check fails if it is not near 0
            and not (isinstance(value, str) and len(value) > 40)
        )
        rows.append((cell(check.stage, "name"), cell(check.name, "case"), status(check.status), cell(figures)))
    return "<h2>Every check</h2>\n" + table(("stage", "check", "", "figures"), rows)


def _limits(report: ValidationReport) -> str:
    known: dict[tuple[str, str, float], set[str]] = {}
    for check in report.checks:
        for figure, bound in check.limits.items():
            known.setdefault((figure, check.reasons.get(figure, ""), bound), set()).add(check.stage)
    rows = [
        (
            cell(figure, "name"),
            cell(f"{'≥' if at_least(figure) else '≤'} {figure_text(bound)}", "name"),
            cell(", ".join(sorted(stages))),
            cell(reason),
        )
        for (figure, reason, bound), stages in sorted(known.items())
    ]
    return "<h2>Limits and why</h2>\n" + table(("figure", "limit", "stages", "reason"), rows) if rows else ""


def _surroundings(report: ValidationReport) -> str:
    rows: list[tuple[str, ...]] = [(cell(name, "name"), cell(value)) for name, value in report.environment.items()]
    rows.append((cell("checkpoint", "name"), code(report.fingerprint)))
    hashes = [(cell(name, "name"), code(value)) for name, value in report.hashes.items()]
    tables = {"Environment": table(("what", "value"), rows), "Files": table(("file", "sha256"), hashes)}
    return "\n".join(f'<div class="block"><h2>{title}</h2>\n{body}</div>' for title, body in tables.items())


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


def _axis() -> str:
    return "relative RMS error"
