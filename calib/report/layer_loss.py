"""Measure loss by layer: of stored weights, and of layer outputs by running both graphs.

Both graphs run on a recorded call as copies that also output the results of their matrix products. The loss of a
layer's output includes that of the layers before it: it shows where the loss grows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from msgspec.structs import replace
from numpy.typing import NDArray
from omniport.export.evaluation.half_emulation import load_copy, open_graph
from omniport.export.evaluation.stored_weights import StoredGraph, unscaled
from omniport.runtime.backends.onnxruntime.backend import OrtGraph
from omniport.runtime.bundle.graph_spec import TensorSpec
from omniport.runtime.bundle.parts import PARTS
from omniport.runtime.bundle.reader import Bundle

from ..weights.qdq import rounded_output
from .recorded_calls import EQUAL_DB, Calls

Array = NDArray[Any]
#: largest value of each integer and FP8 type
_LARGEST = {onnx.TensorProto.INT8: 127.0, onnx.TensorProto.FLOAT8E4M3FN: 448.0}


@dataclass(frozen=True)
class LayerLoss:
    """One quantized layer.

    Attributes:
        weight: name of its weight.
        scheme: how that is stored.
        weight_db: SQNR of the weight alone; None where it is not stored as DequantizeLinear takes it.
        output_db: SQNR of the layer's output on a recorded call; None where no call reached it.
        input_range: the largest magnitude that is kept of what the weight multiplies; None where that is not rounded.
    """

    weight: str
    scheme: str
    weight_db: float | None
    output_db: float | None
    input_range: float | None = None


def layer_losses(base: Bundle, quantized: Bundle, name: str, calls: Calls | None, threads: int) -> list[LayerLoss]:
    """Every quantized layer of a graph, in its order. One weight is in memory at a time.

    Args:
        base: the bundle that was quantized.
        name: of the graph.
        calls: recorded calls; the first is run. None: there were none.
    """
    record = quantized.manifest.quantization
    layers = {} if record is None else record.layers.get(name, {})
    schemes = {weight: scheme for weight, scheme in layers.items() if scheme != "none"}
    if not schemes:
        return []
    before, after = _File(base, name), _File(quantized, name)
    smoothed = record is not None and bool(record.calibration)
    weights = {weight: _weight_db(before, after, weight, smoothed) for weight in schemes}
    products, outputs = before.outputs(schemes), dict[str, float]()
    if calls is not None:
        pairs = {weight: (output, after.given(output)) for weight, output in products.items()}
        outputs = _output_db(base, quantized, name, pairs, calls, threads, smoothed)
    return [
        LayerLoss(weight, scheme, weights[weight], outputs.get(weight), after.input_range(products.get(weight, "")))
        for weight, scheme in schemes.items()
    ]


def sqnr_db(got: Array, wanted: Array) -> float:
    """Energy of ``wanted`` over energy of the difference, in dB; at most 300, which means equal."""
    signal = float(np.square(wanted, dtype=np.float64).sum())
    noise = float(np.square(got.astype(np.float64) - wanted).sum())
    if noise == 0:
        return EQUAL_DB
    return float(np.clip(10 * np.log10(signal / noise), -EQUAL_DB, EQUAL_DB)) if signal > 0 else -EQUAL_DB


class _File(StoredGraph):
    """A graph's ONNX file: which values belong to which weight."""

    def __init__(self, bundle: Bundle, name: str) -> None:
        super().__init__(bundle, name)
        self._makers = {output: node for node in self.graph.node for output in node.output}

    def outputs(self, weights: Iterable[str]) -> dict[str, str]:
        """Weight -> output of the node that multiplies it."""
        wanted = set(weights)
        pairs = ((node.input[1], node.output[0]) for node in self.graph.node if len(node.input) > 1)
        return {weight: output for weight, output in pairs if weight in wanted}

    def given(self, output: str) -> str:
        """The value that readers of a node's output get: the output, or its rounded form."""
        maker = self._makers.get(output)
        rounded = "" if maker is None else rounded_output(maker.name)
        return rounded if rounded in self._makers else output

    def input_range(self, output: str) -> float | None:
        """Largest magnitude that is kept of the first input of the node that makes ``output``."""
        widened = self._maker(self._makers.get(output))
        rounded = self._maker(widened)
        if widened is None or rounded is None or rounded.op_type != "QuantizeLinear" or len(rounded.input) < 3:
            return None
        kind = self.tensors[rounded.input[2]].data_type
        return float(self.array(rounded.input[1])) * _LARGEST[kind] if kind in _LARGEST else None

    def _maker(self, node: onnx.NodeProto | None) -> onnx.NodeProto | None:
        """The node that makes a node's first input."""
        return None if node is None else self._makers.get(node.input[0])


def _weight_db(before: _File, after: _File, weight: str, smoothed: bool) -> float | None:
    got = after.dequantized(weight)
    if got is None or weight not in before.tensors:
        return None
    wanted = before.array(weight).astype(np.float32)
    return sqnr_db(unscaled(got, wanted) if smoothed and got.ndim == 2 else got, wanted)


def _output_db(
    base: Bundle,
    quantized: Bundle,
    name: str,
    outputs: Mapping[str, tuple[str, str]],
    calls: Calls,
    threads: int,
    smoothed: bool,
) -> dict[str, float]:
    """``outputs``: weight -> output of its product before and after quantizing."""
    feeds = calls.feeds[0]
    wanted = _run(base, name, [out for out, _ in outputs.values()], feeds, threads)
    got = _run(quantized, name, [out for _, out in outputs.values()], feeds, threads)
    found = {}
    for weight, (out, made) in outputs.items():
        if out in wanted and made in got:
            value = got[made]
            if smoothed:  # channels that what comes next is smoothed by
                value = _unscaled_channels(value, wanted[out])
            found[weight] = sqnr_db(value, wanted[out])
    return found


def _unscaled_channels(got: Array, wanted: Array) -> Array:
    """Each channel (the last dimension) scaled to be nearest to ``wanted``."""
    axes = tuple(range(got.ndim - 1))
    energy = np.maximum(np.square(got, dtype=np.float64).sum(axis=axes), 1e-30)
    scaled: Array = got * ((got.astype(np.float64) * wanted).sum(axis=axes) / energy)
    return scaled


def _run(
    bundle: Bundle, name: str, values: Iterable[str], feeds: Mapping[str, Array], threads: int
) -> dict[str, NDArray[np.float32]]:
    """Values inside a graph on one call, of those that the graph has."""
    graph, found = _tapped(bundle, name, list(values), threads)
    cache = graph.new_cache(len(feeds["kv_positions"])) if PARTS[name].decodes else None
    outputs = graph.run(feeds, cache)
    return {value: outputs[value] for value in found}


def _tapped(bundle: Bundle, name: str, values: Sequence[str], threads: int) -> tuple[OrtGraph, list[str]]:
    """A copy of a graph that also gives these values."""
    spec = bundle.manifest.graphs[name]
    path: Path = bundle.path(spec.file)
    model, spec = load_copy(path, spec, emulate=False)
    given = {output.name for output in model.graph.outputs}
    taps = [value for value in _values(model.graph) if value.name in set(values) and value.name not in given]
    model.graph.outputs.extend(taps)
    names = [str(value.name) for value in taps]
    extra = tuple(TensorSpec(value, "float32", ()) for value in names)
    return open_graph(model, replace(spec, outputs=(*spec.outputs, *extra)), path.parent, threads), names


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    return (value for node in graph for value in node.outputs)
