"""Passes that put QuantizeLinear and DequantizeLinear around products and convolutions.

The layout is the one that ONNX Runtime's CPU provider fuses into one operator (measured, docs/quantize.md) and that
TensorRT takes: the weight stays [K, N], INT8 with a scale per column (axis 1), INT4 with a scale per block of rows
(axis 0, block_size). The other factor is rounded by QuantizeLinear with one scale and widened again: ONNX Runtime makes
one integer product of the two DequantizeLinear and the MatMul, where nothing else reads what QuantizeLinear made. Of a
Conv it makes one (QLinearConv) if what comes out is rounded as well, and rounds the bias itself. Zero points are zero:
TensorRT knows no others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from omniport.runtime.bundle.integer_weights import integers_name, scales_name
from omniport.runtime.bundle.recipes import CHANNELS_LAST
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError

from .choices import Choice
from .rounding import scale_shape

Array = NDArray[Any]
#: DequantizeLinear has scales in half precision and E4M3 from the first on, block_size and INT4 from the second
_CHANNELS, _BLOCKS = 19, 21
#: in the names of what rounds an output
_OUT = "out"
_FORMATS = {"int8": ir.DataType.INT8, "int4": ir.DataType.INT4, "fp8": ir.DataType.FLOAT8E4M3FN}


def opset_with(choices: Sequence[Choice], opset: int) -> int:
    """The opset of a graph once these weights are stored: its own, or the first that has what they need.

    None newer than that, for parsers that are older. Operators of lowered graphs mean the same from 18 to 21: newer
    versions of them take more types (a test compares them).
    """
    needed = {_BLOCKS if choice.scheme.block else _CHANNELS for choice in choices if choice.scheme.bits}
    return max({opset, *needed})


class QdqPass(InPlacePass):
    """Replace weights by integers, scales and one DequantizeLinear before the first of their uses.

    Needs the opset that `opset_with` gives, and weights that `find_weights` found in this graph. Leaves new
    initializers that have a type and a shape and no data: `calib.writer` streams them.

    Args:
        choices: what each weight becomes; those with scheme ``none`` are left alone.
    """

    def __init__(self, choices: Sequence[Choice]) -> None:
        self.choices = [choice for choice in choices if choice.scheme.bits]

    def requires(self, model: ir.Model) -> None:
        missing = [c.weight.name for c in self.choices if c.weight.name not in model.graph.initializers]
        opset = model.graph.opset_imports.get("", 0)
        if missing or opset < opset_with(self.choices, opset):
            raise PreconditionError(f"opset {model.graph.opset_imports}, without the weights {missing}")

    def call(self, model: ir.Model) -> PassResult:
        for choice in self.choices:
            self._replace(model.graph, choice)
        return PassResult(model, bool(self.choices))

    def ensures(self, model: ir.Model) -> None:
        left = [c.weight.name for c in self.choices if c.weight.name in model.graph.initializers]
        if left:
            raise PostconditionError(f"the weights {left} are still there")

    def _replace(self, graph: ir.Graph, choice: Choice) -> None:
        weight, scheme = choice.weight, choice.scheme
        value = graph.initializers[weight.name]
        kind = ir.TensorType(_FORMATS[scheme.format])
        integers = ir.Value(name=integers_name(weight.name), type=kind, shape=ir.Shape(weight.shape))
        assert value.dtype is not None
        scales = ir.Value(
            name=scales_name(weight.name), type=ir.TensorType(value.dtype), shape=ir.Shape(scale_shape(choice))
        )
        attributes = {"axis": 1 if weight.layout == CHANNELS_LAST and not scheme.block else 0}
        if scheme.block:
            attributes["block_size"] = scheme.block
        uses = list(value.uses())
        users = {id(node) for node, _ in uses}
        first = next(node for node in graph if id(node) in users)
        name = f"{first.name}/DequantizeLinear"
        made = ir.node("DequantizeLinear", [integers, scales], attributes, name=name)
        out = made.outputs[0]
        out.name, out.dtype, out.shape = f"{name}:0", value.dtype, ir.Shape(weight.shape)
        graph.insert_before(first, made)
        for node, index in uses:
            node.replace_input_with(index, out)
        del graph.initializers[weight.name]
        for new in (integers, scales):
            graph.initializers.add(new)


class ActivationPass(InPlacePass):
    """Round what products read: QuantizeLinear and DequantizeLinear before them.

    Half-precision products that read the same value share these. In float32, which runs on CPUs, each has its own, and
    scales one step apart: ONNX Runtime merges what is equal, and then fuses nothing. Needs weights still in place
    (before `QdqPass`), and their first inputs typed.

    Args:
        choices: those whose scheme has no ``activations`` are left alone.
        scales: weight -> scale of its other factor, positive.
    """

    def __init__(self, choices: Sequence[Choice], scales: Mapping[str, float]) -> None:
        self.choices = [choice for choice in choices if choice.scheme.activations]
        self.scales = scales

    def requires(self, model: ir.Model) -> None:
        bad = [c.weight.name for c in self.choices if not self.scales.get(c.weight.name, 0) > 0]
        if bad:
            raise PreconditionError(f"no scale for what {bad} multiply")

    def call(self, model: ir.Model) -> PassResult:
        groups: dict[tuple[int, str], tuple[ir.Value, str, list[ir.Node], float]] = {}
        for choice in self.choices:
            for node, _ in model.graph.initializers[choice.weight.name].uses():
                value, number = node.inputs[0], choice.scheme.format
                assert value is not None
                key, scale = (id(value), number), self.scales[choice.weight.name]
                _, _, nodes, so_far = groups.get(key, (value, number, [], 0.0))
                groups[key] = (value, number, [*nodes, node], max(scale, so_far))
        for value, number, nodes, scale in groups.values():
            assert value.dtype is not None
            exact = np.asarray(scale, value.dtype.numpy())
            if value.dtype != ir.DataType.FLOAT:
                _round_input(model.graph, value, number, nodes, exact)
                continue
            for node in nodes:
                _round_input(model.graph, value, number, [node], exact)
                exact = np.nextafter(exact, np.float32(np.inf))
        return PassResult(model, bool(groups))


class OutputPass(InPlacePass):
    """Round what convolutions give: QuantizeLinear and DequantizeLinear behind them, for all that read it.

    Needs weights still in place (before `QdqPass`).

    Args:
        choices: those whose scheme has no ``outputs`` are left alone.
        scales: weight -> scale of what its convolution gives, positive.
    """

    def __init__(self, choices: Sequence[Choice], scales: Mapping[str, float]) -> None:
        self.choices = [choice for choice in choices if choice.scheme.outputs]
        self.scales = scales

    def requires(self, model: ir.Model) -> None:
        bad = [c.weight.name for c in self.choices if not self.scales.get(c.weight.name, 0) > 0]
        if bad:
            raise PreconditionError(f"no scale for what {bad} give")

    def call(self, model: ir.Model) -> PassResult:
        for choice in self.choices:
            for node, _ in model.graph.initializers[choice.weight.name].uses():
                self._round(model.graph, node, choice)
        return PassResult(model, bool(self.choices))

    def _round(self, graph: ir.Graph, node: ir.Node, choice: Choice) -> None:
        value = node.outputs[0]
        uses = list(value.uses())
        assert value.dtype is not None
        scale = np.asarray(self.scales[choice.weight.name], value.dtype.numpy())
        pair = _rounding(graph, value, choice.scheme.format, scale, f"{node.name}/{_OUT}")
        graph.insert_after(node, pair)
        for user, index in uses:
            user.replace_input_with(index, pair[1].outputs[0])


def rounded_output(node: str) -> str:
    """The value that readers of a node's output are given by `OutputPass`."""
    return f"{node}/{_OUT}/QuantizeLinear/DequantizeLinear:0"


def _round_input(graph: ir.Graph, value: ir.Value, number: str, nodes: Sequence[ir.Node], scale: Array) -> None:
    """value -> QuantizeLinear -> DequantizeLinear -> nodes."""
    users = {id(node) for node in nodes}
    first = next(node for node in graph if id(node) in users)
    pair = _rounding(graph, value, number, scale, str(first.name))
    graph.insert_before(first, pair)
    for node in nodes:
        node.replace_input_with(0, pair[1].outputs[0])


def _rounding(graph: ir.Graph, value: ir.Value, number: str, scale: Array, name: str) -> tuple[ir.Node, ir.Node]:
    """QuantizeLinear and DequantizeLinear of a value, not in the graph yet; their constants are."""
    assert value.dtype is not None
    zero = _constant(graph, f"{number}.zero", np.zeros((), _FORMATS[number].numpy()))
    scales = _constant(graph, f"{name}.scale", scale)
    down = ir.node("QuantizeLinear", [value, scales, zero], name=f"{name}/QuantizeLinear")
    up = ir.node("DequantizeLinear", [down.outputs[0], scales, zero], name=f"{down.name}/DequantizeLinear")
    for node, dtype in ((down, _FORMATS[number]), (up, value.dtype)):
        out = node.outputs[0]
        out.name, out.dtype, out.shape = f"{node.name}:0", dtype, value.shape
    return down, up


def _constant(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
        graph.initializers.add(value)
    return graph.initializers[name]
