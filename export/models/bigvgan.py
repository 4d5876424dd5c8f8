"""BigVGAN: the vocoder, which turns mel frames into samples."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from omniport.runtime.bundle.graph_spec import DimRange
from omniport.runtime.bundle.manifest import VocoderGeometry
from omniport.runtime.bundle.parts import PARTS
from torch import Tensor, nn

from .module import Compute, Context, ExportModule, Stack, WeightReader
from .ops import CURVE_FACTOR, anti_aliased_snake, merge_rows, split_rows
from .part import Asked, Case, GraphDefinition, ModelPart, ReferenceModule, Settings, Subject, f32, largest, qwen_module
from .signals import generator
from .speakers import load_speakers, spoken_mel

TAPS = 12
#: samples to each side that an anti-aliased activation looks at: three to interpolate, three to decimate
_ACTIVATION_REACH = 6
#: ONNX Runtime hands a blocked convolution to threads by rows and by 64 output channels, so that one row of few
#: channels keeps one thread busy. Layers of at most so many channels compute the two halves of time as rows, ...
_ROWS_BELOW = 192
#: ... where a convolution takes so many products for each mel frame and tap: below, a second thread is no gain
_ROWS_FROM = 100_000
MIN_DB = -115.0
REFERENCE_DB = 20.0


@dataclass(frozen=True)
class BigVganConfig:
    """Sizes of the vocoder."""

    mel_dim: int
    channels: int
    upsample_rates: tuple[int, ...]
    upsample_kernel_sizes: tuple[int, ...]
    resblock_kernel_sizes: tuple[int, ...]
    resblock_dilation_sizes: tuple[tuple[int, ...], ...]


def kaiser_sinc(taps: int = TAPS, ratio: int = 2) -> Tensor:
    """Low-pass filter [taps] of the anti-aliased activation: Kaiser-windowed sinc, cutoff 0.5/ratio, unit sum.

    Window parameter after Kaiser's formulas for the attenuation of a transition of 0.6/ratio (Oppenheim & Schafer).
    """
    cutoff, transition = 0.5 / ratio, 4 * 0.6 / ratio
    attenuation = 2.285 * (taps // 2 - 1) * math.pi * transition + 7.95
    if attenuation > 50:
        beta = 0.1102 * (attenuation - 8.7)
    else:
        beta = 0.5842 * (attenuation - 21) ** 0.4 + 0.07886 * (attenuation - 21) if attenuation >= 21 else 0.0
    window = torch.kaiser_window(taps, periodic=False, beta=beta, dtype=torch.float32, device="cpu")
    time = torch.arange(-(taps // 2), taps // 2, device="cpu") + 0.5
    taps_ = 2 * cutoff * window * torch.sinc(2 * cutoff * time)
    return taps_ / taps_.sum()


def polyphase(channels: int) -> dict[str, Tensor]:
    """The 2x interpolation and decimation filters by the samples of the upsampled signal, each [C, 1, 1, 7].

    Up: sample 2t (even) or 2t + 1 (odd) from inputs t-3..t+3. Down: output t from the even samples, or the odd ones, of
    t-3..t+3; the sum of both is the output.
    """
    taps = kaiser_sinc()
    filters = {name: torch.zeros(7, device="cpu") for name in ("up_even", "up_odd", "down_even", "down_odd")}
    for r in range(6):
        filters["up_even"][r] = 2 * taps[11 - 2 * r]
        filters["up_odd"][r + 1] = 2 * taps[10 - 2 * r]
        filters["down_even"][r + 1] = taps[2 * r + 1]
        filters["down_odd"][r] = taps[2 * r]
    return {name: row.repeat(channels, 1, 1, 1) for name, row in filters.items()}


def _rate(reader: WeightReader, *, key: str) -> NDArray[Any]:
    """exp(alpha) / pi: periods of sin^2(alpha u) in one unit of u, [C, 1, 1]."""
    alpha: NDArray[Any] = np.exp(reader.read(key).astype(np.float64))
    return (alpha / np.pi).astype(np.float32)[:, None, None]


def _height(reader: WeightReader, *, key: str) -> NDArray[Any]:
    """CURVE_FACTOR / (exp(beta) + 1e-9): [C, 1, 1]."""
    beta: NDArray[Any] = np.exp(reader.read(key).astype(np.float64))
    return (CURVE_FACTOR / (beta + 1e-9)).astype(np.float32)[:, None, None]


class _Activation(ExportModule):
    """Anti-aliased snake: 2x up, x + sin^2(a x) / b, 2x down (see `omniport.export.models.ops.anti_aliased_snake`)."""

    up_even: Tensor
    up_odd: Tensor
    down_even: Tensor
    down_odd: Tensor
    rate: Tensor
    height: Tensor

    def __init__(self, channels: int, key: str) -> None:
        super().__init__()
        for name, taps in polyphase(channels).items():
            self.constant(name, taps, follow=True)
        for name, part, fn in (("rate", "alpha", _rate), ("height", "beta", _height)):
            full = f"{key}.act.{part}"
            self.computed(name, (channels, 1, 1), Compute((full,), partial(fn, key=full)), follow=True)

    def forward(self, x: Tensor) -> Tensor:
        filters = (self.up_even, self.up_odd, self.down_even, self.down_odd)
        return anti_aliased_snake(x, *filters, self.rate, self.height)


class _Conv(ExportModule):
    """A convolution over time, row by row: see `BigVgan`."""

    def __init__(self, n_in: int, n_out: int, kernel: int, dilation: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in, 1, kernel))
        self.stored["weight"] = (n_out, n_in, kernel)
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None
        self.dilation, self.padding = dilation, (kernel - 1) * dilation // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=(0, self.padding), dilation=(1, self.dilation))


class _Upsample(ExportModule):
    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out, kernel))
        self.bias = nn.Parameter(torch.empty(n_out))
        self.stride, self.padding = stride, (kernel - stride) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv_transpose1d(x.squeeze(2), self.weight, self.bias, stride=self.stride, padding=self.padding)
        return y.unsqueeze(2)


class _ResidualBlock(ExportModule):
    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...], key: str) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList([_Conv(channels, channels, kernel, dilation) for dilation in dilations])
        self.convs2 = nn.ModuleList([_Conv(channels, channels, kernel) for _ in dilations])
        self.activations = nn.ModuleList(
            [_Activation(channels, f"{key}.activations.{i}") for i in range(2 * len(dilations))]
        )

    def forward(self, x: Tensor) -> Tensor:
        for i, (dilated, plain) in enumerate(zip(self.convs1, self.convs2, strict=True)):
            y = dilated(self.activations[2 * i](x))
            x = x + plain(self.activations[2 * i + 1](y))
        return x


class BigVgan(Stack):
    """Vocoder (transformers: Qwen2_5OmniToken2WavBigVGANModel).

    Everything between its ends has rows, [B, C, R, T]: ONNX Runtime has blocked kernels on a CPU for convolutions of
    two dimensions, and for those of one it has none. R is 1, and 2 where channels are few (`_ROWS_BELOW`): halves of
    time that overlap by what a layer looks at.
    """

    prefix = "token2wav.code2wav_bigvgan_model."

    def __init__(self, config: BigVganConfig) -> None:
        super().__init__()
        self.conv_pre = _Conv(config.mel_dim, config.channels, 7)
        widths = [config.channels >> i for i in range(len(config.upsample_rates) + 1)]
        self.ups = nn.ModuleList(
            nn.Sequential(_Upsample(widths[i], widths[i + 1], kernel, rate))
            for i, (rate, kernel) in enumerate(zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True))
        )
        kinds = list(zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True))
        self.kinds = len(kinds)
        self.resblocks = nn.ModuleList(
            _ResidualBlock(width, kernel, dilations, f"{self.prefix}resblocks.{i * self.kinds + j}")
            for i, width in enumerate(widths[1:])
            for j, (kernel, dilations) in enumerate(kinds)
        )
        steps = itertools.accumulate(config.upsample_rates, operator.mul)
        self.rows = [c <= _ROWS_BELOW and c**2 * n >= _ROWS_FROM for c, n in zip(widths[1:], steps, strict=True)]
        self.reach = max(
            sum((kernel - 1) // 2 * (dilation + 1) + 2 * _ACTIVATION_REACH for dilation in dilations)
            for kernel, dilations in kinds
        )
        self.activation_post = _Activation(widths[-1], f"{self.prefix}activation_post")
        self.conv_post = _Conv(widths[-1], 1, 7, bias=False)

    def forward(self, mel: Tensor) -> Tensor:
        """mel: float32 [B, 80, T] natural-log amplitudes -> float32 [B, hop*T] samples in -1..1."""
        x, context = self.enter(mel)
        return self.leave(self.run_layers(x, context), context)

    @property
    def depth(self) -> int:
        return len(self.ups)

    def enter(self, *inputs: Tensor) -> tuple[Tensor, Context]:
        (mel,) = inputs
        # exp, 20 log10, -20 dB and the 115 dB range of the reference are one affine map, clipped.
        decibel = mel * (20 / math.log(10)) - REFERENCE_DB
        x = torch.clamp(2 * (decibel - MIN_DB) / -MIN_DB - 1, -1, 1).to(self.conv_post.weight.dtype)
        return self.conv_pre(x.unsqueeze(2)), ()

    def run_layer(self, index: int, x: Tensor, context: Context) -> Tensor:
        x = self.ups[index](x)
        y = split_rows(x, self.reach) if self.rows[index] else x
        branches = [self.resblocks[index * self.kinds + j](y) for j in range(self.kinds)]
        y = sum(branches[1:], branches[0]) / self.kinds
        return merge_rows(y, x) if self.rows[index] else y

    def leave(self, x: Tensor, context: Context) -> Tensor:
        x = self.conv_post(self.activation_post(x))
        return torch.clamp(x.float(), -1, 1).squeeze((1, 2))


def _define(config: Any, settings: Settings) -> GraphDefinition:
    c = config.token2wav_config.bigvgan_config
    sizes = BigVganConfig(
        mel_dim=c.mel_dim,
        channels=c.upsample_initial_channel,
        upsample_rates=tuple(c.upsample_rates),
        upsample_kernel_sizes=tuple(c.upsample_kernel_sizes),
        resblock_kernel_sizes=tuple(c.resblock_kernel_sizes),
        resblock_dilation_sizes=tuple(tuple(d) for d in c.resblock_dilation_sizes),
    )
    return GraphDefinition(
        name=PART.name,
        precision=settings.precision,
        geometry=repr(sizes),
        build=lambda: BigVgan(sizes),
        inputs=(f32("mel", "batch", sizes.mel_dim, "frames"),),
        outputs=(f32("wav", "batch", f"{math.prod(sizes.upsample_rates)}*frames"),),
        dims={"batch": DimRange(1, 1, 1), "frames": DimRange(2, 116, 8192)},
    )


def _case(name: str, mel: NDArray[np.float32]) -> Case:
    """mel float32 [1, 80, T] to samples."""
    return Case(PART.name, name, lambda graph: graph.run({"mel": mel})["wav"], _asked(mel), (mel,))


def _asked(mel: NDArray[np.float32]) -> Asked:
    return lambda module: torch.as_tensor(module(torch.from_numpy(mel))).reshape(1, -1)


def _cases(subject: Subject) -> Iterator[Case]:
    spec, rng = subject.bundle.manifest.graphs[PART.name], generator("mel")
    frames, short = spec.dims["frames"], (spec.dims["frames"].min, 7)
    calibrated = spec.precision in ("int8", "fp8")  # for speech: noise is beyond the ranges of its activations
    for length in () if calibrated else short:
        yield _case(f"{length} frames, noise", rng.normal(-5, 2, (1, 80, length)).astype(np.float32))
    # the reference takes ten seconds for one of sound: minutes, which the spec allows, are out of its reach
    large = (*largest(subject, PART.name, "frames", 480), frames.opt, 301) if subject.full else ()
    name, speaker = min(load_speakers(subject.checkpoint.path / "spk_dict.pt").items())
    for length in (*large, *(short if calibrated else ()), 37, 60):
        yield _case(f"{length} frames of {name}'s recording", np.ascontiguousarray(spoken_mel(speaker, length).T[None]))


PART: ModelPart = ModelPart(
    PARTS["bigvgan"],
    define=_define,
    reference=ReferenceModule(
        qwen_module("Qwen2_5OmniToken2WavBigVGANModel", "token2wav_config.bigvgan_config"), BigVgan.prefix
    ),
    cases=_cases,
    describe=lambda ckpt, _: {
        "vocoder": VocoderGeometry(hop=math.prod(ckpt.config.token2wav_config.bigvgan_config.upsample_rates))
    },
    ask=lambda given, _bundle, _ckpt: _asked(given["mel"]),
)
