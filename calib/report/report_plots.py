"""Pictures of the quantization report, as SVG in data URIs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from omniport.export.evaluation.plots import figure, plain, svg

from .compare import RangePlot

_COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#4a5568")
_CLIPS = {"max": "#4a5568", "percentile": "#2f855a", "entropy": "#6b46c1", "mse": "#c05621"}
_SMALLEST_DB, _LARGEST_DB = -10.0, 80.0


def by_layer(labels: Sequence[str], series: Mapping[str, Sequence[float | None]], axis: str) -> str:
    """SQNR of every layer, a line for each bundle; None leaves a gap, values beyond -10 to 80 dB lie on the edge.

    Args:
        labels: of the layers; as many are written as fit.
        series: bundle -> a value for each layer.
    """
    chart = figure(8.4, 2.6)
    axes = chart.add_subplot()
    points = np.arange(len(labels))
    for colour, (name, values) in zip(_cycled(len(series)), series.items(), strict=True):
        shown = [np.nan if v is None else float(np.clip(v, _SMALLEST_DB, _LARGEST_DB)) for v in values]
        axes.plot(points, shown, "o-", color=colour, markersize=2.5, linewidth=1.0, label=name)
    every = max(1, -(-len(labels) // 12))
    axes.set_xticks(points[::every], [labels[i] for i in points[::every]], rotation=30, ha="right")
    axes.legend(fontsize=8, frameon=False, loc="best")
    plain(axes, "", axis)
    axes.tick_params(axis="x", labelsize=6.5)
    return svg(chart)


def ranges(plots: Sequence[RangePlot], chosen: Mapping[tuple[str, str], str]) -> str:
    """Histograms of |x| before layers on a logarithmic axis, with the ranges that calibration offers.

    Args:
        chosen: (graph, site) -> name of the range that a bundle uses: a thick line; others are thin.
    """
    rows = -(-len(plots) // 3)
    chart = figure(8.4, 1.5 * rows + 0.3)
    grid = chart.subplots(rows, 3, squeeze=False).ravel()
    for axes, plot in zip(grid, plots, strict=False):
        edges = np.linspace(0, plot.top, len(plot.counts) + 1)
        axes.stairs(np.maximum(plot.counts, 0.5), edges, fill=True, color="#a0c4e8")
        for name, value in plot.clips.items():
            thick = chosen.get((plot.graph, plot.site)) == name
            axes.axvline(value, color=_CLIPS.get(name, "#4a5568"), linewidth=2.2 if thick else 0.8, label=name)
        axes.set_yscale("log")
        axes.set_title(f"{plot.graph}/{_short(plot.site)}", fontsize=6.5)
        plain(axes, "", "")
        axes.tick_params(labelsize=6.5)
    for axes in grid[len(plots) :]:
        axes.set_visible(False)
    if len(plots):
        grid[0].legend(fontsize=6, frameon=False)
    return svg(chart)


def _cycled(count: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]


def _short(site: str) -> str:
    return site.removesuffix(".weight").replace("model.layers.", "")[-34:]
