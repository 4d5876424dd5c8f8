"""HTML page of a quantization report: arranges the figures and draws the charts for ``quantization.html.j2``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omniport.export.evaluation import html, plots
from rich.filesize import decimal

from .compare import BundleLoss, GraphLoss, LossReport, RangePlot
from .layer_loss import LayerLoss
from .recorded_calls import EQUAL_DB, Loss

#: layers listed for a graph, and ranges drawn
_WORST, _DRAWN = 8, 12
_RATE = 24000
#: scales are rounded to the graph's precision, and may be a step apart
_SAME = 0.01
_NONE = "-"
_COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#4a5568")
_CLIP_COLOURS = {"max": "#4a5568", "percentile": "#2f855a", "entropy": "#6b46c1", "mse": "#c05621"}
_SMALLEST_DB, _LARGEST_DB = -10.0, 80.0


def render(report: LossReport, waves: Mapping[str, NDArray[np.float32]]) -> str:
    """The page.

    Args:
        waves: the same codes as each bundle says them, float32 [n] at 24 kHz.
    """
    missing = [("all", report.missing), *((bundle.name, bundle.missing) for bundle in report.bundles)]
    return html.render(
        __package__,
        "quantization.html.j2",
        {"decibels": _decibels, "layer": _layer_name, "percent": _percent, "size": decimal, "times": _times},
        report=report,
        graph=_graph,
        loss=_loss,
        layers=list(_layers(report)),
        ranges=_ranges(report),
        measured=[bundle for bundle in report.bundles if bundle.sound is not None],
        sounds={name: plots.sound_uri(wave, _RATE) for name, wave in waves.items()},
        spectrograms=plots.spectrograms(waves, _RATE) if waves else "",
        missing=[(bundle, what, why) for bundle, found in missing for what, why in found.items()],
        environment={**report.environment, "checkpoint": report.fingerprint},
    )


def _graph(bundle: BundleLoss, name: str) -> GraphLoss | None:
    return next((row for row in bundle.graphs if row.graph == name), None)


def _loss(bundle: BundleLoss, graph: str) -> Loss | None:
    row = _graph(bundle, graph)
    return None if row is None else row.loss


def _layers(report: LossReport) -> Iterator[tuple[str, dict[str, str], list[tuple[str, LayerLoss]]]]:
    """(graph, chart by axis, its worst layers with their bundles); no chart where nothing was measured."""
    for graph in (row.graph for row in report.bundles[0].graphs):
        found = {b.name: row.layers for b in report.bundles if (row := _graph(b, graph)) is not None and row.layers}
        if found:
            charts = {
                "weight SQNR, dB": {name: {layer.weight: layer.weight_db for layer in f} for name, f in found.items()},
                "output SQNR, dB": {name: {layer.weight: layer.output_db for layer in f} for name, f in found.items()},
            }
            worst = [(name, layer) for name, layers in found.items() for layer in _worst(layers)]
            yield graph, {axis: _by_layer(values, axis) for axis, values in charts.items()}, worst


def _worst(layers: Sequence[LayerLoss]) -> list[LayerLoss]:
    return sorted(layers, key=lambda layer: np.inf if layer.output_db is None else layer.output_db)[:_WORST]


def _by_layer(values: Mapping[str, Mapping[str, float | None]], axis: str) -> str:
    """SQNR of every layer, a line for each bundle; "" if there is no value at all.

    None leaves a gap, and values beyond -10 to 80 dB lie on the edge.

    Args:
        values: bundle -> weight -> dB.
    """
    weights = list(dict.fromkeys(weight for layers in values.values() for weight in layers))
    if all(value is None for layers in values.values() for value in layers.values()):
        return ""
    chart = plots.figure(8.4, 2.6)
    axes = chart.add_subplot()
    for number, (bundle, layers) in enumerate(values.items()):
        found = np.array([layers.get(weight) for weight in weights], np.float64)  # None becomes NaN
        colour = _COLOURS[number % len(_COLOURS)]
        shown = found.clip(_SMALLEST_DB, _LARGEST_DB)
        axes.plot(shown, "o-", color=colour, markersize=2.5, linewidth=1.0, label=bundle)
    points = range(0, len(weights), max(1, -(-len(weights) // 12)))  # as many labels as fit
    axes.set_xticks(points, [_layer_name(weights[point]) for point in points], rotation=30, ha="right")
    axes.legend(fontsize=8, frameon=False, loc="best")
    plots.plain(axes, "", axis)
    axes.tick_params(axis="x", labelsize=6.5)
    return plots.svg(chart)


def _ranges(report: LossReport) -> dict[str, Any] | None:
    """The histograms whose largest value stands out most, and how many layers use a range that is not among theirs."""
    if not report.ranges:
        return None
    clips = {(plot.graph, plot.site): plot.clips for plot in report.ranges}
    chosen = _chosen(report, clips)
    drawn = sorted(report.ranges, key=_tail, reverse=True)[:_DRAWN]
    return {
        "picture": _histograms(drawn, chosen),
        "drawn": len(drawn),
        "chosen": bool(chosen),
        "smoothed": sum(key in clips and key not in chosen for key in _input_ranges(report)),
    }


def _input_ranges(report: LossReport) -> dict[tuple[str, str], float]:
    """(graph, weight) -> largest magnitude kept of its input, of the layers whose input is quantized."""
    found: dict[tuple[str, str], float] = {}
    for row in (row for bundle in report.bundles for row in bundle.graphs):
        for layer in row.layers:
            if layer.input_range is not None:
                found.setdefault((row.graph, layer.weight), layer.input_range)
    return found


def _chosen(report: LossReport, clips: Mapping[tuple[str, str], Mapping[str, float]]) -> dict[tuple[str, str], str]:
    """(graph, weight) -> name of the range that is used for its input, where it is one that calibration offers."""
    named = {}
    for key, used in _input_ranges(report).items():
        near = [name for name, value in clips.get(key, {}).items() if abs(used - value) <= _SAME * value]
        if near:
            named[key] = near[0]
    return named


def _tail(plot: RangePlot) -> float:
    """The largest magnitude over the smallest of the ranges."""
    return plot.top / max(min(plot.clips.values()), 1e-30)


def _histograms(ranges: Sequence[RangePlot], chosen: Mapping[tuple[str, str], str]) -> str:
    """Histograms of |x| before layers on a logarithmic axis; a line for each range, thick for the one in use."""
    rows = -(-len(ranges) // 3)
    chart = plots.figure(8.4, 1.5 * rows + 0.3)
    grid = chart.subplots(rows, 3, squeeze=False).ravel()
    for axes, plot in zip(grid, ranges, strict=False):
        edges = np.linspace(0, plot.top, len(plot.counts) + 1)
        axes.stairs(np.maximum(plot.counts, 0.5), edges, fill=True, color="#a0c4e8")
        for name, value in plot.clips.items():
            thick = chosen.get((plot.graph, plot.site)) == name
            axes.axvline(value, color=_CLIP_COLOURS.get(name, "#4a5568"), linewidth=2.2 if thick else 0.8, label=name)
        axes.set_yscale("log")
        axes.set_title(f"{plot.graph}/{_layer_name(plot.site)[-34:]}", fontsize=6.5)
        plots.plain(axes, "", "")
        axes.tick_params(labelsize=6.5)
    for axes in grid[len(ranges) :]:
        axes.set_visible(False)
    grid[0].legend(fontsize=6, frameon=False)
    return plots.svg(chart)


def _layer_name(weight: str) -> str:
    return weight.removesuffix(".weight").replace("model.layers.", "")


def _decibels(value: float | None) -> str:
    return _NONE if value is None else "exact" if value >= EQUAL_DB else f"{value:.1f}"


def _percent(share: float | None) -> str:
    return _NONE if share is None else f"{share:.0%}"


def _times(value: float, of: float) -> str:
    """How many times ``of``; nothing if one of them was not measured."""
    return f"{value / of:.2f}" if value and of else _NONE
