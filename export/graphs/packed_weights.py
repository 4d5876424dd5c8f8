"""Put GPTQ and AWQ weights into a graph: INT4 or INT8 in blocks along K with a DequantizeLinear.

The layout is that of `omniport.calib.weights.qdq`, so the same kernels run it. Two things are added where the
checkpoint has them: a Gather that puts the other factor into the order of ``desc_act``, and zero points. These are an
input of DequantizeLinear or, because TensorRT refuses that, a separate product: with offsets o = (m - z) * s, one row a
group, x @ w = x @ ((q - m) * s) + sum_of_groups(x) @ o, where m is 8, or 128 of 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from omniport.runtime.bundle.integer_weights import (
    integers_name,
    offsets_name,
    pack_int4,
    scales_name,
    zero_points_name,
)
from omniport.runtime.errors import CheckpointError
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError

from ..checkpoint.packed import PackedWeight
from ..models.module import Rule, Transpose
from .writer import Pieces

Array = NDArray[Any]
#: DequantizeLinear has block_size and INT4 from here on
OPSET = 21
#: bits -> type of integers in a graph, and how an int8 array of them is stored
_INTEGERS: Mapping[int, tuple[ir.DataType, Callable[[Array], Array]]] = {
    4: (ir.DataType.INT4, pack_int4),
    8: (ir.DataType.INT8, np.ascontiguousarray),
}
_FLOATS: Mapping[ir.DataType, Any] = {
    ir.DataType.FLOAT: np.float32,
    ir.DataType.FLOAT16: np.float16,
    ir.DataType.BFLOAT16: ml_dtypes.bfloat16,
}


def packed_rules(rules: Mapping[str, Rule], packed: Mapping[str, PackedWeight]) -> dict[str, PackedWeight]:
    """Initializer -> packed weight, of those initializers that are one."""
    return {
        name: packed[rule.key] for name, rule in rules.items() if isinstance(rule, Transpose) and rule.key in packed
    }


def import_packed(
    model: ir.Model, rules: Mapping[str, Rule], packed: Mapping[str, PackedWeight], separate: bool
) -> tuple[dict[str, Rule | Pieces], dict[str, str]]:
    """Put packed weights into a traced graph as they are.

    Returns:
        what fills the graph's initializers now, and weight -> scheme for bundle.json: ``none`` for linear layers that
        the checkpoint has not packed; empty if it has packed none of this graph.
    """
    weights = packed_rules(rules, packed)
    if weights:  # operators of lowered graphs mean the same up to there
        model.graph.opset_imports[""] = max(model.graph.opset_imports[""], OPSET)
    edit = PackedPass(weights, separate)
    edit(model)
    filled: dict[str, Rule | Pieces] = {name: rule for name, rule in rules.items() if name not in weights}
    linear = [name for name, rule in rules.items() if isinstance(rule, Transpose)] if weights else []
    schemes = {name: _scheme(weights[name], separate) if name in weights else "none" for name in linear}
    return filled | edit.rules, schemes


def check_scales(weight: PackedWeight, precision: str) -> None:
    """Whether a graph of this precision holds the scales as they are.

    Raises:
        CheckpointError: it would round them.
    """
    if precision not in ("float32", weight.reader.dtype(f"{weight.module}.scales")):
        _exact(weight.scales(), ir.DataType[precision.upper()], weight)


def _scheme(weight: PackedWeight, separate: bool) -> str:
    """What bundle.json calls the way a weight is stored."""
    base = f"{'w8' if weight.format.bits == 8 else 'int4'}-{weight.block}"
    return base if weight.symmetric else f"{base}-{'offsets' if separate else 'zp'}"


def stored_bytes(weight: PackedWeight) -> int:
    """Bytes of integers and scales, these counted as float32."""
    rows, columns = weight.shape
    return rows * columns * weight.format.bits // 8 + rows // weight.block * columns * 4


class PackedPass(InPlacePass):
    """Replace weights by their packed integers.

    Needs opset 21, and weights that MatMul alone reads, as its second factor. ``rules`` afterwards says what fills the
    initializers that came.

    Args:
        weights: initializer -> packed weight.
        separate: zero points become a separate product.
    """

    def __init__(self, weights: Mapping[str, PackedWeight], separate: bool) -> None:
        self.weights, self.separate = weights, separate
        self.rules: dict[str, Pieces] = {}
        self._made: dict[tuple[object, ...], ir.Value] = {}

    def requires(self, model: ir.Model) -> None:
        missing = [name for name in self.weights if name not in model.graph.initializers]
        if missing or (self.weights and model.graph.opset_imports.get("", 0) < OPSET):
            raise PreconditionError(f"opset {model.graph.opset_imports}, without the weights {missing}")

    def call(self, model: ir.Model) -> PassResult:
        for name, weight in self.weights.items():
            self._replace(model.graph, model.graph.initializers[name], weight)
        return PassResult(model, bool(self.weights))

    def ensures(self, model: ir.Model) -> None:
        left = [name for name in self.weights if name in model.graph.initializers]
        if left:
            raise PostconditionError(f"the weights {left} are still there")

    def _replace(self, graph: ir.Graph, value: ir.Value, weight: PackedWeight) -> None:
        products = list(_products(value))
        self._dequantize(graph, value, weight, products[0])
        for product in products:
            x = product.inputs[0]
            assert x is not None
            if weight.order is not None:
                x = self._reordered(graph, product, x, weight)
                product.replace_input_with(0, x)
            if self.separate and not weight.symmetric:
                self._add_offsets(graph, product, x, weight, str(value.name))
        del graph.initializers[str(value.name)]

    def _dequantize(self, graph: ir.Graph, value: ir.Value, weight: PackedWeight, first: ir.Node) -> None:
        name, dtype = str(value.name), value.dtype
        assert dtype is not None
        kind, pack = _INTEGERS[weight.format.bits]
        blocks = (weight.shape[0] // weight.block, weight.shape[1])
        inputs = [
            self._initializer(graph, integers_name(name), kind, weight.shape, lambda: map(pack, weight.integers())),
            self._initializer(
                graph, scales_name(name), dtype, blocks, lambda: iter((_exact(weight.scales(), dtype, weight),))
            ),
        ]
        if not self.separate and not weight.symmetric:
            inputs.append(
                self._initializer(
                    graph,
                    zero_points_name(name),
                    kind,
                    blocks,
                    lambda: iter((pack(weight.zero_points()),)),
                )
            )
        attributes = {"axis": 0, "block_size": weight.block}
        made = self._insert(graph, first, "DequantizeLinear", inputs, attributes, dtype, ir.Shape(weight.shape))
        for node, index in list(value.uses()):
            node.replace_input_with(index, made)

    def _reordered(self, graph: ir.Graph, product: ir.Node, x: ir.Value, weight: PackedWeight) -> ir.Value:
        """The other factor in the order of the weight's rows; products of one factor and order share it."""
        order = weight.order
        assert order is not None
        key = (id(x), order.tobytes())
        if key not in self._made:
            indices = self._constant(graph, order)
            self._made[key] = self._insert(graph, product, "Gather", [x, indices], {"axis": -1}, x.dtype, x.shape)
        return self._made[key]

    def _add_offsets(self, graph: ir.Graph, product: ir.Node, x: ir.Value, weight: PackedWeight, name: str) -> None:
        """Sums of groups times offsets, added to the product."""
        groups, out = weight.shape[0] // weight.group, product.outputs[0]
        assert out.dtype is not None
        dtype = out.dtype
        offsets = self._initializer(
            graph,
            offsets_name(name),
            dtype,
            (groups, weight.shape[1]),
            lambda: iter((weight.offsets().astype(_FLOATS[dtype]),)),
        )
        sums = self._group_sums(graph, product, x, groups)
        users = list(out.uses())
        at = _after(graph, product)
        second = self._insert(graph, at, "MatMul", [sums, offsets], {}, dtype, out.shape)
        total = self._insert(graph, at, "Add", [out, second], {}, dtype, out.shape)
        for node, index in users:
            node.replace_input_with(index, total)

    def _group_sums(self, graph: ir.Graph, product: ir.Node, x: ir.Value, groups: int) -> ir.Value:
        """[..., K] -> [..., groups]."""
        assert x.shape is not None
        key = (id(x), groups)
        if key not in self._made:
            outer = list(x.shape)[:-1]
            split = self._constant(graph, np.array([0] * len(outer) + [groups, -1], np.int64))
            axis = self._constant(graph, np.array([-1], np.int64))
            width = int(x.shape[-1]) // groups  # type: ignore[arg-type]
            parts = self._insert(graph, product, "Reshape", [x, split], {}, x.dtype, ir.Shape([*outer, groups, width]))
            sums = self._insert(
                graph, product, "ReduceSum", [parts, axis], {"keepdims": 0}, x.dtype, ir.Shape([*outer, groups])
            )
            self._made[key] = sums
        return self._made[key]

    def _insert(
        self,
        graph: ir.Graph,
        before: ir.Node,
        op: str,
        inputs: list[ir.Value],
        attributes: Mapping[str, int],
        dtype: ir.DataType | None,
        shape: ir.Shape | None,
    ) -> ir.Value:
        """A node in front of another, named after the module of that one; returns its output."""
        path = str(before.name).rpartition("/")[0]
        taken = {node.name for node in graph if str(node.name).startswith(f"{path}/{op}")}
        name = next(n for n in (f"{path}/{op}{i}" for i in ("", *range(1, len(taken) + 2))) if n not in taken)
        made = ir.node(op, inputs, dict(attributes), name=name)
        out = made.outputs[0]
        out.name, out.type, out.shape = f"{name}:0", None if dtype is None else ir.TensorType(dtype), shape
        graph.insert_before(before, made)
        return out

    def _constant(self, graph: ir.Graph, array: NDArray[np.int64]) -> ir.Value:
        """An initializer; equal ones are one."""
        key = (array.tobytes(),)
        if key not in self._made:
            name = f"packed.constant_{len(graph.initializers)}"
            value = self._initializer(graph, name, ir.DataType.INT64, array.shape, None)
            value.const_value = ir.tensor(array, name=name)
            self._made[key] = value
        return self._made[key]

    def _initializer(
        self,
        graph: ir.Graph,
        name: str,
        dtype: ir.DataType,
        shape: tuple[int, ...],
        pieces: Callable[[], Iterator[Array]] | None,
    ) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        graph.initializers.add(value)
        if pieces is not None:
            self.rules[name] = Pieces(pieces)
        return value


def _products(value: ir.Value) -> Iterator[ir.Node]:
    """MatMuls that read a weight, also through a Cast."""
    for node, _ in value.uses():
        if node.op_type == "Cast":
            yield from _products(node.outputs[0])
        else:
            yield node


def _after(graph: ir.Graph, node: ir.Node) -> ir.Node:
    """The node that follows."""
    nodes = iter(graph)
    for other in nodes:
        if other is node:
            break
    return next(nodes)


def _exact(scales: Array, dtype: ir.DataType, weight: PackedWeight) -> Array:
    """Scales in the graph's precision.

    Raises:
        CheckpointError: which does not hold them.
    """
    made = scales.astype(_FLOATS[dtype])
    if not np.array_equal(made.astype(np.float32), scales.astype(np.float32)):
        raise CheckpointError(
            f"'{weight.module}.scales' are {scales.dtype.name} and would be rounded to {dtype.name.lower()}. Export "
            "with --precision fp32, or in the precision of the scales."
        )
    return made
