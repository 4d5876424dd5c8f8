"""Mixed precision: a pass that makes chosen operators of a half-precision graph compute in float32.

Norms, rotary embeddings and softmax always do; layers that ``--keep-fp32`` names and layers whose measured range
float16 cannot hold do as well. They read float32 weights and sit between typed Casts, so that ONNX Runtime computes
what a strongly typed TensorRT network computes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from omniport.runtime.bundle.activation_ranges import FLOAT16_MAX, MARGIN, limit
from omniport.runtime.errors import ExportError
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

FLOAT = ir.DataType.FLOAT
HALVES = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}

#: operators that compute in float32 in every graph
FLOAT32_OPS = frozenset(("LayerNormalization", "RMSNormalization", "RotaryEmbedding", "Softmax"))
#: operators that take bfloat16 from this opset on
_BFLOAT16_SINCE = {"Conv": 22, "ConvTranspose": 22}


@dataclass(frozen=True)
class Mixed:
    """What `mix` did.

    Attributes:
        overflowing: nodes kept in float32 because of measured ranges.
        float32_values: see `GraphSpec.float32_values`.
    """

    overflowing: tuple[str, ...] = ()
    float32_values: tuple[str, ...] = ()


def mix(
    model: ir.Model,
    graph: str,
    precision: str,
    patterns: Sequence[re.Pattern[str]] = (),
    ranges: Mapping[str, float] | None = None,
) -> Mixed:
    """Put what must not be half into float32, in place. Nothing happens to a float32 graph.

    Args:
        graph: its name.
        precision: float32, float16 or bfloat16.
        patterns: searched for in ``GRAPH/module.path``; operators of modules that match stay float32.
        ranges: largest magnitude of every value, by `range_key`; float16 graphs only.

    Raises:
        ExportError: the ranges are another graph's, or the KV cache would have to hold a value that overflows.
    """
    if precision not in HALVES:
        return Mixed()
    dtype = HALVES[precision]
    large: list[str] = []
    if ranges is not None and precision == "float16":
        large = [name_of(node) for node in _overflowing(model.graph, graph, dtype, ranges)]
    opset = model.graph.opset_imports[""]
    keep = {
        name_of(node)
        for node in model.graph
        if node.op_type in FLOAT32_OPS
        or (precision == "bfloat16" and opset < _BFLOAT16_SINCE.get(node.op_type, 0))
        or any(pattern.search(f"{graph}/{module_path(node)}") for pattern in patterns)
    }
    KeepFloatPass(dtype, keep | set(large))(model)
    RemoveUnusedNodesPass()(model)
    wide = float32_values(model, dtype)
    if ranges is not None and precision == "float16":
        _refuse_cache_overflow(model.graph, graph, dtype, ranges)
    return Mixed(tuple(large), wide)


class KeepFloatPass(InPlacePass):
    """Let named nodes compute in float32.

    Needs types of all values and nodes in topological order. Afterwards no input and no output of a named node is
    half, initializers that only such nodes read are float32, and Casts stand where a value crosses. A Cast to float32
    reads what was float32 before it was narrowed. Nodes that touch a half graph input, which is a KV cache, are left
    alone: the cache has one type.
    """

    def __init__(self, dtype: ir.DataType, names: Collection[str]) -> None:
        self.dtype, self.names = dtype, names

    def call(self, model: ir.Model) -> PassResult:
        nodes = [node for node in model.graph if self._kept(node) and self._half(node)]
        wide: dict[int, ir.Value] = {}
        for node in nodes:
            for i, value in enumerate(node.inputs):
                if value is not None and value.dtype == self.dtype:
                    node.replace_input_with(i, self._wide(model.graph, node, value, wide))
            for value in node.outputs:
                if value.dtype == self.dtype:
                    self._widen_output(model.graph, node, value)
        modified = [self._skip(model.graph, node) for node in model.graph if _widens(node, self.dtype)]
        return PassResult(model, bool(nodes) or any(modified))

    def _skip(self, graph: ir.Graph, node: ir.Node) -> bool:
        """Let the readers of a Cast to float32 have the value itself, where it exists in float32."""
        (value,) = node.inputs
        assert value is not None
        before = _narrowed_from(value)
        if before is None and value.is_initializer():
            self._widen_initializer(graph, value)
            before = value
        if before is None:
            return False
        node.replace_input_with(0, before)
        if not node.outputs[0].is_graph_output():
            _replace_uses(node.outputs[0], before)
        return True

    def _kept(self, node: ir.Node) -> bool:
        return name_of(node) in self.names and node.op_type not in ("Cast", "Constant") and not _on_cache(node)

    def _half(self, node: ir.Node) -> bool:
        return any(v is not None and v.dtype == self.dtype for v in (*node.inputs, *node.outputs))

    def _wide(self, graph: ir.Graph, node: ir.Node, value: ir.Value, made: dict[int, ir.Value]) -> ir.Value:
        """The value through a Cast to float32, one for all its readers; `_skip` takes away those that undo another."""
        if id(value) not in made:
            cast = _cast(value, FLOAT, f"{value.name}/float32")
            graph.insert_before(node, cast)
            made[id(value)] = cast.outputs[0]
        return made[id(value)]

    def _widen_initializer(self, graph: ir.Graph, value: ir.Value) -> None:
        """Make an initializer float32; nodes that are not kept read it through a Cast."""
        value.dtype = FLOAT
        if value.const_value is not None:
            array = value.const_value.numpy().astype(np.float32)
            value.const_value = ir.tensor(array, name=value.name)
        others = [(user, i) for user, i in value.uses() if not self._kept(user) and user.op_type != "Cast"]
        if others:
            cast = _cast(value, self.dtype, f"{value.name}/half")
            for user, i in others:
                user.replace_input_with(i, cast.outputs[0])
            graph.insert_before(graph[0], cast)

    def _widen_output(self, graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
        """Make an output float32; readers that are not kept, and a graph output, get it through a Cast."""
        value.dtype = FLOAT
        others: list[tuple[ir.Node, int]] = []
        for user, i in list(value.uses()):
            if user.op_type == "Cast" and user.outputs[0].dtype == FLOAT and not user.outputs[0].is_graph_output():
                _replace_uses(user.outputs[0], value)
            elif not self._kept(user) and user.op_type != "Cast":
                others.append((user, i))
        if value.is_graph_output():
            raise ExportError(f"{node.name} makes the graph output {value.name!r}, which has to stay half")
        if others:
            cast = _cast(value, self.dtype, f"{value.name}/half")
            graph.insert_after(node, cast)
            for user, i in others:
                user.replace_input_with(i, cast.outputs[0])


def float32_values(model: ir.Model, dtype: ir.DataType) -> tuple[str, ...]:
    """Keys of the values that are float32 and that no Cast narrows to ``dtype``, in the graph's order."""
    return tuple(
        key
        for key, value in ranged_values(model.graph)
        if value.dtype == FLOAT and not any(v.dtype == dtype for v in _casts(value))
    )


def ranged_values(graph: ir.Graph) -> Iterator[tuple[str, ir.Value]]:
    """(key, value) of every float value that has a range: graph inputs, and what nodes compute. Casts only convert."""
    values = [*graph.inputs, *(v for n in graph if n.op_type not in ("Cast", "Constant") for v in n.outputs)]
    for value in values:
        if value.dtype in (FLOAT, *HALVES.values()):
            yield range_key(value), value


def range_key(value: ir.Value) -> str:
    """How ranges name a value: its node and output, or the graph input. The same in every precision of a graph."""
    node = value.producer()
    return str(value.name) if node is None else f"{node.name}:{value.index()}"


def module_path(node: ir.Node) -> str:
    """Module path of a node: its name without the operator."""
    return name_of(node).rpartition("/")[0]


def name_of(node: ir.Node) -> str:
    """The node's name, which every node of a finished graph has."""
    assert node.name
    return node.name


def _narrowed_from(value: ir.Value) -> ir.Value | None:
    """The float32 value that a Cast made this one from; None if there is none."""
    source = value.producer()
    before = source.inputs[0] if source is not None and source.op_type == "Cast" else None
    return before if before is not None and before.dtype == FLOAT else None


def _widens(node: ir.Node, dtype: ir.DataType) -> bool:
    """Whether a node is a Cast from ``dtype`` to float32."""
    value = node.inputs[0] if node.op_type == "Cast" else None
    return value is not None and value.dtype == dtype and node.outputs[0].dtype == FLOAT


def _replace_uses(value: ir.Value, new: ir.Value) -> None:
    for reader, i in list(value.uses()):
        reader.replace_input_with(i, new)


def _casts(value: ir.Value) -> list[ir.Value]:
    return [user.outputs[0] for user, _ in value.uses() if user.op_type == "Cast"]


def _overflowing(graph: ir.Graph, name: str, dtype: ir.DataType, ranges: Mapping[str, float]) -> list[ir.Node]:
    """Nodes that read or write a half value whose range is over the limit."""

    def too_large(value: ir.Value | None) -> bool:
        if value is None or value.dtype != dtype or value.is_initializer() or value.is_graph_input():
            return False  # a half input is a KV cache: what is put into it has been looked at
        node = value.producer()
        if node is not None and node.op_type == "Constant":
            return False
        if node is not None and node.op_type == "Cast":
            value = node.inputs[0]
            if value is None or value.dtype != FLOAT:  # from int64 or bool
                return False
        key = range_key(value)
        if key not in ranges:
            raise ExportError(
                f"the ranges say nothing about {key} of {name}: they were measured on a graph with other nodes. Export "
                "with --precision fp32 and the same --ops and --kv, and run 'omniport ranges' on that bundle."
            )
        return ranges[key] > limit()

    return [node for node in graph if node.op_type != "Cast" and any(map(too_large, (*node.inputs, *node.outputs)))]


def _refuse_cache_overflow(graph: ir.Graph, name: str, dtype: ir.DataType, ranges: Mapping[str, float]) -> None:
    for node in _overflowing(graph, name, dtype, ranges):
        raise ExportError(
            f"{name}: {node.name} puts a value into the KV cache that was observed to exceed {limit():.0f} "
            f"({FLOAT16_MAX:.0f} with a margin of {MARGIN:g}), and the cache is float16. Export with --precision bf16 "
            "or fp32."
        )


def _on_cache(node: ir.Node) -> bool:
    return any(v is not None and v.is_graph_input() and v.dtype in HALVES.values() for v in node.inputs)


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], {"to": dtype}, name=name)
    made = node.outputs[0]
    made.name, made.dtype, made.shape = f"{name}:0", dtype, value.shape
    return node
