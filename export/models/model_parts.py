"""The registry of model parts: a part is added by one file in this package, and one name here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from omniport.runtime.bundle.manifest import SolverSpec
from omniport.runtime.bundle.parts import PARTS

from . import audio_encoder, bigvgan, dit, talker, thinker, vision_encoder
from .part import GraphDefinition, ModelPart, Settings

#: dtype of the graphs under each --precision
PRECISIONS: Mapping[str, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

#: by name, in the order of the runtime's `PARTS`
MODEL_PARTS: dict[str, ModelPart] = {
    module.PART.name: module.PART for module in (audio_encoder, vision_encoder, thinker, talker, dit, bigvgan)
}


def register(part: ModelPart) -> None:
    """Add a part: from now on it is exported, opened, compared and measured like the others.

    Raises:
        ValueError: there is one of that name.
    """
    if part.name in PARTS:
        raise ValueError(f"there is a part {part.name!r} already")
    PARTS[part.name] = part.contract
    MODEL_PARTS[part.name] = part


def unregister(name: str) -> None:
    """Take away a part that was added: bundles that hold it are refused again."""
    del PARTS[name], MODEL_PARTS[name]


def parts_of(config: Any) -> dict[str, ModelPart]:
    """The parts that a checkpoint has: those for speech are missing where it does not speak.

    Args:
        config: ``transformers.Qwen2_5OmniConfig``.
    """
    return {name: part for name, part in MODEL_PARTS.items() if config.enable_audio_output or not part.contract.speaks}


def graph_definitions(
    config: Any,
    precision: str,
    max_context: int,
    solver: SolverSpec,
    tied: bool,
    *,
    token2wav: str = "fp32",
    ops: str = "native",
    kv_form: str = "static",
) -> dict[str, GraphDefinition]:
    """The graphs of a checkpoint.

    Args:
        config: ``transformers.Qwen2_5OmniConfig``.
        precision: fp32, fp16 or bf16.
        token2wav: the same for the parts that are published in float32 (`Part.float32`), fp32 or fp16.
        ops: as in `GraphDefinition`. The others: as in `Settings`.
    """
    found = {}
    for name, part in parts_of(config).items():
        dtype = PRECISIONS[token2wav if part.contract.float32 else precision]
        found[name] = replace(part.define(config, Settings(dtype, max_context, solver, tied, kv_form)), ops=ops)
    return found
