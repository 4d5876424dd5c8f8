"""Load the transformers module of each part, the reference, from a checkpoint."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from omniport.runtime.errors import CheckpointError
from omniport.runtime.system.foreign import foreign
from torch import nn

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config import quiet_transformers
from ..models.model_parts import MODEL_PARTS
from ..models.module import blocks
from ..models.part import ReferenceModule

#: how the hub names the thinker's weights -> how they may be stored: without its name where it was saved alone, and one
#: level deeper by transformers 5
_STORED: Mapping[str, str] = {
    "thinker.model.": r"(?:thinker\.)?model\.(?:language_model\.)?",
    "thinker.": r"(?:thinker\.)?(?:model\.)?",
}


def load_reference(ckpt: Checkpoint, graph: str) -> nn.Module:
    """The reference's module behind a graph, float32, with the checkpoint's weights.

    transformers chooses the files and reads them, so that a fault of our reader shows as a difference. It cannot read
    packed weights (GPTQ, AWQ) without kernels for a GPU: those are filled from our reader.

    Raises:
        CheckpointError: transformers cannot load the weights, or one of the module's is not in the checkpoint.
    """
    reference = MODEL_PARTS[graph].reference
    if ckpt.packing is not None:
        module = reference.make(ckpt.config)
        missing = _fill(module, ckpt, reference)
    else:
        module, missing = _from_pretrained(ckpt, reference)
    lost = sorted(name for name in missing if not name.startswith(reference.unused))
    if lost:
        key = reference.keys(ckpt).get(lost[0], reference.prefix + lost[0])
        raise CheckpointError(f"{ckpt.name} has no {key!r}, which {type(module).__name__} needs")
    return module


def cache_keyword(decoder: nn.Module) -> str:
    """The keyword under which ``decoder.forward`` takes its key/value cache: transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"


def reference_bytes(ckpt: Checkpoint, graph: str) -> int:
    """Size of what `load_reference` holds: the module's parameters and buffers in float32. No weight is read."""
    module = MODEL_PARTS[graph].reference.make(ckpt.config)
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def _from_pretrained(ckpt: Checkpoint, reference: ReferenceModule) -> tuple[nn.Module, set[str]]:
    """The module as transformers loads it, and the names of its parameters that the files do not hold."""
    # untyped: what from_pretrained takes and gives is not in its annotations
    transformers: Any = importlib.import_module("transformers")

    class Holder(transformers.PreTrainedModel):  # type: ignore[misc]  # from_pretrained is for classes of transformers alone
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.part = reference.make(ckpt.config)
            self.post_init()

    elsewhere, same = dict[str, str](), dict[str, str]()
    for name, key in reference.keys(ckpt).items():
        if key.startswith(reference.prefix):
            same[name] = key.removeprefix(reference.prefix)
        else:
            elsewhere[f"^{_stored(key)}$"] = f"part.{name}"
    problem = f"transformers cannot load the weights of {ckpt.name}"
    with quiet_transformers(), _unmapped_files(), foreign(CheckpointError, problem, "Download the checkpoint again."):
        holder, info = Holder.from_pretrained(
            ckpt.path,
            # where config.json names the file of weights, that is the one
            config=transformers.PreTrainedConfig(
                transformers_weights=getattr(ckpt.config, "transformers_weights", None)
            ),
            dtype=torch.float32,
            key_mapping={f"^{_stored(reference.prefix)}": "part."} | elsewhere,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    module: nn.Module = holder.part
    missing = {name.removeprefix("part.") for name in info["missing_keys"]}
    for name in missing & same.keys():
        module.get_parameter(name).data = module.get_parameter(same[name]).data
    return module, missing - same.keys()


def _stored(hub: str) -> str:
    """Pattern of the names under which files hold what the hub names so (or that begins so)."""
    prefix = next((prefix for prefix in _STORED if hub.startswith(prefix)), "")
    return _STORED.get(prefix, "") + re.escape(hub.removeprefix(prefix))


@contextmanager
def _unmapped_files() -> Iterator[None]:
    """transformers reads files, as it does on Windows: pages of mapped ones would count as memory beside the module."""
    loading: Any = importlib.import_module("transformers.modeling_utils")
    mapping = loading.safe_open
    loading.safe_open = lambda *args, **options: mapping(*args, **options | {"backend": "pread"})
    try:
        yield
    finally:
        loading.safe_open = mapping


def _fill(module: nn.Module, ckpt: Checkpoint, reference: ReferenceModule) -> set[str]:
    """Copy weights from our reader; the names of the parameters that the checkpoint does not hold."""
    keys, missing = reference.keys(ckpt), set[str]()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            key = keys.get(name, reference.prefix + name)
            if key in ckpt:
                _copy(parameter, ckpt, key)
            else:
                missing.add(name)
    return missing


def _copy(parameter: torch.Tensor, ckpt: Checkpoint, key: str) -> None:
    """Copy a weight in blocks of rows, so that loading takes no more memory than the module."""
    shape = ckpt.shape(key)
    if tuple(parameter.shape) != shape:
        raise CheckpointError(f"{ckpt.name}: {key!r} has shape {shape}; the reference has {tuple(parameter.shape)}")
    for start, stop in blocks(shape, parameter.element_size()):
        parameter[start:stop] = torch.from_numpy(ckpt.read(key, start, stop).astype(np.float32))
