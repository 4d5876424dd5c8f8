"""Vision encoder: patches of an image, or of the frames of a video, to one embedding per 2x2 patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops import attention, merge_heads, rotary_embedding, split_heads
from ..weights import ExportModule, Linear
from .layers import GatedMlp, RmsNorm
from .stack import Context, Stack

__all__ = ["VisionEncoder", "VisionEncoderConfig"]

EPS = 1e-6  # the reference fixes the vision norms' epsilon


@dataclass(frozen=True)
class VisionEncoderConfig:
    """Sizes of the vision encoder."""

    patch_values: int
    """numbers in one patch: channels * temporal patch * patch * patch"""
    width: int
    num_layers: int
    num_heads: int
    ffn: int
    output_size: int
    merge: int
    window_patches: int
    """patches in a full attention window"""
    full_attention_layers: tuple[int, ...]
    rope_theta: float


class _Attention(ExportModule):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.q = Linear(width, width)
        self.k = Linear(width, width)
        self.v = Linear(width, width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        q = rotary_embedding(split_heads(self.q(x), self.heads), *rope)
        k = rotary_embedding(split_heads(self.k(x), self.heads), *rope)
        return self.proj(merge_heads(attention(q, k, split_heads(self.v(x), self.heads), mask, self.scale)))


class _Block(ExportModule):
    def __init__(self, config: VisionEncoderConfig) -> None:
        super().__init__()
        self.norm1 = RmsNorm(config.width, EPS)
        self.norm2 = RmsNorm(config.width, EPS)
        self.attn = _Attention(config.width, config.num_heads)
        self.mlp = GatedMlp(config.width, config.ffn, bias=True)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), rope, mask)
        return x + self.mlp(self.norm2(x))


class _PatchEmbed(ExportModule):
    """The reference's Conv3d whose kernel is its stride: one matrix product over the flattened patch."""

    def __init__(self, patch_values: int, width: int) -> None:
        super().__init__()
        self.proj = Linear(patch_values, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class _Merger(ExportModule):
    """2x2 patches to one embedding of the thinker's width."""

    def __init__(self, config: VisionEncoderConfig) -> None:
        super().__init__()
        inner = config.width * config.merge**2
        self.ln_q = RmsNorm(config.width, EPS)
        self.mlp = nn.ModuleList([Linear(inner, inner), nn.GELU(), Linear(inner, config.output_size)])
        self.unit = config.merge**2

    def forward(self, x: Tensor) -> Tensor:
        # x: [T, P, E] -> [T, P/4, output]
        x = self.ln_q(x).unflatten(1, (-1, self.unit)).flatten(-2)
        for layer in self.mlp:
            x = layer(x)
        return x


class VisionEncoder(Stack):
    """Windowed vision transformer (transformers: Qwen2_5OmniVisionEncoder), one image or one video a call.

    Patches travel in window order, padded to full windows, through all layers: a window is a batch row, and the few
    full-attention layers see all windows of a frame at once with the padding masked.
    """

    prefix = "thinker.visual."
    inv_freq: Tensor

    def __init__(self, config: VisionEncoderConfig) -> None:
        super().__init__()
        self.patch_embed = _PatchEmbed(config.patch_values, config.width)
        self.blocks = nn.ModuleList([_Block(config) for _ in range(config.num_layers)])
        self.merger = _Merger(config)
        self.full = frozenset(config.full_attention_layers)
        self.window, self.unit = config.window_patches, config.merge**2
        quarter = config.width // config.num_heads // 2
        half = torch.arange(0, quarter, 2, dtype=torch.float, device="cpu") / quarter
        self.constant("inv_freq", 1.0 / (config.rope_theta**half))

    def forward(self, patches: Tensor, grid_hw: Tensor, window_index: Tensor, window_valid: Tensor) -> Tensor:
        """patches: float32 [T, N, 1176], grid_hw: int64 [N, 2] row and column of each patch, window_index: int64 [W*64]
        patch in each window slot (N where unused), window_valid: bool [W, 64] -> float32 [T*N/4, output]."""
        x, context = self.enter(patches, grid_hw, window_index, window_valid)
        return self.leave(self.run_layers(x, context), context)

    @property
    def depth(self) -> int:
        return len(self.blocks)

    def enter(self, *inputs: Tensor) -> tuple[Tensor, Context]:
        patches, grid_hw, window_index, window_valid = inputs
        frames, count = patches.shape[0], patches.shape[1]
        windows, window = window_valid.shape[0], self.window
        slots = torch.clamp(window_index, max=count - 1)
        x = self.patch_embed(patches.index_select(1, slots).to(self.patch_embed.proj.weight.dtype))  # [T, P, E]

        # Row frequencies, then column frequencies: [P, D/2]
        angle = (grid_hw.index_select(0, slots).float().unsqueeze(-1) * self.inv_freq).flatten(1)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        by_frame = (cos.expand(frames, -1, -1), sin.expand(frames, -1, -1))
        by_window = (self._windows(by_frame[0]), self._windows(by_frame[1]))
        frame_mask = window_valid.reshape(1, 1, 1, -1).expand(frames, 1, windows * window, -1)
        window_mask = window_valid[None, :, None, None, :].expand(frames, -1, -1, window, -1).flatten(0, 1)
        return x, (by_frame, frame_mask, by_window, window_mask, window_index, count)

    def run_layer(self, index: int, x: Tensor, context: Context) -> Tensor:
        by_frame, frame_mask, by_window, window_mask = context[:4]
        if index in self.full:
            return self.blocks[index](x, by_frame, frame_mask)
        return self.blocks[index](self._windows(x), by_window, window_mask).reshape(x.shape[0], x.shape[1], -1)

    def leave(self, x: Tensor, context: Context) -> Tensor:
        window_index, count = context[4:]
        merged = self.merger(x)  # [T, P/4, output], window order
        return merged.index_select(1, self._raster_order(window_index, count)).flatten(0, 1).float()

    def _windows(self, x: Tensor) -> Tensor:
        """[T, W*64, E] -> [T*W, 64, E]."""
        return x.reshape(-1, self.window, x.shape[-1])

    def _raster_order(self, window_index: Tensor, count: int) -> Tensor:
        """For each merged unit of the frame, in raster order, its place among the window slots: int64 [N/4]."""
        unit = window_index.unflatten(0, (-1, self.unit))[:, 0] // self.unit  # N/4 where unused
        place = torch.arange(unit.shape[0], device=unit.device)
        # Unused slots all land on one extra entry, which is cut off.
        order = torch.zeros(count // self.unit + 1, dtype=torch.int64, device=unit.device)
        return order.scatter(0, unit, place)[: count // self.unit]
