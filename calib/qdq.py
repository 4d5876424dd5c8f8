"""DequantizeLinear before the products: the graph side of quantizing weights.

The layout is the one that ONNX Runtime's CPU provider fuses into one operator (measured, docs/quantize.md) and that
TensorRT takes: the weight stays [K, N], INT8 with a scale per column (axis 1), INT4 with a scale per block of rows
(axis 0, block_size). No zero points: TensorRT knows none.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError

from .recipe import Choice
from .rounding import scale_shape
from .weights import CHANNELS_LAST

__all__ = ["OPSET", "QdqPass", "integers_name", "scales_name"]

#: DequantizeLinear has block_size and INT4 from here on
OPSET = 21


def integers_name(weight: str) -> str:
    """Initializer that holds a weight's integers."""
    return f"{weight}.integers"


def scales_name(weight: str) -> str:
    """Initializer that holds a weight's scales."""
    return f"{weight}.scales"


class QdqPass(InPlacePass):
    """Replace weights by integers, scales and one DequantizeLinear before the first of their uses.

    Needs opset 21, and weights that `find_weights` found in this graph. Leaves new initializers that have a type and a
    shape and no data: `calib.writer` streams them.

    Args:
        choices: what each weight becomes; those with scheme ``none`` are left alone.
    """

    def __init__(self, choices: Sequence[Choice]) -> None:
        self.choices = [choice for choice in choices if choice.scheme.bits]

    def requires(self, model: ir.Model) -> None:
        missing = [c.weight.name for c in self.choices if c.weight.name not in model.graph.initializers]
        if missing or (self.choices and model.graph.opset_imports.get("", 0) < OPSET):
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
        kind = ir.DataType.INT8 if scheme.bits == 8 else ir.DataType.INT4
        integers = ir.Value(name=integers_name(weight.name), type=ir.TensorType(kind), shape=ir.Shape(weight.shape))
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
