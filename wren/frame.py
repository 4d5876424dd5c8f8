"""The files of Wren's checkpoint: configuration, tokenizer, processor, chat template, and weights in BF16."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omniport.export.bundle_parts import base_manifest
from omniport.export.checkpoint.checkpoint import Checkpoint
from omniport.export.checkpoint.frontends import SPEECH_PROMPT
from omniport.export.export_options import ExportOptions
from omniport.export.synthetic.geometries import Size, checkpoint_config
from omniport.export.synthetic.make_checkpoint import hub_key
from omniport.export.synthetic.tokenizer_files import SyntheticTokenizer, train_tokenizer, write_text_files
from omniport.runtime.bundle.manifest import Manifest
from omniport.runtime.speech.ode import rk4_schedule
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, Qwen2_5OmniForConditionalGeneration

from wren import sizes, world
from wren.training import drawn_from

OTHER_PROMPT = "You are a helpful assistant."
SHARDS, INDEX = ("thinker", "talker", "token2wav"), "model.safetensors.index.json"
TALKER_LEARNS_ROWS_OF = "thinker.model.language_model.embed_tokens.weight"
FOLDER = "frame"  # below the work folder: the checkpoint before training


@functools.cache
def tokenizer() -> SyntheticTokenizer:
    """Byte-level BPE of Qwen2's construction, in which nearly every word of the world is one token."""
    draw = np.random.default_rng(1)
    texts = [SPEECH_PROMPT, OTHER_PROMPT, "user assistant system"] * 200
    for number in range(6000):
        question = world.draw_question(world.KINDS[number % len(world.KINDS)], draw, "train")
        texts += [question.asked, question.answer]
    return train_tokenizer(sizes.REGULAR_TOKENS, False, texts)


def config() -> dict[str, Any]:
    """config.json, with every key that the published checkpoints have."""
    size = Size(
        regular_tokens=sizes.REGULAR_TOKENS,
        real_ids=False,
        vocab_size=sizes.TEXT_TABLE,
        tts_end=sizes.TEXT_TABLE,
        shard_bytes=1 << 30,
        wave_gain=0.0,
        text=sizes.THINKER,
        audio=sizes.AUDIO,
        vision=sizes.VISION,
        talker=sizes.TALKER,
        dit=sizes.DIT,
        vocoder_channels=0,
    )
    made = checkpoint_config(size, tokenizer())
    made["token2wav_config"]["bigvgan_config"] |= sizes.BIGVGAN
    return made


def write_files(folder: Path) -> None:
    """Write all that holds no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(), indent=2) + "\n")
    write_text_files(folder, tokenizer())


def write_weights(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write the state of transformers' whole model in BF16, under the names that published checkpoints have.

    In three files, so that a talker that was trained on replaces one of them: the thinker, the talker with the
    thinker's table (it learns rows of it), and token2wav.
    """
    shards: dict[str, dict[str, Tensor]] = {name: {} for name in SHARDS}
    for name, value in state.items():
        shard = "talker" if name == TALKER_LEARNS_ROWS_OF else name.partition(".")[0]
        shards[shard][hub_key(name)] = value.to(torch.bfloat16).contiguous()
    files = {name: f"model-{n:05}-of-{len(SHARDS):05}.safetensors" for n, name in enumerate(SHARDS, 1)}
    for name, tensors in shards.items():
        save_file(tensors, folder / files[name], metadata={"format": "pt"})
    size = sum(t.nbytes for tensors in shards.values() for t in tensors.values())
    weight_map = {key: files[name] for name, tensors in shards.items() for key in sorted(tensors)}
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def folder(work: Path) -> Path:
    """The checkpoint with untrained weights; made if it is not there."""
    made = work / FOLDER
    if not made.exists():
        work.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=work, prefix=f"{FOLDER}-"))
        write_files(part)
        with drawn_from(0):
            model = Qwen2_5OmniForConditionalGeneration(AutoConfig.from_pretrained(part))
        write_weights(part, model.state_dict())
        try:
            part.rename(made)
        except OSError:  # made meanwhile, for a part that is trained beside this one
            shutil.rmtree(part)
    return made


def manifest(work: Path) -> Manifest:
    """What the runtime lays prompts out by."""
    return base_manifest(Checkpoint.open(folder(work)), ExportOptions(), rk4_schedule(), ())
