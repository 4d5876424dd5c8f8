"""Layers that several model parts share.

Shapes: B batch, S new tokens, L live cache length, M cache capacity, H heads, D head width, E width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .module import ExportModule, Linear
from .ops import attention, merge_heads, rms_norm, rotary_embedding, split_heads, tensor_scatter
from .stack import Context, Stack


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder stack (thinker or talker), and the form of its KV cache (`KvSpec.form`)."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float
    mrope_section: tuple[int, ...]
    rms_norm_eps: float
    kv_form: str = "static"


class RmsNorm(ExportModule):
    """Root-mean-square norm with float32 statistics."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(ExportModule):
    """Layer norm with weight and bias."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class GatedMlp(ExportModule):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = Linear(width, inner, bias)
        self.up_proj = Linear(width, inner, bias)
        self.down_proj = Linear(inner, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _CachedAttention(ExportModule):
    """Grouped-query self-attention over a cache. q, k, v have biases, the output has none (Qwen2)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.scale = config.head_dim**-0.5
        self.grows = config.kv_form == "concat"
        self.q_proj = Linear(config.hidden_size, config.num_heads * config.head_dim)
        self.k_proj = Linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.v_proj = Linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.o_proj = Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, write_index: Tensor, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        # q: [B, H, S, D]; k, v: [B, Hkv, S, D]
        q = rotary_embedding(split_heads(self.q_proj(x), self.heads), *rope)
        k = rotary_embedding(split_heads(self.k_proj(x), self.kv_heads), *rope)
        v = split_heads(self.v_proj(x), self.kv_heads)
        if self.grows:
            key, value = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
            return self.o_proj(merge_heads(attention(q, key, value, mask, self.scale))), key, value
        key = tensor_scatter(past[0], k, write_index)
        value = tensor_scatter(past[1], v, write_index)
        # Attention must not see the cache's unused slots: the live length is the mask's last dimension.
        live = mask.shape[-1]
        y = attention(q, key[:, :, :live], value[:, :, :live], mask, self.scale)
        return self.o_proj(merge_heads(y)), key, value


class _DecoderLayer(ExportModule):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = _CachedAttention(config)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMlp(config.hidden_size, config.intermediate_size, bias=False)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, write_index: Tensor, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, key, value = self.self_attn(self.input_layernorm(x), rope, mask, write_index, past)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), key, value


class _MultimodalRope(ExportModule):
    """cos and sin of TMRoPE: frequency i turns with the time, height or width position that its section names."""

    inv_freq: Tensor
    axis: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        half = torch.arange(0, config.head_dim, 2, dtype=torch.float, device="cpu") / config.head_dim
        axis = [i % 3 for i, n in enumerate(config.mrope_section) for _ in range(n)]
        self.constant("inv_freq", 1.0 / (config.rope_theta**half))
        self.constant("axis", torch.tensor(axis, dtype=torch.int64, device="cpu"))

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # position_ids: [3, B, S] -> angle: [B, S, D/2]
        position = position_ids.float().index_select(0, self.axis)
        angle = position.permute(1, 2, 0) * self.inv_freq
        return angle.cos().to(dtype), angle.sin().to(dtype)


class Decoder(Stack):
    """Qwen2 decoder stack with TMRoPE over KV caches (transformers: Qwen2_5OmniThinkerTextModel, TalkerModel)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_DecoderLayer(config) for _ in range(config.num_layers)])
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.rope = _MultimodalRope(config)

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        kv_positions: Tensor,
        write_index: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """x: [B, S, E], past: key and value of every layer [B, Hkv, M, D] -> hidden
        after the final norm [B, S, E], and the caches with the new tokens written.

        In the concat form, past is [B, Hkv, L - S, D] and comes back as [B, Hkv, L, D]."""
        x, context = self.enter(x, position_ids, kv_positions, write_index, past)
        x = self.run_layers(x, context)
        return self.leave(x, context), context[-1]

    @property
    def depth(self) -> int:
        return len(self.layers)

    def enter(self, *inputs: Any) -> tuple[Tensor, Context]:
        """As ``forward``; the context ends with the caches: those of a layer are replaced when it has run."""
        x, position_ids, kv_positions, write_index, past = inputs
        rope = self.rope(position_ids, x.dtype)
        row = write_index[:, None] + torch.arange(x.shape[1], device=x.device)
        mask = (kv_positions[None, None, :] <= row[:, :, None]).unsqueeze(1)  # [B, 1, S, L]
        return x, (rope, mask, write_index, list(past))

    def run_layer(self, index: int, x: Tensor, context: Context) -> Tensor:
        rope, mask, write_index, caches = context
        past = (caches[2 * index], caches[2 * index + 1])
        x, caches[2 * index], caches[2 * index + 1] = self.layers[index](x, rope, mask, write_index, past)
        return x

    def leave(self, x: Tensor, context: Context) -> Tensor:
        return self.norm(x)
