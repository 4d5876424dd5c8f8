"""Geometries of the synthetic checkpoints (tiny, small, 3b, 7b), and their config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .tokenizer_files import SyntheticTokenizer


@dataclass(frozen=True)
class Size:
    """Geometry of one size; every width is spelled out in its configs."""

    regular_tokens: int
    real_ids: bool
    vocab_size: int
    tts_end: int
    """text-to-speech ids count back from here: the end of the 3B's vocabulary, in the 7B's larger one too"""
    shard_bytes: int
    wave_gain: float
    text: Mapping[str, Any]
    audio: Mapping[str, Any]
    vision: Mapping[str, Any]
    talker: Mapping[str, Any]
    dit: Mapping[str, Any]
    vocoder_channels: int
    metadata: bool = True
    """whether a shard's header says that its tensors are PyTorch's, as the published 3B's do and the 7B's do not"""


_TINY = Size(
    regular_tokens=768,
    real_ids=False,
    vocab_size=1024,
    tts_end=1024,
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
)
_SMALL = Size(
    regular_tokens=1024,
    real_ids=True,
    vocab_size=151936,
    tts_end=151936,
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
)
# Qwen2.5-Omni-3B and -7B: the encoders and token2wav are the same, and so are the widths of small
_3B = replace(
    _SMALL,
    shard_bytes=5 * 10**9,
    text={**_SMALL.text, "num_hidden_layers": 36},
    audio={**_SMALL.audio, "encoder_layers": 32},
    vision={**_SMALL.vision, "depth": 32, "fullatt_block_indexes": [7, 15, 23, 31]},
    talker={**_SMALL.talker, "num_hidden_layers": 24},
    dit={**_SMALL.dit, "num_hidden_layers": 22, "look_ahead_layers": [10], "look_backward_layers": [0, 20]},
)
_7B = replace(
    _3B,
    vocab_size=152064,
    metadata=False,
    text={
        **_3B.text,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    talker={
        **_3B.talker,
        "intermediate_size": 18944,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "mrope_section": [16, 24, 24],
    },
)
SIZES: Mapping[str, Size] = {"tiny": _TINY, "small": _SMALL, "3b": _3B, "7b": _7B}

# Ids of the talker's own vocabulary are the real ones in all sizes.
CODEC_VOCAB = 8448
CODEBOOK = 8193
CODEC = {"pad": 8292, "start": 8293, "end": 8294, "mask": 8296}
# Where the text-to-speech ids sit, counted back from the end of the 3B's vocabulary (no token has these names).
TTS_FROM_END = {"pad": 77, "start": 76, "end": 75, "Ethan": 66, "Chelsie": 64}


def geometry_config(size: Size) -> dict[str, Any]:
    """The part of config.json that states sizes: what a plan needs, without the ids of a tokenizer."""
    return {
        "model_type": "qwen2_5_omni",
        "thinker_config": {
            "audio_config": _audio_config(size),
            "text_config": _text_config(size),
            "vision_config": _vision_config(size),
        },
        "talker_config": {
            "embedding_size": size.text["hidden_size"],
            "vocab_size": CODEC_VOCAB,
            **_decoder_keys(size.talker),
        },
        "token2wav_config": _token2wav_config(size),
    }


def checkpoint_config(size: Size, tokenizer: SyntheticTokenizer) -> dict[str, Any]:
    """config.json with the keys that the published checkpoints have."""
    tts = {name: size.tts_end - back for name, back in TTS_FROM_END.items()}
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
        "vocab_size": CODEC_VOCAB,
        **{f"tts_codec_{name}_token_id": value for name, value in CODEC.items()},
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


def _text_config(size: Size) -> dict[str, Any]:
    return {
        "model_type": "qwen2_5_omni_text",
        "vocab_size": size.vocab_size,
        "tie_word_embeddings": False,
        **_decoder_keys(size.text),
    }


def _audio_config(size: Size) -> dict[str, Any]:
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


def _vision_config(size: Size) -> dict[str, Any]:
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


def _token2wav_config(size: Size) -> dict[str, Any]:
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
        "num_embeds": CODEBOOK,
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
