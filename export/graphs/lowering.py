"""Decompose operators newer than opset 18 into older ones: ``omniport export --ops decomposed``.

Attention, RotaryEmbedding and RMSNormalization become a handful of nodes each, for parsers that do not know them
(TensorRT before 10.15; JetPack 6.2 has 10.3). They are alternative definitions while tracing and not a pass over the
finished graph: module paths, shared constants and folding then come out as they do for every other node.

Softmax, root mean square and rotation compute in float32 whatever the graph's precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnxscript.values import Opset

from .translations import translations

NATIVE_OPSET = 24
#: what torch's exporter writes before any conversion; Gelu (opset 20) becomes Erf or Tanh
LOWERED_OPSET = 18
#: --ops -> opset of the graphs
OPSETS = {"native": NATIVE_OPSET, "decomposed": LOWERED_OPSET}

#: a score that no softmax gives any weight to, and that is finite: a row with nothing to attend to stays finite
_MASKED = -1e30
_FLOAT = int(ir.DataType.FLOAT)

op: Any = Opset("", LOWERED_OPSET)


def lowered_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """As `omniport.export.graphs.translations.translations`, without operators newer than opset 18.

    There is none for TensorScatter: nothing older updates a cache in place.
    """
    ops = torch.ops.omniport
    return {
        **translations(),
        ops.attention.default: _attention_nodes,
        ops.rotary_embedding.default: _rotary_nodes,
        ops.rms_norm.default: _rms_norm_nodes,
    }


def _attention_nodes(q: Any, k: Any, v: Any, mask: Any, scale: float) -> Any:
    # Query heads that share a key head become rows of one matrix, so that keys and values are never repeated.
    heads, kv_heads, width = int(q.shape[1]), int(k.shape[1]), int(q.shape[3])
    groups = heads // kv_heads
    x = op.Mul(q, _narrow(op.Constant(value_float=scale), q))
    if groups > 1:
        x = op.Reshape(x, op.Constant(value_ints=[0, kv_heads, -1, width]))
    scores = _wide(op.MatMul(x, op.Transpose(k, perm=[0, 1, 3, 2])), q)
    if mask is not None:
        mask = op.Concat(*[mask] * groups, axis=2) if groups > 1 else mask
        scores = op.Where(mask, scores, op.Constant(value_float=_MASKED))
    y = op.MatMul(_narrow(op.Softmax(scores, axis=-1), v), v)
    return y if groups == 1 else op.Reshape(y, op.Constant(value_ints=[0, heads, -1, width]))


def _rotary_nodes(x: Any, cos: Any, sin: Any, interleaved: bool = False) -> Any:
    heads, width = int(x.shape[1]), int(x.shape[3])
    axis = op.Constant(value_ints=[1])
    cos, sin = (op.Unsqueeze(_wide(t, t), axis) for t in (cos, sin))
    y = _wide(x, x)
    last = 3
    if interleaved:  # pairs (0, 1), (2, 3), ...: one more axis holds a pair
        y = op.Reshape(y, op.Constant(value_ints=[0, heads, -1, width // 2, 2]))
        cos, sin = (op.Unsqueeze(t, op.Constant(value_ints=[4])) for t in (cos, sin))
        last = 4
    a, b = op.Split(y, axis=last, num_outputs=2)
    rotated = op.Concat(op.Sub(op.Mul(a, cos), op.Mul(b, sin)), op.Add(op.Mul(b, cos), op.Mul(a, sin)), axis=last)
    if interleaved:
        rotated = op.Reshape(rotated, op.Constant(value_ints=[0, heads, -1, width]))
    return _narrow(rotated, x)


def _rms_norm_nodes(x: Any, weight: Any, eps: float) -> Any:
    y = _wide(x, x)
    mean = op.ReduceMean(op.Mul(y, y), op.Constant(value_ints=[-1]), keepdims=1)
    y = op.Div(y, op.Sqrt(op.Add(mean, op.Constant(value_float=eps))))
    return _narrow(op.Mul(y, _wide(weight, weight)), x)


def _wide(value: Any, like: Any) -> Any:
    """value, which has the dtype of ``like``, in float32."""
    return value if like.dtype == ir.DataType.FLOAT else op.Cast(value, to=_FLOAT)


def _narrow(value: Any, like: Any) -> Any:
    """float32 value in the dtype of ``like``."""
    return value if like.dtype == ir.DataType.FLOAT else op.Cast(value, to=int(like.dtype))
