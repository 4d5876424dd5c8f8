"""The quantization report as one HTML page, of the same family as that of `omniport validate`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape

import numpy as np
from numpy.typing import NDArray
from omniport.export.evaluation import plots
from omniport.export.evaluation.html import cell, image, page, table
from omniport.export.validation.summary import figure_text

from . import report_plots
from .compare import BundleLoss, GraphLoss, LossReport, RangePlot

#: layers listed for a graph, and ranges drawn
_WORST, _DRAWN = 8, 12
_RATE = 24000
#: scales are rounded to the graph's precision, and may be a step apart
_SAME = 0.01
_NONE = "-"
_SOUND_HEAD = ("#mel dB", "#wave mel L1", "#MCD dB")


def render(report: LossReport, waves: Mapping[str, NDArray[np.float32]]) -> str:
    """The page.

    Args:
        waves: the same codes as each bundle says them, float32 [n] at 24 kHz.
    """
    sections = [
        _head(report),
        _recipes(report),
        _graphs(report),
        _layers(report),
        _ranges(report),
        _sounds(report, waves),
        _missing(report),
        _environment(report),
    ]
    return page(f"Quantization of {report.base}", "\n".join(section for section in sections if section))


def _head(report: LossReport) -> str:
    steps = ", ".join(f"{name} {count}" for name, count in report.steps.items())
    return (
        f"<h1>Quantization of {escape(report.base)}</h1>\n<p>Made from {escape(report.source)}. Each bundle was run on "
        f"the calls that the unquantized one made while it answered {len(report.conversations)} conversations "
        f"({escape(', '.join(report.conversations))}): every step is judged on the same past, every graph on the same "
        f"input. ONNX Runtime on the CPU. Calls: {escape(steps)}.</p>"
    )


def _recipes(report: LossReport) -> str:
    base = report.bundles[0]
    lost = ("bundle", "recipe", "#thinker dB", "#KL", "#text same", "#talker dB", "#codes same", *_SOUND_HEAD)
    cost = ("bundle", "#size", "#of", "#decode ms", "#times as fast", "#prefill ms", "#times as fast")
    note = (
        '<p class="quiet">Signal to quantization noise of logits and of the mel; share of steps with the same most '
        "likely token under teacher forcing; distance of the waveforms' mel spectra in nepers, and mel-cepstral "
        "distortion, of the same codes. Decode and prefill are the thinker's fastest step of one token and its longest "
        "call.</p>"
    )
    tables = table(lost, map(_lost, report.bundles)), table(cost, (_cost(b, base) for b in report.bundles))
    return f"<h2>Recipe against recipe</h2>\n{note}\n{tables[0]}\n<h3>Size and speed</h3>\n{tables[1]}"


def _lost(bundle: BundleLoss) -> list[str]:
    numbers = [*_decoder(_graph(bundle, "thinker"), kl=True), *_decoder(_graph(bundle, "talker"))]
    if bundle.sound is None:
        numbers += [_NONE] * 3
    else:
        mel, *distances = (bundle.sound.mel_sqnr_db, bundle.sound.mel_l1, bundle.sound.mcd_db)
        numbers += [_decibels(mel), *map(figure_text, distances)]
    return [cell(bundle.name, "name"), cell(bundle.recipe, "name"), *(cell(text, "number") for text in numbers)]


def _cost(bundle: BundleLoss, base: BundleLoss) -> list[str]:
    numbers = [_size(bundle.bytes), f"{bundle.bytes / base.bytes:.2f}"]
    thinker, first = _graph(bundle, "thinker"), _graph(base, "thinker")
    if thinker is None or first is None or not thinker.step_ms or not thinker.prefill_ms:
        numbers += [_NONE] * 4
    else:
        numbers += [f"{thinker.step_ms:.2f}", f"{first.step_ms / thinker.step_ms:.2f}"]
        numbers += [f"{thinker.prefill_ms:.1f}", f"{first.prefill_ms / thinker.prefill_ms:.2f}"]
    return [cell(bundle.name, "name"), *(cell(text, "number") for text in numbers)]


def _decoder(row: GraphLoss | None, kl: bool = False) -> list[str]:
    if row is None or row.loss is None:
        return [_NONE] * (3 if kl else 2)
    loss = row.loss
    parts = [_decibels(loss.sqnr_db), *([figure_text(loss.kl)] if kl else [])]
    return [*parts, _NONE if loss.agreement is None else f"{loss.agreement:.0%}"]


def _graphs(report: LossReport) -> str:
    rows = []
    for graph in (row.graph for row in report.bundles[0].graphs):
        first = _graph(report.bundles[0], graph)
        for bundle in report.bundles:
            row = _graph(bundle, graph)
            if row is None or first is None:
                rows.append([cell(graph, "name"), cell(bundle.name, "name"), cell("the bundle has no such graph")])
                continue
            loss = _NONE if row.loss is None else _decibels(row.loss.sqnr_db)
            faster = f"{first.step_ms / row.step_ms:.2f}" if row.step_ms and first.step_ms else _NONE
            numbers = (_size(row.bytes), f"{row.bytes / first.bytes:.2f}", loss, f"{row.step_ms:.1f}", faster)
            names = (cell(graph, "name"), cell(bundle.name, "name"), cell(row.precision, "name"))
            rows.append([*names, *(cell(text, "number") for text in numbers)])
    head = ("graph", "bundle", "weights", "#size", "#of", "#output dB", "#fastest call ms", "#times")
    return "<h2>Each graph by itself</h2>\n" + table(head, rows)


def _layers(report: LossReport) -> str:
    parts = []
    for graph in (row.graph for row in report.bundles[0].graphs):
        found = {b.name: row for b in report.bundles if (row := _graph(b, graph)) is not None and row.layers}
        if found:
            parts.append(_layers_of(graph, found))
    return "<h2>Layer by layer</h2>\n" + "\n".join(parts) if parts else ""


def _layers_of(graph: str, found: Mapping[str, GraphLoss]) -> str:
    names = list(dict.fromkeys(layer.weight for row in found.values() for layer in row.layers))
    labels = [_layer_name(name) for name in names]
    pictures = []
    for field, axis in (("weight_db", "weight SQNR, dB"), ("output_db", "output SQNR, dB")):
        series = {}
        for bundle, row in found.items():
            values: dict[str, float | None] = {layer.weight: getattr(layer, field) for layer in row.layers}
            series[bundle] = [values.get(name) for name in names]
        if any(value is not None for values in series.values() for value in values):
            pictures.append(image(report_plots.by_layer(labels, series, axis), f"{axis} by layer of {graph}"))
        else:
            pictures.append(f'<p class="quiet">{escape(axis)}: not measured, no recorded call reached the graph.</p>')
    rows = [row for bundle, graph_row in found.items() for row in _worst(bundle, graph_row)]
    head = ("bundle", "layer", "stored", "#weight dB", "#output dB")
    listed = table(head, rows)
    return f"<h3>{escape(graph)}</h3>\n{''.join(pictures)}\n<p class='quiet'>The worst outputs.</p>{listed}"


def _worst(bundle: str, row: GraphLoss) -> Iterable[list[str]]:
    ranked = sorted(row.layers, key=lambda layer: np.inf if layer.output_db is None else layer.output_db)
    for layer in ranked[:_WORST]:
        texts = (_decibels(layer.weight_db), _decibels(layer.output_db))
        names = (cell(bundle, "name"), cell(_layer_name(layer.weight)), cell(layer.scheme, "name"))
        yield [*names, *(cell(text, "number") for text in texts)]


def _ranges(report: LossReport) -> str:
    if not report.ranges:
        return ""
    chosen, drawable = _chosen(report), {(plot.graph, plot.site) for plot in report.ranges}
    other = sum(key in drawable and key not in chosen for key, _ in _rounded(report))
    drawn = sorted(report.ranges, key=_tail, reverse=True)[:_DRAWN]
    note = (
        f'<p class="quiet">Magnitudes of what layers read, as calibration saw them, of the {len(drawn)} of '
        f"{len(report.ranges)} whose largest value stands out most; upright lines are the ranges that calibration "
        f"offers. {'Thick: the one that is used' if chosen else 'No bundle uses one of them'}. Smoothed inputs have "
        "other ranges, which are chosen after smoothing: "
        f"{other} layers' here.</p>"
    )
    return f"<h2>Ranges</h2>\n{note}\n{image(report_plots.ranges(drawn, chosen), 'histograms of ranges')}"


def _rounded(report: LossReport) -> Iterable[tuple[tuple[str, str], float]]:
    """((graph, weight), largest magnitude kept of its input) of the layers whose input is rounded."""
    found: dict[tuple[str, str], float] = {}
    for row in (row for bundle in report.bundles for row in bundle.graphs):
        for layer in row.layers:
            if layer.input_range is not None:
                found.setdefault((row.graph, layer.weight), layer.input_range)
    return found.items()


def _chosen(report: LossReport) -> dict[tuple[str, str], str]:
    """(graph, weight) -> name of the range that is used for its input, where it is one that calibration offers."""
    clips = {(plot.graph, plot.site): plot.clips for plot in report.ranges}
    named = {}
    for key, used in _rounded(report):
        near = [name for name, value in clips.get(key, {}).items() if abs(used - value) <= _SAME * value]
        if near:
            named[key] = near[0]
    return named


def _tail(plot: RangePlot) -> float:
    """The largest magnitude over the least of the ranges."""
    return plot.top / max(min(plot.clips.values()), 1e-30)


def _sounds(report: LossReport, waves: Mapping[str, NDArray[np.float32]]) -> str:
    if not waves:
        return ""
    named = list(waves.items())
    players = "".join(
        f'<div>{escape(name)}<br><audio controls src="{plots.sound_uri(wave, _RATE)}"></audio></div>'
        for name, wave in named
    )
    sounds = {bundle.name: bundle.sound for bundle in report.bundles if bundle.sound is not None}
    rows = [
        [
            cell(name, "name"),
            *(cell(_decibels(value), "number") for value in (sound.mel_sqnr_db, sound.wave_sqnr_db)),
            *(cell(figure_text(value), "number") for value in (sound.mel_l1, sound.mcd_db)),
        ]
        for name, sound in sounds.items()
    ]
    head = ("bundle", "#mel SQNR dB", "#waveform SQNR dB", "#mel L1", "#MCD dB")
    picture = image(plots.spectrograms(named, _RATE), "spectrograms of the bundles")
    seconds = next(iter(sounds.values())).seconds
    return (
        f'<div class="block"><h2>Sound</h2>\n<p class="quiet">The codes of one reply, {seconds:.2f} s, from the same '
        f"noise. Phases differ before anything is heard: the waveform's SQNR is strict.</p>\n{table(head, rows)}\n"
        f'{picture}\n<div class="players">{players}</div></div>'
    )


def _missing(report: LossReport) -> str:
    rows = [["all", what, why] for what, why in report.missing.items()]
    rows += [[bundle.name, what, why] for bundle in report.bundles for what, why in bundle.missing.items()]
    if not rows:
        return ""
    cells = ([cell(name, "name"), cell(what, "name"), cell(why)] for name, what, why in rows)
    return "<h2>What was not measured</h2>\n" + table(("bundle", "what", "why"), cells)


def _environment(report: LossReport) -> str:
    rows = [[cell(name, "name"), cell(value)] for name, value in report.environment.items()]
    rows.append([cell("checkpoint", "name"), cell(report.fingerprint)])
    return "<h2>Environment</h2>\n" + table(("what", "value"), rows)


def _graph(bundle: BundleLoss, name: str) -> GraphLoss | None:
    return next((row for row in bundle.graphs if row.graph == name), None)


def _layer_name(weight: str) -> str:
    return weight.removesuffix(".weight").replace("model.layers.", "")


def _decibels(value: float | None) -> str:
    return _NONE if value is None else "exact" if value >= 300 else f"{value:.1f}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
