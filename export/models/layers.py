"""Layers that several model parts share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .module import ExportModule, Linear
from .ops import rms_norm


def inverse_frequencies(width: int, theta: float) -> Tensor:
    """float32 [width/2]: radians a position by which each pair of a rotary embedding turns."""
    return 1.0 / (theta ** (torch.arange(0, width, 2, dtype=torch.float, device="cpu") / width))


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
