"""Make a random-weight Qwen2.5-Omni checkpoint in the exact Hugging Face layout.

``tiny`` is for tests: every structural feature of the real model in under 10 M parameters, control tokens at other
ids. ``small`` is for benchmarks: the 3B's layer widths and vocabulary with 4 layers in each stack. ``3b`` and ``7b``
have the geometry of the published models, for measurements at full size.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from omniport.runtime.bundle.staging import check_space
from omniport.runtime.errors import ExportError, UsageError
from omniport.runtime.system.files import scratch_folder
from omniport.runtime.system.progress import Progress

from .geometries import CODEBOOK, CODEC, CODEC_VOCAB, SIZES, TTS_FROM_END, Size, checkpoint_config
from .random_weights import Outliers, Scaling, generator, stored_bytes, write_shards
from .tokenizer_files import SyntheticTokenizer, train_tokenizer, write_text_files


def make_checkpoint(
    out: Path, size: str, seed: int = 0, outliers: bool = False, progress: Progress | None = None
) -> Path:
    """Write a random-weight checkpoint folder.

    Args:
        out: folder to make; it must not exist, or be empty.
        size: ``tiny`` (under 10 M parameters), ``small`` (the 3B's widths, 1.4 B parameters, 2.8 GB), ``3b`` (5.5 B,
            12 GB) or ``7b`` (10.7 B, 22 GB).
        seed: same seed, same bytes.
        outliers: plant large activation channels and key biases in thinker and talker, as trained Qwen2.5 has them.
        progress: called with (tensor name, bytes done, bytes in all).

    Returns:
        ``out``.

    Raises:
        UsageError: unknown size, or ``out`` is a file or a folder with something in it.
        ExportError: the disk has too little space, the files cannot be written, or the export extra is not installed.
            Nothing is left behind.
    """
    out = Path(out)
    if size not in SIZES:
        raise UsageError(f"unknown checkpoint size {size!r}; expected one of: {', '.join(SIZES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not an empty folder; give a new folder, or remove it first")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(f".{out.name}.", out.parent) as aside:
            _write(aside, SIZES[size], seed, outliers, progress)
            aside.chmod(0o755)
            if out.exists():
                out.rmdir()
            os.replace(aside, out)
    except OSError as error:
        raise ExportError(
            f"cannot write the checkpoint {out}: {error}; nothing was left behind. "
            "Free some space or choose another folder"
        ) from error
    except ImportError as error:
        raise ExportError(
            f"make-checkpoint needs {error.name}; install it with: pip install 'omniport[export]'"
        ) from error
    return out


def _write(folder: Path, size: Size, seed: int, outliers: bool, progress: Progress | None) -> None:
    tokenizer = train_tokenizer(size.regular_tokens, size.real_ids)
    config = checkpoint_config(size, tokenizer)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_text_files(folder, tokenizer)
    _write_speakers(folder / "spk_dict.pt", size, seed)
    scaling = _scaling(size, tokenizer, seed, outliers)
    shapes = _shapes(folder)
    check_space(folder, sum(stored_bytes(key, shape) for key, shape in shapes.items()), "checkpoint")
    write_shards(
        folder,
        shapes,
        scaling,
        seed=seed,
        shard_bytes=size.shard_bytes,
        metadata=size.metadata,
        progress=progress,
    )


def hub_key(key: str) -> str:
    """The published checkpoint's name of a parameter of transformers' model (which nests the thinker one deeper)."""
    key = re.sub(r"^thinker\.model\.(visual|audio_tower)\.", r"thinker.\1.", key)
    return re.sub(r"^thinker\.model\.language_model\.", "thinker.model.", key)


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Key -> shape, from transformers' own model on the meta device: no weight is made."""
    import torch
    from transformers import AutoConfig, Qwen2_5OmniForConditionalGeneration

    # It warns that thinker ids lie outside the talker's vocabulary; so they do in the published configs.
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = Qwen2_5OmniForConditionalGeneration(config)
    finally:
        logger.setLevel(level)
    shapes = {hub_key(key): tuple(value.shape) for key, value in model.state_dict().items()}
    # a buffer that transformers computes, and that the published files hold
    frequencies = model.token2wav.code2wav_dit_model.rotary_embed.inv_freq
    return shapes | {"token2wav.code2wav_dit_model.rotary_embed.inv_freq": tuple(frequencies.shape)}


def _scaling(size: Size, tokenizer: SyntheticTokenizer, seed: int, outliers: bool) -> Scaling:
    end = tokenizer.controls["<|im_end|>"]
    planted: dict[str, Outliers] = {}
    if outliers:
        text, talker = size.text, size.talker
        planted["thinker"] = _outliers(
            "thinker", text["hidden_size"], _head_dim(text), text["num_key_value_heads"], seed
        )
        planted["talker"] = _outliers(
            "talker", talker["hidden_size"], talker["head_dim"], talker["num_key_value_heads"], seed
        )
    dit_inputs = 80 + 128 + 192 + size.dit["emb_dim"]
    return Scaling(
        # Replies are made of trained text; the end token wins about one step in a hundred.
        text_rows={(tokenizer.trained, end): 0.05, (end, end + 1): 1.25, (end + 1, size.vocab_size): 0.05},
        # Codes stay inside the codebook, and the end code wins a step in a few hundred.
        codec_rows={
            (CODEBOOK, CODEC["end"]): 0.05,
            (CODEC["end"], CODEC["end"] + 1): 1.3,
            (CODEC["end"] + 1, CODEC_VOCAB): 0.05,
        },
        codec_std=0.9 * math.sqrt(dit_inputs / size.dit["emb_dim"]),
        wave_gain=size.wave_gain,
        outliers=planted,
    )


def _head_dim(text: Mapping[str, Any]) -> int:
    return int(text["hidden_size"]) // int(text["num_attention_heads"])


def _outliers(stack: str, hidden: int, head_dim: int, kv_heads: int, seed: int) -> Outliers:
    draw = generator(seed, f"{stack}:outliers")
    count = 3 if hidden < 512 else 6
    channels = sorted(draw.choice(hidden, count, replace=False).tolist())
    half = head_dim // 2
    key_bias: dict[int, float] = {}
    for head in range(kv_heads):
        # The slowest rotary pairs: a key that is constant there moves all scores alike, so attention survives it.
        for pair, low, high in ((half - 1, 40.0, 100.0), (half - 2, 10.0, 40.0)):
            first, second = draw.uniform(low, high, 2).tolist()
            key_bias[head * head_dim + pair] = first
            key_bias[head * head_dim + half + pair] = -second
    return Outliers(
        norm_gain=dict(zip(channels, draw.uniform(20.0, 60.0, count).tolist(), strict=True)),
        # together the channels carry a third of the residual's energy
        residual=math.sqrt(0.5 * hidden / count),
        key_bias=key_bias,
    )


def _write_speakers(path: Path, size: Size, seed: int) -> None:
    """spk_dict.pt: two voices with plain tensors and ints. Reference mels are natural-log, smooth in time."""
    import torch

    voices: dict[str, dict[str, Any]] = {}
    for name, frames, tilt in (("Chelsie", 150, (-3.5, -6.0)), ("Ethan", 203, (-5.5, -4.0))):
        draw = generator(seed, f"speaker:{name}")
        mel = draw.standard_normal((frames + 8, 80))
        smooth = np.stack([np.convolve(column, np.ones(9) / 3.0, mode="valid") for column in mel.T], axis=1)
        mel = smooth * 0.9 + np.linspace(*tilt, 80)
        voices[name] = {
            "bos_token": size.tts_end - TTS_FROM_END[name],
            "cond": torch.from_numpy(draw.standard_normal((1, 192)).astype(np.float32)),
            "ref_mel": torch.from_numpy(mel[None].astype(np.float32)),
        }
    torch.save(voices, path)
