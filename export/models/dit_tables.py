"""Tables that stand for the DiT's time embedding and AdaLN projections: they are computed at export, a row a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .module import WeightReader

TIME_FREQUENCIES = 256


def table_keys(prefix: str, linear: str) -> tuple[str, ...]:
    """Names of the weights that a table is computed from; ``linear`` is its projection."""
    names = ("time_embed.time_mlp.0", "time_embed.time_mlp.2", linear)
    return tuple(f"{prefix}{name}.{part}" for name in names for part in ("weight", "bias"))


def _read(reader: WeightReader, key: str) -> Tensor:
    return torch.from_numpy(reader.read(key).astype(np.float32))


def _linear(reader: WeightReader, prefix: str, x: Tensor) -> Tensor:
    return F.linear(x, _read(reader, prefix + ".weight"), _read(reader, prefix + ".bias"))


def _time_embedding(reader: WeightReader, prefix: str, times: Sequence[float]) -> Tensor:
    """silu of the time embedding [steps, width] (transformers: DiTTimestepEmbedding)."""
    half = TIME_FREQUENCIES // 2
    frequency = torch.exp(torch.arange(half).float() * -(math.log(10000) / (half - 1)))
    angle = 1000 * torch.tensor(times, dtype=torch.float32)[:, None] * frequency[None, :]
    x = torch.cat((angle.sin(), angle.cos()), dim=-1)
    x = _linear(reader, f"{prefix}time_embed.time_mlp.0", x)
    return F.silu(_linear(reader, f"{prefix}time_embed.time_mlp.2", F.silu(x)))


def layer_table(reader: WeightReader, *, prefix: str, layer: int, times: Sequence[float]) -> NDArray[Any]:
    """[steps, 6, width]: shift, 1+scale and gate of attention, then of the MLP (chunk order of AdaLayerNormZero)."""
    table = _linear(
        reader, f"{prefix}transformer_blocks.{layer}.attn_norm.linear", _time_embedding(reader, prefix, times)
    )
    table = table.unflatten(-1, (6, -1)).contiguous()
    table[:, 1] += 1
    table[:, 4] += 1
    return np.asarray(table)


def final_table(reader: WeightReader, *, prefix: str, times: Sequence[float]) -> NDArray[Any]:
    """[steps, 2, width]: 1+scale, shift (chunk order of AdaLayerNormZero_Final)."""
    table = _linear(reader, f"{prefix}norm_out.linear", _time_embedding(reader, prefix, times))
    table = table.unflatten(-1, (2, -1)).contiguous()
    table[:, 0] += 1
    return np.asarray(table)
