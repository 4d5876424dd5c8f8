"""Load the transformers module of each part, the reference, from a checkpoint."""

from __future__ import annotations

import inspect

import numpy as np
import torch
from omniport.runtime.errors import CheckpointError
from torch import nn

from ..checkpoint.checkpoint import Checkpoint
from ..models.model_parts import MODEL_PARTS
from ..models.module import blocks


def load_reference(ckpt: Checkpoint, graph: str) -> nn.Module:
    """The reference's module behind a graph, float32, with the checkpoint's weights.

    Raises:
        CheckpointError: a weight of the module is not in the checkpoint.
    """
    reference = MODEL_PARTS[graph].reference
    module, keys = reference.make(ckpt.config), reference.keys(ckpt)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            key = keys.get(name, reference.prefix + name)
            if key in ckpt:
                _fill(parameter, ckpt, key)
            elif not name.startswith(reference.unused):
                raise CheckpointError(f"{ckpt.name} has no {key!r}, which {type(module).__name__} needs")
    return module


def cache_keyword(decoder: nn.Module) -> str:
    """The keyword under which ``decoder.forward`` takes its key/value cache: transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"


def reference_bytes(ckpt: Checkpoint, graph: str) -> int:
    """Size of what `load_reference` holds: the module's parameters and buffers in float32. No weight is read."""
    module = MODEL_PARTS[graph].reference.make(ckpt.config)
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def _fill(parameter: torch.Tensor, ckpt: Checkpoint, key: str) -> None:
    """Copy a weight in blocks of rows, so that loading takes no more memory than the module."""
    shape = ckpt.shape(key)
    if tuple(parameter.shape) != tuple(shape):
        raise CheckpointError(f"{ckpt.name}: {key!r} has shape {shape}; the reference has {tuple(parameter.shape)}")
    if not shape:
        parameter.copy_(torch.from_numpy(ckpt.read(key).astype(np.float32)))
        return
    for start, stop in blocks(shape, parameter.element_size()):
        parameter[start:stop] = torch.from_numpy(ckpt.read(key, start, stop).astype(np.float32))
