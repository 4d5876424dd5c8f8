"""Audio encoder: turns log-mel chunks of two seconds into one embedding per 40 ms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from omniport.runtime.backends.base import Graph
from omniport.runtime.bundle.graph_spec import DimRange
from omniport.runtime.bundle.manifest import Manifest
from omniport.runtime.bundle.parts import PARTS
from omniport.runtime.media.log_mel import audio_tokens, chunk_mel, log_mel
from torch import Tensor, nn

from ..checkpoint.frontends import audio_frontend
from .layers import LayerNorm
from .module import Context, ExportModule, Linear, Stack
from .ops import attention, merge_heads, split_heads
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
from .signals import generator, voice


@dataclass(frozen=True)
class AudioEncoderConfig:
    """Sizes of the audio encoder."""

    n_mels: int
    width: int
    num_layers: int
    num_heads: int
    ffn: int
    output_size: int
    chunk_frames: int


class GeluConv(ExportModule):
    """A convolution of three taps, and GELU."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in, 3))
        self.bias = nn.Parameter(torch.empty(n_out))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.convolve(x))

    def convolve(self, x: Tensor) -> Tensor:
        """What comes before GELU."""
        return F.conv1d(x, self.weight, self.bias, stride=self.stride, padding=1)


class _SelfAttention(ExportModule):
    """Bidirectional attention inside one chunk. Whisper's k projection has no bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, width, bias=False)
        self.v_proj = Linear(width, width)
        self.out_proj = Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(merge_heads(attention(q, k, v, mask, self.scale)))


class _EncoderLayer(ExportModule):
    def __init__(self, config: AudioEncoderConfig) -> None:
        super().__init__()
        self.self_attn_layer_norm = LayerNorm(config.width)
        self.self_attn = _SelfAttention(config.width, config.num_heads)
        self.final_layer_norm = LayerNorm(config.width)
        self.fc1 = Linear(config.width, config.ffn)
        self.fc2 = Linear(config.ffn, config.width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x), mask)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


def _sinusoids(length: int, width: int) -> Tensor:
    """Whisper's position table [length, width]."""
    step = np.log(10000) / (width // 2 - 1)
    inverse = torch.exp(-step * torch.arange(width // 2, device="cpu").float())
    angle = torch.arange(length, device="cpu")[:, None] * inverse[None, :]
    return torch.cat((angle.sin(), angle.cos()), dim=1)


class AudioEncoder(Stack):
    """Whisper-style encoder over a batch of chunks (transformers: Qwen2_5OmniAudioEncoder).

    Attention never crosses a chunk, so a clip is a batch of chunks and one chunk at a time gives the same result.
    """

    prefix = "thinker.audio_tower."
    positions: Tensor

    def __init__(self, config: AudioEncoderConfig) -> None:
        super().__init__()
        self.conv1 = GeluConv(config.n_mels, config.width, stride=1)
        self.conv2 = GeluConv(config.width, config.width, stride=2)
        self.constant("positions", _sinusoids(config.chunk_frames // 2, config.width), follow=True)
        self.layers = nn.ModuleList([_EncoderLayer(config) for _ in range(config.num_layers)])
        self.ln_post = LayerNorm(config.width)
        self.proj = Linear(config.width, config.output_size)

    def forward(self, mel: Tensor, frames: Tensor) -> Tensor:
        """mel: float32 [C, n_mels, 200], frames: int64 [C] valid mel frames -> float32 [C, 50, output_size].

        Rows past the clip's end hold no meaning; the caller keeps the valid ones.
        """
        x, context = self.enter(mel, frames)
        return self.leave(self.run_layers(x, context), context)

    @property
    def depth(self) -> int:
        return len(self.layers)

    def enter(self, *inputs: Tensor) -> tuple[Tensor, Context]:
        mel, frames = inputs
        # Padding must be zero before each convolution, or its neighbours would see it.
        frame = torch.arange(mel.shape[2], device=mel.device)
        valid = (frame[None, :] < frames[:, None]).unsqueeze(1).to(self.proj.weight.dtype)  # [C, 1, 200]
        x = self.conv1(mel.to(valid.dtype) * valid) * valid
        x = self.conv2(x).transpose(1, 2) + self.positions  # [C, 100, E]
        # ceil(frames / 2) positions are real; slot 0 is always attended so that an empty chunk stays finite.
        slot = torch.arange(x.shape[1], device=mel.device)
        mask = ((2 * slot[None, :] < frames[:, None]) | (slot[None, :] == 0))[:, None, None, :]
        mask = mask.expand(-1, 1, x.shape[1], -1)
        return x, (mask,)

    def run_layer(self, index: int, x: Tensor, context: Context) -> Tensor:
        return self.layers[index](x, *context)

    def leave(self, x: Tensor, context: Context) -> Tensor:
        x = x.unflatten(1, (-1, 2))
        x = (x[:, :, 0] + x[:, :, 1]) / 2
        return self.proj(self.ln_post(x)).float()


def _define(config: Any, settings: Settings) -> GraphDefinition:
    c = config.thinker_config.audio_config
    sizes = AudioEncoderConfig(
        n_mels=c.num_mel_bins,
        width=c.d_model,
        num_layers=c.encoder_layers,
        num_heads=c.encoder_attention_heads,
        ffn=c.encoder_ffn_dim,
        output_size=c.output_dim,
        chunk_frames=c.n_window * 2,
    )
    frames = sizes.chunk_frames
    return GraphDefinition(
        name=PART.name,
        precision=settings.precision,
        geometry=repr(sizes),
        build=lambda: AudioEncoder(sizes),
        inputs=(f32("mel", "chunks", sizes.n_mels, frames), i64("frames", "chunks")),
        outputs=(f32("embeds", "chunks", frames // 4, sizes.output_size),),
        dims={"chunks": DimRange(1, 1, 150)},
    )


def audio_case(name: str, samples: NDArray[np.float32], manifest: Manifest) -> Case:
    """16 kHz samples through log-mel and the encoder, padding rows dropped."""
    mel = log_mel(samples, manifest.audio)

    def ours(graph: Graph) -> Array:
        chunks, frames = chunk_mel(mel, manifest.audio)
        rows = graph.run({"mel": chunks, "frames": frames})["embeds"]
        return rows.reshape(-1, rows.shape[-1])[: audio_tokens(mel.shape[1])]

    return Case(PART.name, name, ours, _asked(mel), (mel,))


def _asked(mel: NDArray[np.float32]) -> Asked:
    """The reference over a whole clip, float32 [n_mels, T]."""

    def run(module: nn.Module) -> Tensor:
        output = module(input_features=torch.from_numpy(mel), feature_lens=torch.tensor([mel.shape[1]]))
        return torch.as_tensor(output.last_hidden_state)

    return run


def _cases(subject: Subject) -> Iterator[Case]:
    manifest = subject.bundle.manifest
    for seconds in (0.31, 2.0, *((13.37,) if subject.full else ())):
        noise = 0.1 * generator(f"noise {seconds}").standard_normal(int(16000 * seconds))
        yield audio_case(f"{seconds:g} s of noise", noise.astype(np.float32), manifest)
    chunk = manifest.audio.chunk_frames * manifest.audio.hop_length / manifest.audio.sampling_rate
    # the reference's attention is dense: minutes of sound, which the spec allows, are out of its reach
    for seconds in (*(chunk * count for count in largest(subject, PART.name, "chunks", 15)), 0.05, chunk, 5.03):
        yield audio_case(f"{seconds:g} s of voice", voice(seconds), manifest)


PART: ModelPart = ModelPart(
    PARTS["audio_encoder"],
    define=_define,
    reference=ReferenceModule(
        qwen_module("Qwen2_5OmniAudioEncoder", "thinker_config.audio_config"),
        AudioEncoder.prefix,
        unused=("audio_bos_eos_token",),
    ),
    cases=_cases,
    describe=lambda ckpt, _: {"audio": audio_frontend(ckpt)},
    ask=lambda given, _bundle, _ckpt: _asked(given["mel"]),
)
