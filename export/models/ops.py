"""Custom torch ops for ONNX operators that torch lacks: they run eagerly and export as one node each.

They are registered as ``omniport::*`` so that a module can be compared with its reference before any graph exists, and
so that tracing on the meta device keeps its tensors there; `omniport.export.graphs.translations` says what each
becomes.
Shapes: B batch, S new tokens, L live cache length, M cache capacity, H heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

_F = TypeVar("_F", bound=Callable[..., Tensor])


def _operator(shape: Callable[..., Sequence[int]] | None = None) -> Callable[[_F], _F]:
    """Register a function as an operator that keeps its signature.

    Args:
        shape: of the result, from the operator's arguments; that of the first argument without.
    """

    def register(function: _F) -> _F:
        operator = torch.library.custom_op(f"omniport::{function.__name__}", mutates_args=())(function)
        operator.register_fake(lambda x, *rest: torch.empty_like(x) if shape is None else x.new_empty(shape(x, *rest)))
        return cast(_F, operator)

    return register


@_operator()
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Scaled dot-product attention with grouped query heads (ONNX Attention-24).

    Args:
        q: [B, Hq, S, D]. k, v: [B, Hkv, L, D], Hq a multiple of Hkv.
        mask: bool, broadcastable to [B, Hq, S, L], True where attention is allowed; None allows it
            everywhere.

    Returns:
        [B, Hq, S, D].
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


@_operator()
def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary position embedding (ONNX RotaryEmbedding-23).

    Args:
        x: [B, H, S, D]. cos, sin: [B, S, D/2], the dtype of x.
        interleaved: pairs are (0, 1), (2, 3), ...; otherwise (0, D/2), (1, D/2+1), ....
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


@_operator()
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis, statistics in float32 (ONNX RMSNormalization-23)."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


@_operator()
def tensor_scatter(cache: Tensor, update: Tensor, write_index: Tensor) -> Tensor:
    """Write new keys or values into a static-capacity cache (ONNX TensorScatter-24, linear mode, axis -2).

    Args:
        cache: [B, H, M, D]. update: [B, H, S, D]. write_index: int64 [B], first slot written per row.

    Returns:
        the updated cache [B, H, M, D]; a runtime may alias it with the input's buffer.
    """
    out = cache.clone()
    for row, start in enumerate(write_index.tolist()):
        out[row, :, start : start + update.shape[2]] = update[row]
    return out


#: a, b, c and d of sin^2(pi t) = CURVE_FACTOR * q * (d - q) for |t| <= 1/2, where q = (((z + a) z + b) z + c) z and
#: z = t^2: q / d is sin^2(pi t / 2), and the rest doubles the angle. Fitted for the smallest relative error of the
#: whole, 9e-8 with rounded coefficients; computed in float32, the whole is off by 3e-7 at most.
CURVE = (-5.929319858551025, 18.04013442993164, -21.93444061279297, -8.889694213867188)
CURVE_FACTOR = 4 / CURVE[-1] ** 2


@_operator()
def anti_aliased_snake(
    x: Tensor, up_even: Tensor, up_odd: Tensor, down_even: Tensor, down_odd: Tensor, rate: Tensor, height: Tensor
) -> Tensor:
    """2x up, u + height / CURVE_FACTOR * sin^2(pi * rate * u), 2x down, in polyphase form.

    The upsampled signal u is never put together: its even samples are one tensor and its odd ones another, so all four
    filters are depthwise convolutions. One op while tracing, because a vocoder holds more than a hundred of them. The
    graph computes the curve from `CURVE`, because ONNX Runtime's own sine knows one thread only.

    Args:
        x: [B, C, 1, T].
        up_even: [C, 1, 1, 7], as are all filters. rate: [C, 1, 1]. height: [C, 1, 1].

    Returns:
        [B, C, 1, T].
    """
    _, even, odd = snake_inputs(x, up_even, up_odd, rate, height)
    return F.conv2d(even, down_even, groups=x.shape[1]) + F.conv2d(odd, down_odd, groups=x.shape[1])


@_operator(lambda x, weight: (*x.shape[:-1], weight.shape[1]))
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] @ weight [in, out] -> [..., out]: one MatMul."""
    return torch.matmul(x, weight)


@_operator(lambda x, heads: (x.shape[0], heads, x.shape[1], x.shape[2] // heads))
def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, S, H*D] -> [B, H, S, D]."""
    # a copy also where one token leaves nothing to move: outputs must not alias inputs
    return x.unflatten(-1, (heads, -1)).transpose(1, 2).clone(memory_format=torch.contiguous_format)


@_operator(lambda x: (x.shape[0], x.shape[2], x.shape[1] * x.shape[3]))
def merge_heads(x: Tensor) -> Tensor:
    """[B, H, S, D] -> [B, S, H*D]."""
    return x.transpose(1, 2).flatten(-2).clone(memory_format=torch.contiguous_format)


def _blocks_shape(x: Tensor, block: int, back: bool = False, ahead: bool = False) -> tuple[int, int, int]:
    return x.shape[0] * (x.shape[1] // block - back), block * (1 + back + ahead), x.shape[2]


@_operator(_blocks_shape)
def split_blocks(x: Tensor, block: int, back: bool = False, ahead: bool = False) -> Tensor:
    """Blocks of a sequence as a batch, each with its neighbours, zeros past the end.

    Args:
        x: [B, T, E], T a multiple of ``block``.
        back: put the block before it in front. The first block is then nothing but the neighbour of the second.
        ahead: put the block after it behind.

    Returns:
        [B*N, block*(1 + back + ahead), E] of the N = T/block blocks, the first left out with ``back``.
    """
    blocks = x.unflatten(1, (-1, block))
    parts = [blocks[:, 1:] if back else blocks]
    if back:
        parts.insert(0, blocks[:, :-1])
    if ahead:
        parts.append(torch.cat((parts[-1][:, 1:], torch.zeros_like(blocks[:, :1])), dim=1))
    return torch.cat(parts, dim=2).flatten(0, 1)


@_operator(lambda x, index, block: (x.shape[0], block, x.shape[2]))
def take_block(x: Tensor, index: Tensor, block: int) -> Tensor:
    """One block of a sequence: [B, T, E], T a multiple of ``block``, and its number int64 [1] -> [B, block, E]."""
    return x.unflatten(1, (-1, block)).index_select(1, index).flatten(1, 2)


@_operator(lambda x, like: like.shape)
def reshape_like(x: Tensor, like: Tensor) -> Tensor:
    """x in the shape of ``like``."""
    return x.reshape(like.shape).clone()


@_operator(lambda x, block: (x.shape[0], (x.shape[1] + block - 1) // block * block, x.shape[2]))
def pad_to_blocks(x: Tensor, block: int) -> Tensor:
    """[B, T, E] -> [B, T', E]: zeros appended until T' is a multiple of ``block``."""
    return F.pad(x, (0, 0, 0, -x.shape[1] % block)).clone()


def _rows_shape(x: Tensor, reach: int) -> tuple[int, int, int, int]:
    late = x.shape[3] // 2
    return x.shape[0], x.shape[1], 2, torch.sym_min(x.shape[3] - late + reach, x.shape[3])


@_operator(_rows_shape)
def split_rows(x: Tensor, reach: int) -> Tensor:
    """[B, C, 1, T] -> [B, C, 2, min(T - T//2 + reach, T)]: the two halves of time as rows that overlap.

    What looks at most ``reach`` to each side gives, row by row, what it gives for the whole, but for the overlap.
    """
    length = min(x.shape[3] - x.shape[3] // 2 + reach, x.shape[3])
    return torch.cat((x[..., :length], x[..., -length:]), dim=2)


@_operator(lambda x, like: (x.shape[0], x.shape[1], 1, like.shape[3]))
def merge_rows(x: Tensor, like: Tensor) -> Tensor:
    """Rows of `split_rows` -> [B, C, 1, T], T of ``like``: what the halves hold without their overlap."""
    late = like.shape[3] // 2
    return torch.cat((x[:, :, :1, : like.shape[3] - late], x[:, :, 1:, -late:]), dim=3)


def snake_inputs(
    x: Tensor, up_even: Tensor, up_odd: Tensor, rate: Tensor, height: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What the convolutions of `anti_aliased_snake` see, each [B, C, 1, T + 6]: up, down_even, down_odd.

    Not for tracing. Past its ends the upsampled signal repeats its first sample, an even one, and its last, an odd one.
    """
    padded = F.pad(x, (3, 3, 0, 0), mode="replicate")
    even, odd = (F.conv2d(padded, up, groups=x.shape[1]) for up in (up_even, up_odd))
    first, last = (end.expand(-1, -1, -1, 3) for end in (even[..., :1], odd[..., -1:]))
    curved = []
    for phase in (even, odd):
        u = torch.cat((first, phase, last), dim=3)
        turned = u * rate
        curve = torch.sin(math.pi * (turned - torch.round(turned))).square() / CURVE_FACTOR
        curved.append(u + height * curve)
    return padded, curved[0], curved[1]
