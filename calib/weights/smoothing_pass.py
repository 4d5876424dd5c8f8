"""Smoothing pass: divide large input channels, and multiply the matching rows of the weight (SmoothQuant, AWQ).

``x @ W = (x / s) @ (s * W)``: what rounds badly moves to where it rounds well (SmoothQuant, Xiao et al. 2023; AWQ, Lin
et al. 2024). The division is folded into what makes ``x`` where that is exact: a norm's weight and bias, or the columns
of the projection before, through a gate (down_proj into up_proj) or through attention (o_proj into v_proj; its KV cache
then holds the divided values). Query heads that share a key head share factors. Elsewhere a Mul divides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from omniport.runtime.bundle.integer_weights import smoothed_name
from omniport.runtime.bundle.recipes import CHANNELS_LAST
from onnx_ir.passes import InPlacePass, PassResult

from .choices import Choice

Array = NDArray[Any]
_NORMS = ("LayerNormalization", "RMSNormalization")


@dataclass(frozen=True)
class Factors:
    """What happens to a weight [K, N] before it is rounded: ``weight * rows[:, None] / columns``. None: nothing."""

    rows: Array | None = None
    columns: Array | None = None


class SmoothPass(InPlacePass):
    """Divide what products read, folded where it is exact.

    Needs a graph as exported: names, types and shapes of all values. Afterwards ``factors`` says what is left to be
    done to the weights themselves.

    Args:
        choices: of this graph.
        smoothing: weight -> [K] float32, positive.
        read: value of a small initializer, by name.
    """

    def __init__(self, choices: Sequence[Choice], smoothing: Mapping[str, Array], read: Callable[[str], Array]) -> None:
        self.smoothing, self.read = smoothing, read
        self.factors: dict[str, Factors] = {}
        # columns of a weight can be scaled if it is written anew, its channels are columns, and one product reads it
        self._open = {c.weight.name for c in choices if c.scheme.bits and c.weight.layout == CHANNELS_LAST}

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        for value, nodes, smooth in self._groups(graph):
            divided = self._fold(graph, value, smooth) if _reads_alone(value, nodes) else None
            if divided is None:
                divided = smooth
                self._divide(graph, value, nodes, smooth)
            for node in nodes:
                self._note(_weight(node), rows=divided)
        return PassResult(model, bool(self.factors))

    def _groups(self, graph: ir.Graph) -> list[tuple[ir.Value, list[ir.Node], Array]]:
        """Products that read the same value and divide it by the same factors."""
        groups: dict[tuple[int, bytes], tuple[ir.Value, list[ir.Node], Array]] = {}
        for name, smooth in self.smoothing.items():
            uses = list(graph.initializers[name].uses())
            value = uses[0].node.inputs[0]
            if len(uses) > 1 or value is None:
                continue
            _, nodes, _ = groups.setdefault((id(value), smooth.tobytes()), (value, [], smooth))
            nodes.append(uses[0].node)
        return list(groups.values())

    def _note(self, weight: str, **what: Array) -> None:
        self.factors[weight] = replace(self.factors.get(weight, Factors()), **what)

    def _divide(self, graph: ir.Graph, value: ir.Value, nodes: Sequence[ir.Node], smooth: Array) -> None:
        """An explicit Mul between a value and products that read it."""
        first = _first(graph, nodes)
        assert value.dtype is not None
        inverse = _initializer(graph, smoothed_name(_weight(first)), 1 / smooth, value.dtype)
        made = ir.node("Mul", [value, inverse], name=f"{first.name}/Mul")
        out = made.outputs[0]
        out.name, out.dtype, out.shape = f"{made.name}:0", value.dtype, value.shape
        graph.insert_before(first, made)
        for node in nodes:
            node.replace_input_with(0, out)

    def _fold(self, graph: ir.Graph, value: ir.Value, smooth: Array) -> Array | None:
        """Make ``value`` come out divided; the factors it is divided by, or None if that cannot be."""
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "Cast" and _alone(node.inputs[0]):
            assert node.inputs[0] is not None
            return self._fold(graph, node.inputs[0], smooth)
        if node.op_type in _NORMS:
            return self._fold_norm(graph, node, smooth)
        if node.op_type == "Mul":
            norm = next((i for i, side in enumerate(node.inputs) if _has_shape(side, smooth.shape)), None)
            if norm is not None:
                self._scale_input(graph, node, norm, smooth)
                return smooth
            linear = next((found for side in node.inputs if (found := self._linear(side, len(smooth)))), None)
            return None if linear is None else self._fold_linear(graph, linear, smooth, smooth)
        return self._fold_attention(graph, value, smooth)

    def _fold_norm(self, graph: ir.Graph, node: ir.Node, smooth: Array) -> Array | None:
        if not all(value is None or _has_shape(value, smooth.shape) for value in node.inputs[1:]):
            return None
        for index in range(1, len(node.inputs)):
            self._scale_input(graph, node, index, smooth)
        return smooth

    def _fold_attention(self, graph: ir.Graph, value: ir.Value, smooth: Array) -> Array | None:
        """Heads side by side -> attention -> its values -> the projection that makes them."""
        source = _attended(value)
        if source is None or source.shape is None or not isinstance(width := source.shape[-1], int):
            return None
        linear = self._linear(_before_cache(source), None)
        if linear is None:
            return None
        columns = _columns(linear[0])
        if columns % width or len(smooth) % columns:
            return None
        heads = smooth.reshape(columns // width, -1, width)  # key heads, query heads of each, channels
        shared = heads.max(axis=1, keepdims=True)
        self._fold_linear(graph, linear, shared.reshape(-1), shared)
        return np.ascontiguousarray(np.broadcast_to(shared, heads.shape)).reshape(-1)

    def _linear(self, value: ir.Value | None, columns: int | None) -> tuple[ir.Node, ir.Node | None] | None:
        """(product, addition of its bias) that make a value which nothing else reads."""
        if not _alone(value):
            return None
        assert value is not None
        node, bias = value.producer(), None
        if node is not None and node.op_type == "Add" and _alone(node.inputs[0]) and _is_initializer(node.inputs[1]):
            bias, before = node, node.inputs[0]
            node = before.producer() if before is not None else None
        if node is None or node.op_type != "MatMul" or _weight(node) not in self._open:
            return None
        weight = node.inputs[1]
        fits = columns is None or _columns(node) == columns
        return (node, bias) if fits and weight is not None and len(weight.uses()) == 1 else None

    def _fold_linear(
        self, graph: ir.Graph, linear: tuple[ir.Node, ir.Node | None], columns: Array, smooth: Array
    ) -> Array:
        product, bias = linear
        self._note(_weight(product), columns=columns)
        if bias is not None:
            self._scale_input(graph, bias, 1, columns)
        return smooth

    def _scale_input(self, graph: ir.Graph, node: ir.Node, index: int, smooth: Array) -> None:
        """Let a node read an initializer divided by ``smooth`` instead of the initializer."""
        old = node.inputs[index]
        if old is None:
            return
        assert old.name
        assert old.dtype is not None
        array = self.read(old.name).astype(np.float32) / smooth
        node.replace_input_with(index, _initializer(graph, smoothed_name(old.name), array, old.dtype))
        if not old.uses():
            del graph.initializers[old.name]


def _reads_alone(value: ir.Value, nodes: Sequence[ir.Node]) -> bool:
    """Whether these nodes are all that sees a value."""
    return not value.is_graph_output() and len(value.uses()) == len(nodes)


def _alone(value: ir.Value | None) -> bool:
    """Whether a node makes the value and one node reads it."""
    made = value is not None and value.producer() is not None
    return made and value is not None and not value.is_graph_output() and len(value.uses()) == 1


def _is_initializer(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer()


def _has_shape(value: ir.Value | None, shape: tuple[int, ...]) -> bool:
    """Whether a value is an initializer of that shape."""
    return value is not None and value.is_initializer() and value.shape is not None and value.shape == shape


def _attended(value: ir.Value) -> ir.Value | None:
    """The values of an attention whose heads a Transpose and a Reshape put side by side."""
    node = _skip(_skip(value.producer(), "Reshape"), "Transpose")
    if node is not None and node.op_type == "Attention":
        return node.inputs[2]
    if node is not None and node.op_type == "Reshape":  # lowered: heads that share a key head were rows of one product
        node = _skip(node, "Reshape")
    if node is None or node.op_type != "MatMul":
        return None
    weights = _producer(node, 0)
    if weights is not None and weights.op_type == "Cast":
        weights = _producer(weights, 0)
    return node.inputs[1] if weights is not None and weights.op_type == "Softmax" else None


def _skip(node: ir.Node | None, kind: str) -> ir.Node | None:
    """What makes the first input of a node of that kind, if nothing else reads it."""
    if node is None or node.op_type != kind or not _alone(node.inputs[0]):
        return None
    return _producer(node, 0)


def _producer(node: ir.Node, index: int) -> ir.Node | None:
    value = node.inputs[index]
    return value.producer() if value is not None else None


def _before_cache(value: ir.Value) -> ir.Value | None:
    """What attention's values were before the cache took them and they were cut into heads."""
    current: ir.Value | None = value
    for kinds in (("Slice",), ("TensorScatter", "Concat"), ("Transpose",), ("Reshape",)):
        node = current.producer() if current is not None else None
        if node is None or current is None:
            return None
        if node.op_type not in kinds:
            if kinds == ("Slice",):
                continue  # a cache that grows is read whole
            return None
        cache = node.op_type in ("TensorScatter", "Concat")
        if len(current.uses()) != 1 or (current.is_graph_output() and not cache):
            return None
        current = node.inputs[1 if cache else 0]
    return current


def _first(graph: ir.Graph, nodes: Sequence[ir.Node]) -> ir.Node:
    listed = {id(node) for node in nodes}
    return next(node for node in graph if id(node) in listed)


def _columns(product: ir.Node) -> int:
    weight = product.inputs[1]
    assert weight is not None
    assert weight.shape is not None
    return weight.shape.numpy()[1]


def _weight(node: ir.Node) -> str:
    value = node.inputs[1]
    return value.name or "" if value is not None else ""


def _initializer(graph: ir.Graph, name: str, array: Array, dtype: ir.DataType) -> ir.Value:
    value = ir.Value(
        name=name,
        const_value=ir.tensor(np.asarray(array).astype(dtype.numpy()), name=name),
        type=ir.TensorType(dtype),
        shape=ir.Shape(array.shape),
    )
    graph.initializers.add(value)
    return value
