"""Copies of a checkpoint with something changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def rewritten(
    checkpoint: Path,
    target: Path,
    weights: Callable[[dict[str, torch.Tensor]], None] = lambda _: None,
    config: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Path:
    """A copy of a checkpoint in one shard, with its weights and config.json edited."""
    shutil.copytree(checkpoint, target)
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(target.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (target / "model.safetensors.index.json").unlink(missing_ok=True)
    weights(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, target / "model.safetensors")
    settings = json.loads((target / "config.json").read_text())
    config(settings)
    (target / "config.json").write_text(json.dumps(settings))
    return target
