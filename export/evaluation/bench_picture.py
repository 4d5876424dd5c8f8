"""Pictures of a benchmark: the roofline, latency by context length, and when the first sound comes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from omniport.runtime.bench.results import BenchReport, Figure, StageResult, measured_parts
from omniport.runtime.errors import UsageError

from . import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OURS, _THEIRS, _LINE = "#2f6f9f", "#c8803c", "#777777"


def draw(report: BenchReport, path: Path) -> None:
    """Write the picture; what was not measured is left out.

    Args:
        path: its suffix names the format, .svg or .png.

    Raises:
        UsageError: nothing was measured that is drawn, or the file cannot be written.
    """
    panels = [panel for panel, drawn in _PANELS if drawn(report)]
    if not panels:
        raise UsageError(
            f"nothing to draw: {', '.join(report.stages) or 'no stage'} has no picture; measure more stages"
        )
    picture = plots.figure(4.2 * len(panels), 3.4)
    for axes, panel in zip(picture.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(axes, report)
    plots.write(picture, path)


def _measured(report: BenchReport) -> list[tuple[str, StageResult, Figure]]:
    """Figures that have a place under a roof: those whose work is known."""
    return [
        (name, stage, figure)
        for name, stage in report.stages.items()
        for figure in stage.figures
        if figure.work is not None and figure.work.operations
    ]


def _roofline(axes: Axes, report: BenchReport) -> None:
    """Operations a second over operations a byte, under the rates of the first stage."""
    found = _measured(report)
    machine = found[0][1].machine
    low, high = 0.1, 1e4
    ridge = machine.matmul_rate / machine.read_bandwidth
    roof = [low * machine.read_bandwidth / 1e9, machine.matmul_rate / 1e9, machine.matmul_rate / 1e9]
    axes.plot([low, ridge, high], roof, color=_LINE, linewidth=1)
    for name, _, figure in found:
        assert figure.work is not None
        x, operations = figure.work.operations / figure.work.bytes, figure.work.operations / 1e9
        axes.plot(x, operations / figure.seconds.median, "o", color=_OURS, markersize=4)
        if figure.reference is not None:
            axes.plot(x, operations / figure.reference.median, "x", color=_THEIRS, markersize=4)
        if figure is report.stages[name].figures[-1]:
            axes.annotate(
                name, (x, operations / figure.seconds.median), (3, -9), textcoords="offset points", fontsize=6
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    plots.plain(axes, "operations a byte of weights and cache", "GFLOP/s")
    axes.set_title(f"roofline (o omniport{', x ' + report.against if report.against else ''})", fontsize=9)


def _latency(axes: Axes, report: BenchReport) -> None:
    """Milliseconds a token over the context's length."""
    for name, style in (("decode", "-"), ("talker", "--")):
        figures = report.stages[name].figures if name in report.stages else ()
        sizes = [figure.size for figure in figures]
        label = measured_parts()[name].name
        axes.plot(sizes, [1e3 * f.seconds.median for f in figures], "o" + style, color=_OURS, markersize=3, label=label)
        if figures and all(f.reference is not None for f in figures):
            times = [1e3 * f.reference.median for f in figures if f.reference is not None]
            axes.plot(sizes, times, "x" + style, color=_THEIRS, markersize=4, label=f"{label}, {report.against}")
    axes.set_ylim(bottom=0)
    plots.plain(axes, "tokens in context", "ms a token")
    axes.legend(fontsize=7, frameon=False)
    axes.set_title("decoding", fontsize=9)


def _timeline(axes: Axes, report: BenchReport) -> None:
    """Seconds of sound that are there, over seconds since the question's end."""
    stage = report.stages["reply"]
    times, sound = [0.0], [0.0]
    for ready, lasts in stage.chunks:
        times += [ready, ready]
        sound += [sound[-1], sound[-1] + lasts]
    axes.plot(times, sound, color=_OURS, label="omniport")
    axes.annotate(
        f"first sound {stage.chunks[0][0]:.1f} s",
        (stage.chunks[0][0], 0),
        (4, 4),
        textcoords="offset points",
        fontsize=7,
    )
    total = report.figure("reply", "total").reference
    if total is not None:
        axes.plot([0, total.median, total.median], [0, 0, sound[-1]], color=_THEIRS, label=report.against)
    plots.plain(axes, "seconds since the question", "seconds of speech")
    axes.legend(fontsize=7, frameon=False)
    axes.set_title("spoken reply", fontsize=9)


_PANELS: tuple[tuple[Callable[[Axes, BenchReport], None], Callable[[BenchReport], bool]], ...] = (
    (_roofline, lambda report: bool(_measured(report))),
    (_latency, lambda report: "decode" in report.stages or "talker" in report.stages),
    (_timeline, lambda report: "reply" in report.stages and bool(report.stages["reply"].chunks)),
)
