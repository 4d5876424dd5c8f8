"""Translate each custom op of `omniport.export.models.ops` to ONNX nodes (opset 24, standard domain).

Pads are given for every axis: the ``axes`` input of Pad is unknown to TensorRT's parser before 10.4.
`omniport.export.graphs.lowering` replaces the nodes that need an opset above 18.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnxscript.values import Opset

from ..models.ops import CURVE  # importing it puts the ops into torch.ops.omniport

op: Any = Opset("", 24)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The table that turns the custom ops into ONNX nodes, for ``torch.onnx.export(custom_translation_table=...)``."""
    ops = torch.ops.omniport
    return {
        ops.anti_aliased_snake.default: _snake_node,
        ops.attention.default: _attention_node,
        ops.linear.default: _linear_node,
        ops.merge_heads.default: _merge_heads_node,
        ops.merge_rows.default: _merge_rows_node,
        ops.pad_to_blocks.default: _pad_to_blocks_node,
        ops.reshape_like.default: _reshape_like_node,
        ops.split_blocks.default: _split_blocks_node,
        ops.split_heads.default: _split_heads_node,
        ops.split_rows.default: _split_rows_node,
        ops.rotary_embedding.default: _rotary_node,
        ops.rms_norm.default: _rms_norm_node,
        ops.take_block.default: _take_block_node,
        ops.tensor_scatter.default: _scatter_node,
    }


def _attention_node(q: Any, k: Any, v: Any, mask: Any, scale: float) -> Any:
    inputs = (q, k, v) if mask is None else (q, k, v, mask)
    return op.Attention(*inputs, scale=scale)[0]


def _rotary_node(x: Any, cos: Any, sin: Any, interleaved: bool = False) -> Any:
    return op.RotaryEmbedding(x, cos, sin, interleaved=int(interleaved))


def _rms_norm_node(x: Any, weight: Any, eps: float) -> Any:
    return op.RMSNormalization(x, weight, axis=-1, epsilon=eps, stash_type=1)


def _scatter_node(cache: Any, update: Any, write_index: Any) -> Any:
    return op.TensorScatter(cache, update, write_index, axis=-2, mode="linear")


def _linear_node(x: Any, weight: Any) -> Any:
    return op.MatMul(x, weight)


def _split_heads_node(x: Any, heads: int) -> Any:
    shape = op.Constant(value_ints=[0, 0, heads, int(x.shape[2]) // heads])
    return op.Transpose(op.Reshape(x, shape), perm=[0, 2, 1, 3])


def _merge_heads_node(x: Any) -> Any:
    shape = op.Constant(value_ints=[0, 0, int(x.shape[1]) * int(x.shape[3])])
    return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), shape)


def _split_blocks_node(x: Any, block: int, back: bool = False, ahead: bool = False) -> Any:
    width = int(x.shape[2])
    flat = op.Constant(value_ints=[-1, block * (1 + back + ahead), width])
    if not back and not ahead:
        return op.Reshape(x, flat)
    axis, end = op.Constant(value_ints=[1]), op.Constant(value_ints=[2**62])
    blocks = op.Reshape(x, op.Constant(value_ints=[0, -1, block, width]))
    parts = [op.Slice(blocks, op.Constant(value_ints=[1]), end, axis) if back else blocks]
    if back:
        parts.insert(0, op.Slice(blocks, op.Constant(value_ints=[0]), op.Constant(value_ints=[-1]), axis))
    if ahead:
        padded = op.Pad(blocks, op.Constant(value_ints=[0, 0, 0, 0, 0, 1, 0, 0]))
        parts.append(op.Slice(padded, op.Constant(value_ints=[1 + back]), end, axis))
    return op.Reshape(op.Concat(*parts, axis=2), flat)


def _take_block_node(x: Any, index: Any, block: int) -> Any:
    width = int(x.shape[2])
    blocks = op.Reshape(x, op.Constant(value_ints=[0, -1, block, width]))
    return op.Reshape(op.Gather(blocks, index, axis=1), op.Constant(value_ints=[0, block, width]))


def _reshape_like_node(x: Any, like: Any) -> Any:
    return op.Reshape(x, op.Shape(like))


def _pad_to_blocks_node(x: Any, block: int) -> Any:
    length = op.Shape(x, start=1, end=2)
    # how much is missing: -length modulo block, written as a product because TensorRT documents Neg for no INT64
    missing = op.Mod(op.Mul(length, op.Constant(value_ints=[block - 1])), op.Constant(value_ints=[block]))
    pads = op.Concat(op.Constant(value_ints=[0, 0, 0, 0]), missing, op.Constant(value_ints=[0]), axis=0)
    return op.Pad(x, pads)


def _halves(x: Any) -> tuple[Any, Any]:
    """Sizes of the two halves of the last of four axes, int64 [1] each."""
    length = op.Shape(x, start=3, end=4)
    late = op.Div(length, op.Constant(value_ints=[2]))
    return op.Sub(length, late), late


def _first(x: Any, count: Any) -> Any:
    return op.Slice(x, op.Constant(value_ints=[0]), count, op.Constant(value_ints=[3]))


def _last(x: Any, count: Any) -> Any:
    # a product, because TensorRT documents Neg for no INT64; a start before the beginning is the beginning
    start = op.Mul(count, op.Constant(value_ints=[-1]))
    return op.Slice(x, start, op.Constant(value_ints=[2**62]), op.Constant(value_ints=[3]))


def _split_rows_node(x: Any, reach: int) -> Any:
    length = op.Add(_halves(x)[0], op.Constant(value_ints=[reach]))
    return op.Concat(_first(x, length), _last(x, length), axis=2)


def _merge_rows_node(x: Any, like: Any) -> Any:
    axis, end = op.Constant(value_ints=[2]), op.Constant(value_ints=[2**62])
    rows = [
        op.Slice(x, op.Constant(value_ints=[0]), op.Constant(value_ints=[1]), axis),
        op.Slice(x, op.Constant(value_ints=[1]), end, axis),
    ]
    early, late = _halves(like)
    return op.Concat(_first(rows[0], early), _last(rows[1], late), axis=3)


def _snake_node(x: Any, up_even: Any, up_odd: Any, down_even: Any, down_odd: Any, rate: Any, height: Any) -> Any:
    channels = x.shape[1]
    padded = op.Pad(x, op.Constant(value_ints=[0, 0, 0, 3, 0, 0, 0, 3]), mode="edge")
    even, odd = op.Conv(padded, up_even, group=channels), op.Conv(padded, up_odd, group=channels)
    axis, end = op.Constant(value_ints=[3]), op.Constant(value_ints=[2**62])
    first = op.Slice(even, op.Constant(value_ints=[0]), op.Constant(value_ints=[1]), axis)
    last = op.Slice(odd, op.Constant(value_ints=[-1]), end, axis)
    sums = []
    for phase, down in ((even, down_even), (odd, down_odd)):
        # The ends come before the curve: ONNX Runtime makes a convolution of a Mul that follows a blocked one.
        u = op.Concat(first, first, first, phase, last, last, last, axis=3)
        curve = op.Mul(_curve_node(op.Mul(u, rate), x), height)
        sums.append(op.Conv(op.Add(u, curve), down, group=channels))
    return op.Add(*sums)


def _curve_node(turned: Any, like: Any) -> Any:
    """sin^2(pi * turned) / CURVE_FACTOR, as `CURVE` says, of what is left of ``turned`` without whole periods."""
    left = op.Sub(turned, op.Round(turned))
    square = op.Mul(left, left)
    first, *middle, top = (_constant(value, like) for value in CURVE)
    y = op.Add(square, first)
    for coefficient in middle:
        y = op.Add(op.Mul(y, square), coefficient)
    q = op.Mul(y, square)
    return op.Mul(q, op.Sub(top, q))


def _constant(value: float, like: Any) -> Any:
    """A number in the dtype of ``like``. It has it from the start: Cast of this opset is not that of older ones."""
    return op.Constant(value=ir.tensor(value, dtype=like.dtype))
