"""ECAPA-TDNN speaker encoder: a voice's reference mel becomes the DiT's ``reference`` vector.

Runs once per voice at export, in FP32, and never becomes a graph. Module names are the checkpoint's. Follows
Desplanques et al. 2020 (ECAPA-TDNN) as `ECAPA_TimeDelayNet` of the reference builds it: no batch norm, reflect padding,
and the aggregation sees every block but the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class SpeakerSpec:
    """Geometry of the encoder; ``channels``, ``kernels`` and ``dilations`` have one entry per block, then the MFA's."""

    mel_dim: int
    channels: tuple[int, ...]
    kernels: tuple[int, ...]
    dilations: tuple[int, ...]
    res2net_scale: int
    se_channels: int
    attention_channels: int
    out_dim: int

    @classmethod
    def from_config(cls, dit: Any) -> SpeakerSpec:
        """From a ``Qwen2_5OmniDiTConfig``."""
        return cls(
            mel_dim=dit.mel_dim,
            channels=tuple(dit.enc_channels),
            kernels=tuple(dit.enc_kernel_sizes),
            dilations=tuple(dit.enc_dilations),
            res2net_scale=dit.enc_res2net_scale,
            se_channels=dit.enc_se_channels,
            attention_channels=dit.enc_attention_channels,
            out_dim=dit.enc_dim,
        )

    @property
    def min_frames(self) -> int:
        """Shortest mel, in frames: reflect padding needs more frames than it adds on one side."""
        return 1 + max(k // 2 * d for k, d in zip(self.kernels, self.dilations, strict=True))


class SpeakerEncoder(nn.Module):
    """mel [B, T, mel_dim] -> vector [B, out_dim], T >= ``spec.min_frames``."""

    def __init__(self, spec: SpeakerSpec) -> None:
        super().__init__()
        channels, kernels, dilations = spec.channels, spec.kernels, spec.dilations
        blocks: list[nn.Module] = [_Tdnn(spec.mel_dim, channels[0], kernels[0], dilations[0])]
        blocks += [
            _SeRes2Net(channels[i - 1], channels[i], kernels[i], dilations[i], spec)
            for i in range(1, len(channels) - 1)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.mfa = _Tdnn(channels[-1], channels[-1], kernels[-1], dilations[-1])
        self.asp = _AttentivePooling(channels[-1], spec.attention_channels)
        self.fc = nn.Conv1d(2 * channels[-1], spec.out_dim, 1)

    def forward(self, mel: Tensor) -> Tensor:
        x = mel.transpose(1, 2)  # [B, mel_dim, T]
        outputs: list[Tensor] = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        x = self.mfa(torch.cat(outputs[1:], dim=1))
        return cast(Tensor, self.fc(self.asp(x))).squeeze(-1)


class _Tdnn(nn.Module):
    """Dilated convolution of constant length, then ReLU."""

    def __init__(self, n_in: int, n_out: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(n_in, n_out, kernel, dilation=dilation, padding="same", padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


class _Res2Net(nn.Module):
    """Channel groups in a chain: the first passes through, each later one also sees its neighbour's output."""

    def __init__(self, n_in: int, n_out: int, kernel: int, dilation: int, scale: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Tdnn(n_in // scale, n_out // scale, kernel, dilation) for _ in range(scale - 1))

    def forward(self, x: Tensor) -> Tensor:
        first, *groups = x.chunk(len(self.blocks) + 1, dim=1)
        outputs = [first]
        for index, (block, group) in enumerate(zip(self.blocks, groups, strict=True)):
            outputs.append(block(group if index == 0 else group + outputs[-1]))
        return torch.cat(outputs, dim=1)


class _SqueezeExcitation(nn.Module):
    """Channel gate from the mean over time."""

    def __init__(self, n_in: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(n_in, hidden, 1)
        self.conv2 = nn.Conv1d(hidden, n_in, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.conv2(F.relu(self.conv1(x.mean(dim=2, keepdim=True)))))
        return x * gate


class _SeRes2Net(nn.Module):
    """Residual block: 1x1, Res2Net, 1x1, gate."""

    def __init__(self, n_in: int, n_out: int, kernel: int, dilation: int, spec: SpeakerSpec) -> None:
        super().__init__()
        self.tdnn1 = _Tdnn(n_in, n_out, 1, 1)
        self.res2net_block = _Res2Net(n_out, n_out, kernel, dilation, spec.res2net_scale)
        self.tdnn2 = _Tdnn(n_out, n_out, 1, 1)
        self.se_block = _SqueezeExcitation(n_out, spec.se_channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + cast(Tensor, self.se_block(self.tdnn2(self.res2net_block(self.tdnn1(x)))))


class _AttentivePooling(nn.Module):
    """Weighted mean and deviation over time; the weights also see the plain mean and deviation. -> [B, 2C, 1]."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.tdnn = _Tdnn(3 * channels, hidden, 1, 1)
        self.conv = nn.Conv1d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        even = torch.full_like(x[:, :1], 1.0 / x.shape[2])  # [B, 1, T]
        context = torch.cat([x, *(s.expand_as(x) for s in _statistics(x, even))], dim=1)
        weights = torch.softmax(self.conv(torch.tanh(self.tdnn(context))), dim=2)
        return torch.cat(_statistics(x, weights), dim=1)


def _statistics(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and standard deviation over time, each [B, C, 1]; the variance is at least 1e-12."""
    mean = (weights * x).sum(dim=2, keepdim=True)
    variance = (weights * (x - mean).square()).sum(dim=2, keepdim=True)
    return mean, variance.clamp(min=1e-12).sqrt()
