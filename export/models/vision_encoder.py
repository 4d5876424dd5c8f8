"""Vision encoder: turns patches of images or video frames into one embedding per 2x2 patches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from omniport.runtime.backends.base import Graph
from omniport.runtime.bundle.graph_spec import DimRange, TensorSpec
from omniport.runtime.bundle.parts import PARTS
from omniport.runtime.media.image import VisionInput, image_input, video_input
from torch import Tensor, nn

from ..checkpoint.frontends import vision_frontend
from .layers import GatedMlp, RmsNorm, inverse_frequencies
from .module import Context, ExportModule, Linear, Stack
from .ops import attention, merge_heads, rotary_embedding, split_heads
from .part import (
    Array,
    Asked,
    Case,
    GraphDefinition,
    ModelPart,
    ReferenceModule,
    Settings,
    Subject,
    f32,
    i64,
    largest,
    qwen_module,
)
from .signals import generator, picture

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
    """Where windows lie in the raster: the gather into padded windows, and the one back.

    Attributes:
        slots: int64 [W*64], the patch in each window slot; some patch where none is. order: int64 [N], each patch's
            slot. mask: bool [T*W, 1, 64, 64]. size: slots of a window.
    """

    slots: Tensor
    order: Tensor
    mask: Tensor
    size: int

    def split(self, x: Tensor) -> Tensor:
        """[T, N, E] -> [T*W, 64, E]."""
        return x.index_select(1, self.slots).reshape(-1, self.size, x.shape[-1])

    def join(self, x: Tensor, frames: int) -> Tensor:
        """[T*W, 64, E] -> [T, N, E]."""
        return x.reshape(frames, -1, x.shape[-1]).index_select(1, self.order)


class _Attention(ExportModule):
    """Attention within windows, or among all patches of a frame.

    Only attention itself sees padded windows: everything around it runs on the patches that there are, and attention
    among all of a frame needs no mask.
    """

    def __init__(self, width: int, heads: int, full: bool) -> None:
        super().__init__()
        self.heads, self.full = heads, full
        self.scale = (width // heads) ** -0.5
        self.q = Linear(width, width)
        self.k = Linear(width, width)
        self.v = Linear(width, width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], windows: _Windows) -> Tensor:
        # x: [T, N, E]; rope: [T, N, D/2], of windows [T*W, 64, D/2]
        q, k, v = self.q(x), self.k(x), self.v(x)
        if not self.full:
            q, k, v = windows.split(q), windows.split(k), windows.split(v)
        q = rotary_embedding(split_heads(q, self.heads), *rope)
        k = rotary_embedding(split_heads(k, self.heads), *rope)
        y = attention(q, k, split_heads(v, self.heads), None if self.full else windows.mask, self.scale)
        y = merge_heads(y)
        return self.proj(y if self.full else windows.join(y, x.shape[0]))


class _Block(ExportModule):
    def __init__(self, config: VisionEncoderConfig, full: bool) -> None:
        super().__init__()
        self.norm1 = RmsNorm(config.width, EPS)
        self.norm2 = RmsNorm(config.width, EPS)
        self.attn = _Attention(config.width, config.num_heads, full)
        self.mlp = GatedMlp(config.width, config.ffn, bias=True)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], windows: _Windows) -> Tensor:
        x = x + self.attn(self.norm1(x), rope, windows)
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

    Patches stay in raster order and go into padded windows, a batch row each, for the windowed layers' attention only.
    """

    prefix = "thinker.visual."
    inv_freq: Tensor

    def __init__(self, config: VisionEncoderConfig) -> None:
        super().__init__()
        full = frozenset(config.full_attention_layers)
        self.patch_embed = _PatchEmbed(config.patch_values, config.width)
        self.blocks = nn.ModuleList([_Block(config, i in full) for i in range(config.num_layers)])
        self.merger = _Merger(config)
        self.full = full
        self.window, self.unit = config.window_patches, config.merge**2
        self.constant("inv_freq", inverse_frequencies(config.width // config.num_heads // 2, config.rope_theta))

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
        x = self.patch_embed(patches.to(self.patch_embed.proj.weight.dtype))  # [T, N, E]
        mask = window_valid[None, :, None, None, :].expand(frames, -1, -1, self.window, -1).flatten(0, 1)
        slots = torch.clamp(window_index, max=count - 1)
        windows = _Windows(slots, self._slot_of_patch(window_index, count), mask, self.window)

        # Row frequencies, then column frequencies: [N, D/2]
        angle = (grid_hw.float().unsqueeze(-1) * self.inv_freq).flatten(1)
        cos, sin = (t.to(x.dtype).expand(frames, -1, -1) for t in (angle.cos(), angle.sin()))
        by_window = (windows.split(cos), windows.split(sin))
        return x, ((cos, sin), by_window, (windows.slots, windows.order, windows.mask))

    def run_layer(self, index: int, x: Tensor, context: Context) -> Tensor:
        by_frame, by_window, (slots, order, mask) = context
        rope = by_frame if index in self.full else by_window
        return self.blocks[index](x, rope, _Windows(slots, order, mask, self.window))

    def leave(self, x: Tensor, context: Context) -> Tensor:
        return self.merger(x).flatten(0, 1).float()

    def _slot_of_patch(self, window_index: Tensor, count: int) -> Tensor:
        """For each patch of the frame, in raster order, its place among the window slots: int64 [N].

        The patches of a merged unit lie side by side in both orders, so that units are inverted and not patches."""
        first = window_index.unflatten(0, (-1, self.unit))[:, 0]  # N where unused
        place = torch.arange(first.shape[0], device=first.device)
        # Unused slots all land on one extra entry, which is cut off. The table has an entry for each patch, because a
        # division by the unit would be exported with an Equal of BOOL, which TensorRT documents for none.
        table = torch.zeros(count + 1, dtype=torch.int64, device=first.device).scatter(0, first, place)
        start = table[:count].unflatten(0, (-1, self.unit))[:, 0] * self.unit
        return (start[:, None] + torch.arange(self.unit, device=first.device)).flatten()


def _define(config: Any, settings: Settings) -> GraphDefinition:
    c = config.thinker_config.vision_config
    window = c.window_size // c.patch_size // c.spatial_merge_size * c.spatial_merge_size
    sizes = VisionEncoderConfig(
        patch_values=c.in_channels * c.temporal_patch_size * c.patch_size**2,
        width=c.hidden_size,
        num_layers=c.depth,
        num_heads=c.num_heads,
        ffn=c.intermediate_size,
        output_size=c.out_hidden_size,
        merge=c.spatial_merge_size,
        window_patches=window**2,
        full_attention_layers=tuple(c.fullatt_block_indexes),
        rope_theta=float(c.rope_parameters["rope_theta"]),
    )
    unit, slots = sizes.merge**2, sizes.window_patches
    return GraphDefinition(
        name=PART.name,
        precision=settings.precision,
        geometry=repr(sizes),
        build=lambda: VisionEncoder(sizes),
        inputs=(
            f32("patches", "frames", f"{unit}*units", sizes.patch_values),
            i64("grid_hw", f"{unit}*units", 2),
            i64("window_index", f"{slots}*windows"),
            TensorSpec("window_valid", "bool", ("windows", slots)),
        ),
        outputs=(f32("embeds", "tokens", sizes.output_size),),
        dims={
            "frames": DimRange(1, 1, 384),
            "units": DimRange(1, 256, 16384),
            "windows": DimRange(1, 16, 1200),
            "tokens": DimRange(1, 256, 32768),
        },
    )


def vision_case(name: str, vision: VisionInput) -> Case:
    """One image or one video."""

    def ours(graph: Graph) -> Array:
        feeds: dict[str, Array] = {
            "patches": vision.patches,
            "grid_hw": vision.grid_hw,
            "window_index": vision.window_index,
            "window_valid": vision.window_valid,
        }
        return graph.run(feeds)["embeds"]

    return Case(PART.name, name, ours, _asked(vision), (vision.patches, np.array(vision.grid_thw)))


def _asked(vision: VisionInput) -> Asked:
    def run(module: nn.Module) -> Tensor:
        patches = torch.from_numpy(vision.patches).flatten(0, 1)
        return torch.as_tensor(module(patches, grid_thw=torch.tensor([vision.grid_thw])).pooler_output)

    return run


def _cases(subject: Subject) -> Iterator[Case]:
    manifest, rng = subject.bundle.manifest, generator("pixels")
    frontend, typical = manifest.vision, manifest.graphs[PART.name].dims["units"].opt
    unit = frontend.patch_size * frontend.merge_size
    for height, width in ((unit, unit), (210, 87)):
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        yield vision_case(f"{height}x{width} noise", image_input(noise, frontend))
    sizes = [(112, 112), (252, 336), (61, 230)]
    if subject.full:
        # the reference's attention is dense: pictures of 12 megapixels, which the spec allows, are out of its reach
        squares = [unit * math.isqrt(count) for count in (typical, *largest(subject, PART.name, "units", 1024))]
        sizes += [(620, 413), (56, 1008), *((side, side) for side in squares)]
    for height, width in sizes:
        yield vision_case(f"{height}x{width} picture", image_input(picture(height, width), frontend))
    for count in (4, *((10,) if subject.full else ())):
        clip = np.stack([picture(96, 132, i / count) for i in range(count)])
        yield vision_case(f"video of {count} frames", video_input(clip, frontend))


PART: ModelPart = ModelPart(
    PARTS["vision_encoder"],
    define=_define,
    reference=ReferenceModule(
        qwen_module("Qwen2_5OmniVisionEncoder", "thinker_config.vision_config"), VisionEncoder.prefix
    ),
    cases=_cases,
    describe=lambda ckpt, _: {"vision": vision_frontend(ckpt)},
    ask=lambda given, _bundle, _ckpt: _asked(given["vision"]),
)
