"""Vision encoder: patches of an image, or of the frames of a video, to one embedding per 2x2 patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops import attention, merge_heads, rotary_embedding, split_heads
from ..weights import ExportModule, Linear
from .layers import GatedMlp, RmsNorm

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


@dataclass(frozen=True)
class _Windows:
    """Where the patches of a frame lie among the slots of its attention windows.

    Attributes:
        slots: int64 [W*window], the patch in each slot, any one where there is none.
        places: int64 [N], the slot of each patch.
        size: slots of a window.
    """

    slots: Tensor
    places: Tensor
    size: int

    def split(self, x: Tensor) -> Tensor:
        """[T, N, E] -> [T*W, window, E]."""
        return x.index_select(1, self.slots).reshape(-1, self.size, x.shape[-1])

    def join(self, x: Tensor, like: Tensor) -> Tensor:
        """[T*W, window, E] -> [T, N, E], T as in ``like``."""
        return x.reshape(like.shape[0], -1, x.shape[-1]).index_select(1, self.places)


class _Attention(ExportModule):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.q = Linear(width, width)
        self.k = Linear(width, width)
        self.v = Linear(width, width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, windows: _Windows | None) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)  # [T, N, E]
        if windows is not None:
            q, k, v = windows.split(q), windows.split(k), windows.split(v)  # [T*W, 64, E]
        q = rotary_embedding(split_heads(q, self.heads), *rope)
        k = rotary_embedding(split_heads(k, self.heads), *rope)
        y = merge_heads(attention(q, k, split_heads(v, self.heads), mask, self.scale))
        return self.proj(y if windows is None else windows.join(y, x))


class _Block(ExportModule):
    def __init__(self, config: VisionEncoderConfig) -> None:
        super().__init__()
        self.norm1 = RmsNorm(config.width, EPS)
        self.norm2 = RmsNorm(config.width, EPS)
        self.attn = _Attention(config.width, config.num_heads)
        self.mlp = GatedMlp(config.width, config.ffn, bias=True)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, windows: _Windows | None) -> Tensor:
        x = x + self.attn(self.norm1(x), rope, mask, windows)
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


class VisionEncoder(ExportModule):
    """Windowed vision transformer (transformers: Qwen2_5OmniVisionEncoder), one image or one video a call.

    Patches travel in the order they come in, of which four make a unit that is merged. They are put into windows,
    padded to full ones, for attention alone: everything else costs as much as there are patches. The few
    full-attention layers see a whole frame.
    """

    prefix = "thinker.visual."
    inv_freq: Tensor

    def __init__(self, config: VisionEncoderConfig) -> None:
        super().__init__()
        self.patch_embed = _PatchEmbed(config.patch_values, config.width)
        self.blocks = nn.ModuleList([_Block(config) for _ in range(config.num_layers)])
        self.merger = _Merger(config)
        self.full = frozenset(config.full_attention_layers)
        self.window = config.window_patches
        quarter = config.width // config.num_heads // 2
        half = torch.arange(0, quarter, 2, dtype=torch.float, device="cpu") / quarter
        self.constant("inv_freq", 1.0 / (config.rope_theta**half))

    def forward(self, patches: Tensor, grid_hw: Tensor, window_index: Tensor, window_valid: Tensor) -> Tensor:
        """patches: float32 [T, N, 1176], grid_hw: int64 [N, 2] row and column of each patch, window_index: int64 [W*64]
        patch in each window slot (N where unused), window_valid: bool [W, 64] -> float32 [T*N/4, output]."""
        frames, count = patches.shape[0], patches.shape[1]
        x = self.patch_embed(patches.to(self.patch_embed.proj.weight.dtype))  # [T, N, E]
        windows = _Windows(torch.clamp(window_index, max=count - 1), self._places(window_index, count), self.window)

        # Row frequencies, then column frequencies: [N, D/2]
        angle = (grid_hw.float().unsqueeze(-1) * self.inv_freq).flatten(1)
        cos, sin = (part.to(x.dtype).expand(frames, -1, -1) for part in (angle.cos(), angle.sin()))
        by_window = (windows.split(cos), windows.split(sin))
        everywhere = (grid_hw[:, 0] >= 0)[None, None, None, :].expand(frames, 1, count, -1)
        window_mask = window_valid[None, :, None, None, :].expand(frames, -1, -1, self.window, -1).flatten(0, 1)

        for index, block in enumerate(self.blocks):
            if index in self.full:
                x = block(x, (cos, sin), everywhere, None)
            else:
                x = block(x, by_window, window_mask, windows)
        return self.merger(x).flatten(0, 1).float()

    def _places(self, window_index: Tensor, count: int) -> Tensor:
        """The slot of each patch: int64 [N]."""
        slot = torch.arange(window_index.shape[0], device=window_index.device)
        # Unused slots all land on one extra entry, which is cut off.
        order = torch.zeros(count + 1, dtype=torch.int64, device=window_index.device)
        return order.scatter(0, window_index, slot)[:count]
