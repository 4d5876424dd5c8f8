"""Read config.json into transformers' configuration, whichever generation of key names it uses.

transformers keeps unknown keys as plain attributes, and silently lets the fields they stand for fall back to defaults.
The old names are therefore rewritten before it sees them:

- ``dit_config``: ``dim``, ``depth``, ``heads`` -> ``hidden_size``, ``num_hidden_layers``, ``num_attention_heads``;
- ``rope_scaling`` and ``rope_theta`` (beside it, or one level up in ``thinker_config``) -> ``rope_parameters``, with
  the multimodal type, which checkpoints call ``default`` or ``mrope``, written as ``default``.
"""

from __future__ import annotations

import copy
import importlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omniport.runtime.errors import CheckpointError
from omniport.runtime.system.files import read_text

from .config_ranges import check_numbers

_MODEL_TYPE = "qwen2_5_omni"
#: the thinker saved alone, as fine-tuning tools do: its configuration is the whole config.json
THINKER_TYPE = "qwen2_5_omni_thinker"
_DIT_NAMES: Mapping[str, str] = {
    "dim": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
}
#: the reference's fallback (Qwen2_5OmniRotaryEmbedding)
_MROPE_SECTION = [16, 24, 24]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. CheckpointError if the file cannot be read or holds anything else."""
    try:
        value = json.loads(read_text(path))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}). Download the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object. Download it again.")
    return value


def load_config(folder: Path) -> Any:
    """The checkpoint's configuration: a normalised ``transformers.Qwen2_5OmniConfig``.

    Raises:
        CheckpointError: no config.json, another architecture, or values that cannot be.
    """
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(f"{folder} is not a checkpoint: it holds no config.json. Give the folder that does.")
    raw = whole_config(read_json(path))
    _check_architecture(raw, path)
    normalised = normalise_config(raw)

    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            config = AutoConfig.for_model(**normalised)
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a usable {_MODEL_TYPE} configuration: {error}") from error
    _check_rope(config, path)
    return config


def whole_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """config.json's object; that of a thinker saved alone as a whole model that does not speak."""
    if raw.get("model_type") != THINKER_TYPE:
        return dict(raw)
    weights = {key: raw[key] for key in ("transformers_weights",) if key in raw}
    return {"model_type": _MODEL_TYPE, "thinker_config": dict(raw), "enable_audio_output": False, **weights}


def normalise_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of config.json's object with the key names of transformers 5. CheckpointError on contradicting names, and
    numbers out of range."""
    check_numbers(raw)
    config = copy.deepcopy(dict(raw))
    thinker = _section(config, "thinker_config")
    for section in (config, thinker):
        section.pop(
            "quantization_config", None
        )  # `omniport.export.checkpoint.packed` reads it; weights are given dequantized
    _normalise_rope(_section(thinker, "text_config"), outer=thinker, multimodal=True)
    _normalise_rope(_section(config, "talker_config"), multimodal=True)
    dit = _section(_section(config, "token2wav_config"), "dit_config")
    _normalise_rope(dit)
    for old, new in _DIT_NAMES.items():
        value = dit.pop(old, None)
        if value is not None and dit.setdefault(new, value) != value:
            raise CheckpointError(
                f"config.json: dit_config says {old}={value} and {new}={dit[new]}, which name the same value. "
                "Keep the one that fits the weights."
            )
    return config


def _check_architecture(raw: Mapping[str, Any], path: Path) -> None:
    found = raw.get("model_type")
    if found != _MODEL_TYPE:
        names = raw.get("architectures")
        raise CheckpointError(
            f"{path} describes model_type {found!r}" + (f" (architectures {names})" if names else "") + "; omniport "
            f"supports {_MODEL_TYPE!r} (Qwen2.5-Omni 3B, 7B and their fine-tunes) and {THINKER_TYPE!r} "
            "(the thinker alone)."
        )
    if not isinstance(raw.get("thinker_config"), dict):
        raise CheckpointError(f"{path} has no thinker_config. Download the file again.")


def _section(parent: dict[str, Any], name: str) -> dict[str, Any]:
    """A nested object, created empty (so that defaults apply) when it is absent or null."""
    if parent.get(name) is None:
        parent[name] = {}
    section = parent[name]
    if not isinstance(section, dict):
        raise CheckpointError(f"config.json: {name} is a {type(section).__name__}, expected an object.")
    return section


def _normalise_rope(section: dict[str, Any], outer: dict[str, Any] | None = None, multimodal: bool = False) -> None:
    """Gather the rotary settings in ``rope_parameters``. The inner and the newer name win, key by key."""
    rope: dict[str, Any] = {}
    for level in (outer, section) if outer is not None else (section,):
        theta = level.pop("rope_theta", None)
        rope |= {} if theta is None else {"rope_theta": theta}
        for name in ("rope_scaling", "rope_parameters"):
            value = level.pop(name, None)
            if value is not None and not isinstance(value, dict):
                raise CheckpointError(f"config.json: {name} is a {type(value).__name__}, expected an object.")
            rope |= value or {}
    kind = rope.pop("type", "default")
    rope.setdefault("rope_type", kind)
    if multimodal:
        rope["rope_type"] = "default" if rope["rope_type"] == "mrope" else rope["rope_type"]
        rope.setdefault("mrope_section", _MROPE_SECTION)
    if rope["rope_type"] != "default":
        raise CheckpointError(
            f"config.json: rotary embedding type {rope['rope_type']!r} is not supported; expected 'default' or "
            "'mrope'. Export the checkpoint without long-context scaling."
        )
    section["rope_parameters"] = rope


def _check_rope(config: Any, path: Path) -> None:
    """mrope_section must cover half a head: the graphs split the rotary frequencies by it."""
    text, talker = config.thinker_config.text_config, config.talker_config
    heads = [("thinker", text, text.hidden_size // text.num_attention_heads)]
    if config.enable_audio_output:
        heads.append(("talker", talker, talker.head_dim))
    for name, part, head_dim in heads:
        section = part.rope_parameters["mrope_section"]
        if not isinstance(section, list) or not all(isinstance(size, int) for size in section):
            raise CheckpointError(
                f"{path}: the {name}'s mrope_section is {section!r}; three whole numbers were expected."
            )
        if 2 * sum(section) != head_dim:
            raise CheckpointError(
                f"{path}: the {name}'s mrope_section {section} adds up to {sum(section)}, expected {head_dim // 2}, "
                f"half of its head size {head_dim}."
            )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers warns that the talker's text ids exceed its own (codec) vocabulary: true of every checkpoint.

    Loading, it shows a bar, and lists the weights that belong to other parts.
    """
    verbosity: Any = importlib.import_module("transformers.utils.logging")
    before, bar = verbosity.get_verbosity(), verbosity.is_progress_bar_enabled()
    verbosity.set_verbosity(logging.ERROR)
    verbosity.disable_progress_bar()
    try:
        yield
    finally:
        verbosity.set_verbosity(before)
        if bar:
            verbosity.enable_progress_bar()
