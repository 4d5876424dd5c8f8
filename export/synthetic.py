"""Random-weight Qwen2.5-Omni checkpoints in the exact Hugging Face layout.

``tiny`` is for tests: every structural feature of the real model in under 10 M parameters, control tokens at other
ids. ``small`` is for benchmarks: the 3B's layer widths and vocabulary with 4 layers in each stack.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omniport.runtime.errors import ExportError, UsageError

from .synthetic_tokenizer import SyntheticTokenizer, train_tokenizer, write_text_files
from .synthetic_weights import Outliers, Progress, Scaling, generator, write_shards

__all__ = ["SIZES", "hub_key", "make_checkpoint"]


@dataclass(frozen=True)
class _Size:
    """Geometry of one size; every width is spelled out in its configs."""

    regular_tokens: int
    real_ids: bool
    vocab_size: int
    shard_bytes: int
    wave_gain: float
    text: Mapping[str, Any]
    audio: Mapping[str, Any]
    vision: Mapping[str, Any]
    talker: Mapping[str, Any]
    dit: Mapping[str, Any]
    vocoder_channels: int


SIZES: Mapping[str, _Size] = {
    "tiny": _Size(
        regular_tokens=768,
        real_ids=False,
        vocab_size=1024,
        shard_bytes=4 << 20,
        wave_gain=0.09,
        text={
            "hidden_size": 128,
            "intermediate_size": 320,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "mrope_section": [4, 6, 6],
            # not the real 1e6, with which heads this narrow would hardly turn with an image's width
            "rope_theta": 10000.0,
        },
        audio={"d_model": 96, "encoder_attention_heads": 4, "encoder_ffn_dim": 192, "encoder_layers": 2},
        vision={
            "depth": 4,
            "hidden_size": 64,
            "intermediate_size": 172,
            "num_heads": 2,
            "fullatt_block_indexes": [1, 3],
        },
        talker={
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "mrope_section": [8, 8, 0],
            "rope_theta": 10000.0,
        },
        dit={
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "head_dim": 32,
            "emb_dim": 64,
            "look_ahead_layers": [2],
            "look_backward_layers": [0, 3],
            "enc_channels": [32, 32, 32, 32, 96],
            "enc_attention_channels": 16,
            "enc_se_channels": 16,
        },
        vocoder_channels=128,
    ),
    "small": _Size(
        regular_tokens=1024,
        real_ids=True,
        vocab_size=151936,
        shard_bytes=1 << 30,
        wave_gain=0.08,
        text={
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 4,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "mrope_section": [16, 24, 24],
            "rope_theta": 1000000.0,
        },
        audio={"d_model": 1280, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120, "encoder_layers": 4},
        vision={
            "depth": 4,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "fullatt_block_indexes": [1, 3],
        },
        talker={
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 4,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "mrope_section": [16, 16, 0],
            "rope_theta": 1000000.0,
        },
        dit={
            "hidden_size": 1024,
            "num_hidden_layers": 4,
            "num_attention_heads": 16,
            "head_dim": 64,
            "emb_dim": 512,
            "look_ahead_layers": [2],
            "look_backward_layers": [0, 3],
            "enc_channels": [256, 256, 256, 256, 768],
            "enc_attention_channels": 64,
            "enc_se_channels": 64,
        },
        vocoder_channels=1536,
    ),
}

# Ids of the talker's own vocabulary are the real ones in both sizes.
_CODEC_VOCAB = 8448
_CODEBOOK = 8193
_CODEC = {"pad": 8292, "start": 8293, "end": 8294, "mask": 8296}
# Where the text-to-speech ids sit, counted back from the end of the 3B's vocabulary (no token has these names).
_TTS_FROM_END = {"pad": 77, "start": 76, "end": 75, "Ethan": 66, "Chelsie": 64}


def make_checkpoint(
    out: Path, size: str, seed: int = 0, outliers: bool = False, progress: Progress | None = None
) -> Path:
    """Write a random-weight checkpoint folder.

    Args:
        out: folder to make; it must not exist, or be empty.
        size: ``tiny`` (under 10 M parameters) or ``small`` (the 3B's widths, 1.4 B parameters, 2.8 GB).
        seed: same seed, same bytes.
        outliers: plant large activation channels and key biases in thinker and talker, as trained Qwen2.5 has them.
        progress: called with (tensor name, bytes done, bytes in all).

    Returns:
        ``out``.

    Raises:
        UsageError: unknown size, or ``out`` is a file or a folder with something in it.
        ExportError: the files cannot be written, or the export extra is not installed. Nothing is left behind.
    """
    out = Path(out)
    if size not in SIZES:
        raise UsageError(f"unknown checkpoint size {size!r}; expected one of: {', '.join(SIZES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not an empty folder; give a new folder, or remove it first")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            _write(aside, SIZES[size], seed, outliers, progress)
            aside.chmod(0o755)
            if out.exists():
                out.rmdir()
            os.replace(aside, out)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
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


def _write(folder: Path, size: _Size, seed: int, outliers: bool, progress: Progress | None) -> None:
    tokenizer = train_tokenizer(size.regular_tokens, size.real_ids)
    config = _config(size, tokenizer)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_text_files(folder, tokenizer)
    _write_speakers(folder / "spk_dict.pt", size, seed)
    scaling = _scaling(size, tokenizer, seed, outliers)
    shapes = _shapes(folder)
    write_shards(folder, shapes, scaling, seed=seed, shard_bytes=size.shard_bytes, progress=progress)


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
    return {hub_key(key): tuple(value.shape) for key, value in model.state_dict().items()}


def _scaling(size: _Size, tokenizer: SyntheticTokenizer, seed: int, outliers: bool) -> Scaling:
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
        # Codes stay inside the codebook, and the end code wins a step in about a hundred.
        codec_rows={
            (_CODEBOOK, _CODEC["end"]): 0.05,
            (_CODEC["end"], _CODEC["end"] + 1): 1.5,
            (_CODEC["end"] + 1, _CODEC_VOCAB): 0.05,
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


# --- config.json ---------------------------------------------------------------------------------------------


def _config(size: _Size, tokenizer: SyntheticTokenizer) -> dict[str, Any]:
    """config.json with the keys that the published checkpoints have."""
    tts = {name: size.vocab_size - back for name, back in _TTS_FROM_END.items()}
    ids = tokenizer.controls
    shared = {
        "audio_token_index": ids["<|AUDIO|>"],
        "image_token_index": ids["<|IMAGE|>"],
        "video_token_index": ids["<|VIDEO|>"],
        "audio_start_token_id": ids["<|audio_bos|>"],
        "audio_end_token_id": ids["<|audio_eos|>"],
        "vision_start_token_id": ids["<|vision_bos|>"],
        "vision_end_token_id": ids["<|vision_eos|>"],
        "position_id_per_seconds": 25,
        "seconds_per_chunk": 2,
        "torch_dtype": "bfloat16",
    }
    thinker = {
        **shared,
        "model_type": "qwen2_5_omni_thinker",
        "bos_token_id": ids["<|im_start|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "user_token_id": tokenizer.user_token,
        "vision_token_id": ids["<|vision_pad|>"],
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "audio_config": _audio_config(size),
        "text_config": _text_config(size),
        "vision_config": _vision_config(size),
    }
    talker = {
        **shared,
        "model_type": "qwen2_5_omni_talker",
        "embedding_size": size.text["hidden_size"],
        "vocab_size": _CODEC_VOCAB,
        **{f"tts_codec_{name}_token_id": value for name, value in _CODEC.items()},
        **{f"tts_text_{name}_token_id": tts[name] for name in ("start", "end", "pad")},
        "spatial_merge_size": 2,
        **_decoder_keys(size.talker),
    }
    return {
        "architectures": ["Qwen2_5OmniModel"],
        "model_type": "qwen2_5_omni",
        "enable_audio_output": True,
        "enable_talker": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.52.0",
        "thinker_config": thinker,
        "talker_config": talker,
        "token2wav_config": _token2wav_config(size),
    }


def _decoder_keys(geometry: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in geometry.items() if key != "mrope_section"}
    return {
        **plain,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 32768,
        "max_window_layers": geometry["num_hidden_layers"],
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_section": geometry["mrope_section"], "rope_type": "default", "type": "default"},
        "sliding_window": 32768,
        "use_cache": True,
        "use_sliding_window": False,
    }


def _text_config(size: _Size) -> dict[str, Any]:
    return {
        "model_type": "qwen2_5_omni_text",
        "vocab_size": size.vocab_size,
        "tie_word_embeddings": False,
        **_decoder_keys(size.text),
    }


def _audio_config(size: _Size) -> dict[str, Any]:
    return {
        "model_type": "qwen2_5_omni_audio_encoder",
        "activation_function": "gelu",
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "max_source_positions": 1500,
        "n_window": 100,
        "num_hidden_layers": size.audio["encoder_layers"],
        "num_mel_bins": 128,
        "output_dim": size.text["hidden_size"],
        "scale_embedding": False,
        **size.audio,
    }


def _vision_config(size: _Size) -> dict[str, Any]:
    return {
        "model_type": "qwen2_5_omni_vision_encoder",
        "embed_dim": size.vision["hidden_size"],
        "hidden_act": "silu",
        "in_channels": 3,
        "in_chans": 3,
        "out_hidden_size": size.text["hidden_size"],
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "tokens_per_second": 25,
        "window_size": 112,
        **size.vision,
    }


def _token2wav_config(size: _Size) -> dict[str, Any]:
    dit = {
        "model_type": "qwen2_5_omni_dit",
        "block_size": 24,
        "dropout": 0.1,
        "enc_dilations": [1, 2, 3, 4, 1],
        "enc_dim": 128,
        "enc_emb_dim": 192,
        "enc_kernel_sizes": [5, 3, 3, 3, 1],
        "enc_res2net_scale": 2,
        "ff_mult": 2,
        "max_position_embeddings": 32768,
        "mel_dim": 80,
        "num_embeds": _CODEBOOK,
        "repeats": 2,
        "rope_theta": 10000.0,
        **size.dit,
    }
    # the published files also name the DiT's geometry in its first generation of keys
    dit |= {"dim": dit["hidden_size"], "depth": dit["num_hidden_layers"], "heads": dit["num_attention_heads"]}
    vocoder = {
        "model_type": "qwen2_5_omni_bigvgan",
        "mel_dim": 80,
        "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
        "resblock_kernel_sizes": [3, 7, 11],
        "upsample_initial_channel": size.vocoder_channels,
        "upsample_kernel_sizes": [11, 7, 4, 4, 4, 4],
        "upsample_rates": [5, 3, 2, 2, 2, 2],
    }
    return {"model_type": "qwen2_5_omni_token2wav", "bigvgan_config": vocoder, "dit_config": dit}


def _write_speakers(path: Path, size: _Size, seed: int) -> None:
    """spk_dict.pt: two voices with plain tensors and ints. Reference mels are natural-log, smooth in time."""
    import torch

    voices: dict[str, dict[str, Any]] = {}
    for name, frames, tilt in (("Chelsie", 150, (-3.5, -6.0)), ("Ethan", 203, (-5.5, -4.0))):
        draw = generator(seed, f"speaker:{name}")
        mel = draw.standard_normal((frames + 8, 80))
        smooth = np.stack([np.convolve(column, np.ones(9) / 3.0, mode="valid") for column in mel.T], axis=1)
        mel = smooth * 0.9 + np.linspace(*tilt, 80)
        voices[name] = {
            "bos_token": size.vocab_size - _TTS_FROM_END[name],
            "cond": torch.from_numpy(draw.standard_normal((1, 192)).astype(np.float32)),
            "ref_mel": torch.from_numpy(mel[None].astype(np.float32)),
        }
    torch.save(voices, path)
