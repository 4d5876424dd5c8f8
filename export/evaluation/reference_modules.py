"""Load the transformers module of each part, the reference, from a checkpoint."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import numpy as np
import torch
from omniport.runtime.errors import CheckpointError
from torch import nn

from ..checkpoint.checkpoint import Checkpoint
from ..models.module import blocks

_PARTS: Mapping[str, tuple[str, str, str]] = {
    # graph: (transformers class, path of its configuration, prefix of its weights)
    "audio_encoder": ("Qwen2_5OmniAudioEncoder", "thinker_config.audio_config", "thinker.audio_tower."),
    "vision_encoder": ("Qwen2_5OmniVisionEncoder", "thinker_config.vision_config", "thinker.visual."),
    "thinker": ("Qwen2_5OmniThinkerTextModel", "thinker_config.text_config", "thinker.model."),
    "talker": ("Qwen2_5OmniTalkerForConditionalGeneration", "talker_config", "talker."),
    "dit": ("Qwen2_5OmniToken2WavDiTModel", "token2wav_config.dit_config", "token2wav.code2wav_dit_model."),
    "bigvgan": (
        "Qwen2_5OmniToken2WavBigVGANModel",
        "token2wav_config.bigvgan_config",
        "token2wav.code2wav_bigvgan_model.",
    ),
}


def load_reference(ckpt: Checkpoint, graph: str) -> nn.Module:
    """The transformers module behind a graph, float32, with the checkpoint's weights.

    The thinker's module also carries ``lm_head`` (a plain Linear), so that logits can be compared.

    Raises:
        CheckpointError: a weight of the module is not in the checkpoint.
    """
    class_name, _, prefix = _PARTS[graph]
    module = _without_weights(ckpt, graph)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            key = prefix + name
            if name == "lm_head.weight":
                key = "thinker.model.embed_tokens.weight" if ckpt.tied_embeddings else "thinker.lm_head.weight"
            if key not in ckpt:
                if name.startswith("audio_bos_eos_token"):  # a parameter that forward never uses
                    continue
                raise CheckpointError(f"{ckpt.name} has no {key!r}, which {class_name} needs")
            _fill(parameter, ckpt, key)
    return module


def cache_keyword(decoder: nn.Module) -> str:
    """The keyword under which ``decoder.forward`` takes its key/value cache: transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"


def reference_bytes(ckpt: Checkpoint, graph: str) -> int:
    """Size of what `load_reference` holds: the module's parameters and buffers in float32. No weight is read."""
    module = _without_weights(ckpt, graph)
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def _without_weights(ckpt: Checkpoint, graph: str) -> nn.Module:
    """The module as its class makes it, its parameters not yet written: memory that nothing has touched is not used."""
    from transformers.initialization import no_init_weights
    from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as reference

    class_name, path, _ = _PARTS[graph]
    config = ckpt.config
    for part in path.split("."):
        config = getattr(config, part)
    config._attn_implementation = "sdpa"
    with torch.no_grad(), no_init_weights():
        module: nn.Module = getattr(reference, class_name)(config).float().eval()
        if graph == "thinker":
            module.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    return module


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
