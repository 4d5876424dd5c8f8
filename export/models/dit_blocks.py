"""Transformer blocks of the DiT: attention among blocks of mel frames, feed-forward, AdaLN modulations by table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dit_tables import layer_table, table_keys
from .module import Compute, ExportModule, Linear
from .ops import attention, merge_heads, reshape_like, rotary_embedding, split_blocks, split_heads, take_block

#: of mel frames: cos and sin of their rotation [B, T, D/2], and 1 for those that are real [B, T, 1]
Frames = tuple[Tensor, Tensor, Tensor]

EPS = 1e-6  # the reference fixes the layer norms' epsilon


@dataclass(frozen=True)
class DitConfig:
    """Sizes of the DiT, and what is folded into its graph."""

    mel_dim: int
    width: int
    num_layers: int
    num_heads: int
    head_dim: int
    ff_mult: int
    block_size: int
    look_ahead_layers: tuple[int, ...]
    look_backward_layers: tuple[int, ...]
    repeats: int
    num_embeds: int
    code_width: int
    speaker_dim: int
    reference_dim: int
    rope_theta: float
    times: tuple[float, ...]
    """time points at which the graph can be evaluated (SolverSpec.table)"""
    guidance_scale: float

    @property
    def past_layers(self) -> tuple[int, ...]:
        """Layers that look back, in order: their keys and values outlive a call."""
        return tuple(sorted(set(self.look_backward_layers)))


class _BlockAttention(ExportModule):
    """Attention among blocks of mel frames: each block sees itself, some layers one block back or ahead.

    Equal to the reference's dense attention under a block mask, at a cost linear in the number of blocks. The first
    block may have one before it that was computed earlier, whose key and value are then given.
    """

    def __init__(self, config: DitConfig, back: bool, ahead: bool) -> None:
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.heads, self.head_dim, self.block = config.num_heads, config.head_dim, config.block_size
        self.scale = config.head_dim**-0.5
        self.back, self.ahead = back, ahead
        self.to_q = Linear(config.width, inner)
        self.to_k = Linear(config.width, inner)
        self.to_v = Linear(config.width, inner)
        self.to_out = nn.ModuleList([Linear(inner, config.width)])

    def forward(self, x: Tensor, own: Frames, led: Frames, keep: Tensor, past: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """x: [B, T, E] with T a multiple of the block; own: of its frames; led: with those of the block before.

        A layer that looks back gets key and value of that block, [B, block, E], not yet rotated, in ``past``, and
        gives those of block ``keep`` beside its result.
        """
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        present = tuple(take_block(t, keep, self.block) for t in (k, v)) if self.back else ()
        if self.back:
            k, v = torch.cat((past[0], k), dim=1), torch.cat((past[1], v), dim=1)
        cos, sin, valid = led if self.back else own
        flat, q, k = q, self._rotate(q, *own[:2]), self._rotate(k, cos, sin)
        q = split_heads(split_blocks(q, self.block), self.heads)  # [B*N, H, block, D]
        k, v, seen = (split_blocks(t, self.block, self.back, self.ahead) for t in (k, v, valid))  # [B*N, L, ...]
        k, v = split_heads(k, self.heads), split_heads(v, self.heads)
        mask = (seen > 0).transpose(1, 2).unsqueeze(1).expand(-1, 1, self.block, -1)  # [B*N, 1, block, L]
        y = self.to_out[0](reshape_like(merge_heads(attention(q, k, v, mask, self.scale)), flat))
        return y, *present

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # The released weights were trained with rotation on the first head only.
        first = rotary_embedding(x[:, None, :, : self.head_dim], cos, sin, interleaved=True)
        return torch.cat((first.squeeze(1), x[..., self.head_dim :]), dim=-1)


class _Feedforward(ExportModule):
    def __init__(self, width: int, mult: int) -> None:
        super().__init__()
        # Index 3 is where the checkpoint keeps the second projection (1 is GELU, 2 a dropout).
        self.ff = nn.ModuleDict({"0": Linear(width, width * mult), "3": Linear(width * mult, width)})

    def forward(self, x: Tensor) -> Tensor:
        return self.ff["3"](F.gelu(self.ff["0"](x), approximate="tanh"))


class DitBlock(ExportModule):
    """One layer of the DiT."""

    modulation: Tensor

    def __init__(self, config: DitConfig, layer: int, prefix: str) -> None:
        super().__init__()
        self.attn = _BlockAttention(
            config, back=layer in config.look_backward_layers, ahead=layer in config.look_ahead_layers
        )
        self.ff = _Feedforward(config.width, config.ff_mult)
        self.width = config.width
        keys = table_keys(prefix, f"transformer_blocks.{layer}.attn_norm.linear")
        rule = Compute(keys, partial(layer_table, prefix=prefix, layer=layer, times=config.times))
        self.computed("modulation", (len(config.times), 6, config.width), rule)

    def forward(
        self, x: Tensor, step: Tensor, own: Frames, led: Frames, keep: Tensor, past: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """As the attention, at time point ``step``."""
        table = self.modulation.index_select(0, step)[0].to(x.dtype)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = table.unbind(0)
        y, *present = self.attn(F.layer_norm(x, (self.width,), scale, shift, EPS), own, led, keep, past)
        x = x + gate * y
        return x + mlp_gate * self.ff(F.layer_norm(x, (self.width,), mlp_scale, mlp_shift, EPS)), *present
