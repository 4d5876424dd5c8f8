"""GPTQ and AWQ checkpoints for tests: a checkpoint's thinker rounded to 4 or 8 bits and packed, in plain loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.checkpoints import rewritten

LINEAR = "thinker.model.layers."
GROUP = 32


def round_to_groups(
    weight: np.ndarray[Any, Any], group: int, symmetric: bool, order: np.ndarray[Any, Any] | None, bits: int
) -> tuple[np.ndarray[Any, Any], ...]:
    """[N, K] -> q [K, N], z [G, N], s float16 [G, N], g [K]; group i holds the rows order[i * group : ...]."""
    w = weight.T
    rows = np.arange(len(w)) if order is None else order
    count, middle = len(w) // group, 1 << (bits - 1)
    q, g = np.zeros(w.shape, np.int64), np.zeros(len(w), np.int64)
    z, s = np.zeros((count, w.shape[1]), np.int64), np.zeros((count, w.shape[1]), np.float16)
    for i in range(count):
        mine = rows[i * group : (i + 1) * group]
        low, high = np.minimum(w[mine].min(axis=0), 0), np.maximum(w[mine].max(axis=0), 0)
        if symmetric:
            s[i], z[i] = np.maximum(-low, high) / (middle - 1), middle
        else:
            s[i] = (high - low) / (2 * middle - 1)
            z[i] = np.clip(np.rint(-low / s[i].astype(np.float32)), 1, 2 * middle - 1)
        q[mine] = np.clip(np.rint(w[mine] / s[i].astype(np.float32)) + z[i], 0, 2 * middle - 1)
        g[mine] = i
    return q, z, s, g


def to_words(values: np.ndarray[Any, Any], fields: tuple[int, ...]) -> torch.Tensor:
    """[R, C] -> int32 [R, C / fields]; field i of a word holds column fields[i] of its eight or four."""
    count = len(fields)
    words = np.zeros((len(values), values.shape[1] // count), np.uint32)
    for i, column in enumerate(fields):
        mask = np.uint32((1 << (32 // count)) - 1)
        words |= (values[:, column::count].astype(np.uint32) & mask) << np.uint32(32 // count * i)
    return torch.from_numpy(words.view(np.int32).copy())


def pack(
    tensors: dict[str, torch.Tensor],
    method: str,
    *,
    group: int = GROUP,
    symmetric: bool = False,
    shuffled: bool = False,
    version: int = 1,
    bits: int = 4,
    keys: str = LINEAR,
) -> dict[str, np.ndarray[Any, Any]]:
    """Pack the linear layers whose name begins with ``keys``, in place; returns what they stand for, [N, K]."""
    meant = {}
    plain = tuple(range(32 // bits))
    for key in [key for key in tensors if key.startswith(keys) and key.endswith("_proj.weight")]:
        weight, module = tensors.pop(key).float().numpy(), key.removesuffix(".weight")
        size = weight.shape[1] if group == -1 else group
        # layers that read one tensor were packed with one order
        order = np.random.default_rng(weight.shape[1]).permutation(weight.shape[1]) if shuffled else None
        q, z, s, g = round_to_groups(weight, size, symmetric, order, bits)
        if method == "gptq":
            tensors[f"{module}.qweight"] = to_words(q.T, plain).T
            tensors[f"{module}.qzeros"] = to_words(z - (version == 1), plain)
            tensors[f"{module}.g_idx"] = torch.from_numpy(g.astype(np.int32))
        else:
            tensors[f"{module}.qweight"] = to_words(q, (0, 2, 4, 6, 1, 3, 5, 7))
            tensors[f"{module}.qzeros"] = to_words(z, (0, 2, 4, 6, 1, 3, 5, 7))
        tensors[f"{module}.scales"] = torch.from_numpy(s)
        value = np.empty_like(weight.T)
        for k in range(len(value)):
            value[k] = (q[k] - z[g[k]]).astype(np.float32) * s[g[k]].astype(np.float32)
        meant[key] = value.T
    return meant


def packed_checkpoint(
    source: Path, target: Path, method: str, *, config: dict[str, Any] | None = None, **options: Any
) -> dict[str, np.ndarray[Any, Any]]:
    """A packed copy of a checkpoint; returns what its packed weights stand for."""
    meant: dict[str, np.ndarray[Any, Any]] = {}
    sizes = {"bits": options.get("bits", 4), "group_size": options.get("group", GROUP)}
    described = {"quant_method": method, **sizes} | (config or {})
    rewritten(
        source,
        target,
        lambda tensors: meant.update(pack(tensors, method, **options)),
        lambda settings: settings.update(quantization_config=described),
    )
    return meant
