"""The manifest's fields that come from a checkpoint's settings: front ends, token ids, sampling defaults.

Read from config.json, preprocessor_config.json (or transformers 5's processor_config.json), generation_config.json and
the tokenizer. Values that two files state are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from omniport.runtime.bundle.manifest import (
    AudioFrontend,
    ChatSpec,
    CodecTokens,
    SamplingConfig,
    SpecialTokens,
    TextTokens,
    VisionFrontend,
)
from omniport.runtime.errors import CheckpointError
from omniport.runtime.system.files import read_file

from .checkpoint import Checkpoint
from .tokenizer_json import load_tokenizer

#: the system prompt that the model's page asks for when speech is wanted; the talker was trained with it
SPEECH_PROMPT = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory and "
    "visual inputs, as well as generating text and speech."
)

#: the default of Qwen2.5-Omni's chat template, for a checkpoint without one
TEXT_PROMPT = "You are a helpful assistant."

#: field of SpecialTokens -> string in the tokenizer
TOKEN_STRINGS: Mapping[str, str] = {
    "endoftext": "<|endoftext|>",
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "audio": "<|AUDIO|>",
    "audio_bos": "<|audio_bos|>",
    "audio_eos": "<|audio_eos|>",
    "vision_bos": "<|vision_bos|>",
    "vision_eos": "<|vision_eos|>",
    "image": "<|IMAGE|>",
    "video": "<|VIDEO|>",
}

#: field of SpecialTokens -> name under which thinker_config or talker_config may state the same id
_TOKEN_NAMES_IN_CONFIG: Mapping[str, str] = {
    "audio": "audio_token_index",
    "image": "image_token_index",
    "video": "video_token_index",
    "audio_bos": "audio_start_token_id",
    "audio_eos": "audio_end_token_id",
    "vision_bos": "vision_start_token_id",
    "vision_eos": "vision_end_token_id",
}


def audio_frontend(ckpt: Checkpoint) -> AudioFrontend:
    """Log-mel settings and encoder chunking. CheckpointError if the processor and the encoder disagree."""
    settings = _preprocessor(ckpt, "feature_extractor")
    encoder = ckpt.config.thinker_config.audio_config
    n_mels = int(_number(ckpt, settings, "feature_size", encoder.num_mel_bins))
    _same(ckpt, "feature_size (mel bins)", n_mels, "audio_config.num_mel_bins", encoder.num_mel_bins)
    return AudioFrontend(
        sampling_rate=int(_number(ckpt, settings, "sampling_rate", 16000)),
        n_fft=int(_number(ckpt, settings, "n_fft", 400)),
        hop_length=int(_number(ckpt, settings, "hop_length", 160)),
        n_mels=n_mels,
        chunk_frames=2 * encoder.n_window,
        # a convolution of stride 2, then average pooling by 2
        chunk_tokens=encoder.n_window // 2,
        max_seconds=_number(ckpt, settings, "chunk_length", 300),
    )


def vision_frontend(ckpt: Checkpoint) -> VisionFrontend:
    """Image preprocessing and window geometry. CheckpointError if the processor and the encoder disagree.

    Pixel limits are the checkpoint's; video limits are the reference processor's, which checkpoints do not store.
    """
    settings = _preprocessor(ckpt, "image_processor")
    encoder = ckpt.config.thinker_config.vision_config
    for ours, theirs in (
        ("patch_size", "patch_size"),
        ("temporal_patch_size", "temporal_patch_size"),
        ("merge_size", "spatial_merge_size"),
    ):
        wanted = getattr(encoder, theirs)
        _same(ckpt, ours, settings.get(ours, wanted), f"vision_config.{theirs}", wanted)
    size = settings.get("size") or {}
    try:
        mean, std = (tuple(float(value) for value in settings[name]) for name in ("image_mean", "image_std"))
        limits = [
            int(settings.get(name) or size[edge])
            for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
        ]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"preprocessor_config.json of {ckpt.name} lacks usable image_mean, image_std, min_pixels or max_pixels "
            f"({error!r}). Copy the file from the base model."
        ) from error
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0 or not 0 < limits[0] <= limits[1]:
        raise CheckpointError(
            f"preprocessor_config.json of {ckpt.name} has image_mean {mean}, image_std {std}, min_pixels {limits[0]}, "
            f"max_pixels {limits[1]}; expected three means, three positive deviations and 0 < min <= max."
        )
    return VisionFrontend(
        patch_size=encoder.patch_size,
        temporal_patch_size=encoder.temporal_patch_size,
        merge_size=encoder.spatial_merge_size,
        window_size=encoder.window_size,
        image_mean=(mean[0], mean[1], mean[2]),
        image_std=(std[0], std[1], std[2]),
        min_pixels=limits[0],
        max_pixels=limits[1],
    )


def bounded(
    frontend: VisionFrontend, max_pixels: int | None, fps: float | None, max_frames: int | None
) -> VisionFrontend:
    """A frontend whose pictures and frames have at most ``max_pixels``, its videos fewer frames; None: no change."""
    changes: dict[str, Any] = {} if fps is None else {"video_fps": fps}
    if max_frames is not None:
        changes["video_max_frames"] = max_frames
    if max_pixels is not None:
        # of a video, Qwen's tool takes at least 1.05 times the lower bound for the upper one
        bounds = {"min_pixels": 1.0, "max_pixels": 1.0, "video_min_pixels": 1.05, "video_max_pixels": 1.0}
        changes |= {name: min(getattr(frontend, name), int(max_pixels / part)) for name, part in bounds.items()}
    return msgspec.structs.replace(frontend, **changes)


def special_tokens(ckpt: Checkpoint) -> SpecialTokens:
    """Ids of the control tokens, looked up by their strings.

    Raises:
        CheckpointError: a string is not in the tokenizer, an id is outside the vocabulary, or config.json states
            another id.
    """
    tokenizer = load_tokenizer(ckpt)
    vocab_size = ckpt.config.thinker_config.text_config.vocab_size
    ids: dict[str, int] = {}
    for field, text in TOKEN_STRINGS.items():
        token_id = tokenizer.token_to_id(text)
        if token_id is None:
            raise CheckpointError(
                f"the tokenizer of {ckpt.name} has no token {text!r}. Copy the tokenizer files of the base model."
            )
        _in_vocabulary(ckpt, text, token_id, vocab_size)
        ids[field] = token_id
    parts = {"thinker_config": ckpt.config.thinker_config}
    if ckpt.has_speech:
        parts["talker_config"] = ckpt.config.talker_config
    for part, config in parts.items():
        for field, name in _TOKEN_NAMES_IN_CONFIG.items():
            stated = getattr(config, name, None)
            if stated is not None:
                _same(ckpt, f"the tokenizer's {TOKEN_STRINGS[field]}", ids[field], f"{part}.{name}", stated)
    return SpecialTokens(**ids)


def chat_spec(ckpt: Checkpoint) -> ChatSpec:
    """System prompt and stop ids: im_end, endoftext, and what generation_config.json or config.json call eos.

    A checkpoint that speaks has the speech prompt, any other the default of its own chat template.

    Raises:
        CheckpointError: the chat template is not ChatML or cannot be used, or a stop id is outside the vocabulary.
    """
    template = _chat_template(ckpt)
    tokens = special_tokens(ckpt)
    if template is not None and TOKEN_STRINGS["im_start"] not in template:
        raise CheckpointError(
            f"the chat template of {ckpt.name} does not use {TOKEN_STRINGS['im_start']}; omniport builds ChatML "
            "prompts. Use a checkpoint that keeps Qwen2.5-Omni's chat format."
        )
    text = ckpt.config.thinker_config.text_config
    stop = [tokens.im_end, tokens.endoftext]
    stated = [(ckpt.json("generation_config.json") or {}).get("eos_token_id")]
    stated += [getattr(config, "eos_token_id", None) for config in (ckpt.config.thinker_config, text)]
    for eos in stated:
        stop += eos if isinstance(eos, list) else [] if eos is None else [eos]
    for token_id in stop:
        _in_vocabulary(ckpt, "eos_token_id", token_id, text.vocab_size)
    prompt = SPEECH_PROMPT if ckpt.has_speech else _default_prompt(ckpt, template)
    return ChatSpec(system_prompt=prompt, stop=tuple(dict.fromkeys(stop)))


def text_tokens(ckpt: Checkpoint) -> TextTokens:
    """Thinker-vocabulary ids that condition the talker. CheckpointError if one is outside that vocabulary."""
    talker = ckpt.config.talker_config
    ids = {name: getattr(talker, f"tts_text_{key}_token_id") for name, key in _TTS_NAMES.items()}
    for name, token_id in ids.items():
        _in_vocabulary(ckpt, f"tts text {name}", token_id, ckpt.config.thinker_config.text_config.vocab_size)
    return TextTokens(**ids)


def codec_tokens(ckpt: Checkpoint) -> CodecTokens:
    """Talker-vocabulary ids. Speech stops on pad or eos, and bos is never sampled (the reference's ``generate``).

    Raises:
        CheckpointError: an id is outside the talker's vocabulary.
    """
    talker = ckpt.config.talker_config
    ids = {name: getattr(talker, f"tts_codec_{key}_token_id") for name, key in (_TTS_NAMES | {"mask": "mask"}).items()}
    for name, token_id in ids.items():
        _in_vocabulary(ckpt, f"tts codec {name}", token_id, talker.vocab_size)
    return CodecTokens(**ids, stop=(ids["pad"], ids["eos"]), suppress=(ids["bos"],))


def sampling_defaults(ckpt: Checkpoint) -> tuple[SamplingConfig, SamplingConfig]:
    """Defaults of the reference's ``generate``: thinker (greedy) and talker."""
    talker = SamplingConfig(max_new_tokens=4096, temperature=0.9, top_k=40, top_p=0.8, repetition_penalty=1.05)
    return SamplingConfig(max_new_tokens=1024), talker


_TTS_NAMES = {"bos": "start", "eos": "end", "pad": "pad"}


def _number(ckpt: Checkpoint, settings: Mapping[str, Any], name: str, default: float) -> float:
    """A setting of the preprocessor. CheckpointError unless it is a number above 0 and below 1e9."""
    value = settings.get(name, default)
    if not isinstance(value, (int, float)) or not 0 < value < 1e9:
        raise CheckpointError(
            f"preprocessor_config.json of {ckpt.name} has {name} {value!r}; a number above 0 up to 1e9 was expected. "
            "Copy the file from the base model."
        )
    return float(value)


def _preprocessor(ckpt: Checkpoint, part: str) -> dict[str, Any]:
    """Settings of one processor: the flat preprocessor_config.json, else its section of processor_config.json."""
    flat = ckpt.json("preprocessor_config.json")
    if flat is not None:
        return flat
    section = (ckpt.json("processor_config.json") or {}).get(part)
    if not isinstance(section, dict):
        raise CheckpointError(f"{ckpt.name} has no preprocessor_config.json. Copy the file from the base model.")
    return section


def _chat_template(ckpt: Checkpoint) -> str | None:
    path = ckpt.path / "chat_template.jinja"
    if path.exists():
        return read_file(path, 1 << 24).decode("utf-8-sig", errors="replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = (ckpt.json(name) or {}).get("chat_template")
        if isinstance(template, str):
            return template
    return None


def _default_prompt(ckpt: Checkpoint, template: str | None) -> str:
    """The system message that a chat template puts before a user's; empty if it puts none."""
    if template is None:
        return TEXT_PROMPT
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    user = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    try:
        text = str(render_jinja_template(conversations=[user], chat_template=template)[0][0])
    except (TemplateError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(
            f"the chat template of {ckpt.name} cannot be used: {error}. Copy it from the base model."
        ) from error
    opening, _, rest = text.lstrip().partition(f"{TOKEN_STRINGS['im_start']}system\n")
    return "" if opening else rest.partition(TOKEN_STRINGS["im_end"])[0]


def _same(ckpt: Checkpoint, first: str, got: object, second: str, wanted: object) -> None:
    if got != wanted:
        raise CheckpointError(
            f"{ckpt.name} contradicts itself: {first} is {got} and {second} is {wanted}. Its files come from different "
            "models; take all of them from one."
        )


def _in_vocabulary(ckpt: Checkpoint, name: str, token_id: object, vocab_size: int) -> None:
    if not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
        raise CheckpointError(
            f"{ckpt.name}: {name} has id {token_id}, expected an integer from 0 to {vocab_size - 1} (the vocabulary)."
        )
