"""Write the tokenizer, processor and chat template files of a synthetic checkpoint.

The tokenizer is a byte-level BPE of Qwen2's construction (NFC, Qwen2's pre-tokenizer split, byte alphabet), trained
here on the sentences below: small, but with the real control strings and a real merge table.
"""

# ruff: noqa: RUF001 (the training text is multilingual, full-width marks included)

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.control_tokens import CONTROL_TOKENS

_PLAIN_CONTROLS = frozenset(CONTROL_TOKENS[14:])  # Qwen2's files mark these as added but not special
_FIRST_REAL_ID = 151643

# Qwen2's split: contractions, words with one leading mark, single digits, punctuation runs, line ends, spaces.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_CORPUS = """
The kettle on the narrow shelf began to sing before anyone had noticed the rain against the window.
A small boat drifted past the lighthouse while the keeper counted gulls and wrote their number in a blue book.
What do you see in this picture? I see two red circles, a green square and a long grey shadow behind them.
What do you hear in this recording? I hear a bell, then a door, then somebody walking slowly up the stairs.
Please describe the sound, the image and the video, and answer the question with one short sentence.
user assistant system user assistant system user assistant system user assistant system
The user asks and the assistant answers. The user listens and the assistant speaks. The system waits.
Every morning the baker opened the oven at five, and the warm smell of bread woke the whole street.
Numbers are patient things: one, two, three, four, five, six, seven, eight, nine, ten, and so on for ever.
If the train is late, we will walk along the river and talk about music, weather and machines.
Their grandmother kept a garden of herbs, beans and tall yellow flowers that turned to follow the sun.
He couldn't say why it's colder today; she'd guess that the wind has changed, and they're both right.
Small models make quick tests, and quick tests make careful engineers. Write it down, measure it, then decide.
Le petit chat noir dort sous la table, et la pluie tombe doucement sur les toits de la ville.
Der alte Zug fährt über die Brücke, während die Kinder am Fluss spielen und laut lachen.
El río baja de la montaña con agua fría, y los árboles cantan cuando sopla el viento.
Il mercato apre presto la mattina: pane, formaggio, pomodori e tante voci allegre.
今天的天气很好，我们一起去公园散步，听鸟儿唱歌。你看到了什么？我看到一只小猫。
朝の光が窓から入り、静かな部屋に音楽が流れています。何が聞こえますか。
오늘은 바람이 불고 하늘이 맑습니다. 무엇을 보고 있나요?
Сегодня утром мы слушали, как дождь стучит по крыше старого дома.
"""


@dataclass(frozen=True)
class SyntheticTokenizer:
    """A trained vocabulary and where its control tokens sit."""

    document: dict[str, Any]
    """tokenizer.json"""
    vocab: dict[str, int]
    """regular tokens"""
    trained: int
    """the first so many ids are real text; later regular ids are padding that text never becomes"""
    controls: dict[str, int]
    user_token: int
    """id of the word "user" (``user_token_id`` of the thinker's config)"""


def control_ids(first: int, reverse: bool) -> dict[str, int]:
    """Ids of the control strings from ``first`` on, in the real order or backwards (so that offsets differ too)."""
    order = CONTROL_TOKENS[::-1] if reverse else CONTROL_TOKENS
    return {token: first + i for i, token in enumerate(order)}


def train_tokenizer(regular_tokens: int, real_ids: bool, sentences: Iterable[str] = ()) -> SyntheticTokenizer:
    """Train the BPE.

    Args:
        regular_tokens: vocabulary size before control tokens.
        real_ids: put control tokens at Qwen2.5-Omni's ids (padding the vocabulary up to them); otherwise right
            after the regular ones, in reverse order.
        sentences: to train on, besides the module's own.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=regular_tokens,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator([*_CORPUS.strip().splitlines(), *sentences], trainer)
    document: dict[str, Any] = json.loads(tokenizer.to_str())
    vocab: dict[str, int] = document["model"]["vocab"]
    trained = len(vocab)
    if real_ids:
        # Added tokens must follow the regular ones without a gap: fill it with entries that no merge can reach.
        vocab.update({f"[unused{i}]": i for i in range(trained, _FIRST_REAL_ID)})
    controls = control_ids(len(vocab), reverse=not real_ids)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    document["added_tokens"] = [
        {"id": i, "content": token, **flags, "special": token not in _PLAIN_CONTROLS} for token, i in controls.items()
    ]
    return SyntheticTokenizer(
        document=document, vocab=vocab, trained=trained, controls=controls, user_token=vocab["user"]
    )


def _tokenizer_config(tokenizer: SyntheticTokenizer) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(i): {"content": token, **flags, "special": token not in _PLAIN_CONTROLS}
            for token, i in sorted(tokenizer.controls.items(), key=lambda item: item[1])
        },
        "additional_special_tokens": [t for t in CONTROL_TOKENS if t not in _PLAIN_CONTROLS],
        "audio_bos_token": "<|audio_bos|>",
        "audio_eos_token": "<|audio_eos|>",
        "audio_token": "<|AUDIO|>",
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "image_token": "<|IMAGE|>",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "processor_class": "Qwen2_5OmniProcessor",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
        "video_token": "<|VIDEO|>",
        "vision_bos_token": "<|vision_bos|>",
        "vision_eos_token": "<|vision_eos|>",
    }


_PREPROCESSOR = {
    "chunk_length": 300,
    "dither": 0.0,
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 128,
    "hop_length": 160,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_pixels": 12845056,
    "merge_size": 2,
    "min_pixels": 3136,
    "n_fft": 400,
    "n_samples": 4800000,
    "nb_max_frames": 30000,
    "padding_side": "right",
    "padding_value": 0.0,
    "patch_size": 14,
    "processor_class": "Qwen2_5OmniProcessor",
    "return_attention_mask": True,
    "sampling_rate": 16000,
    "temporal_patch_size": 2,
}

_CHAT_TEMPLATE = """\
{%- if messages and messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for turn in messages -%}
{{- '<|im_start|>' + turn['role'] + '\\n' -}}
{%- if turn['content'] is string -%}
{{- turn['content'] -}}
{%- else -%}
{%- for part in turn['content'] -%}
{%- if part['type'] == 'text' -%}
{{- part['text'] -}}
{%- elif part['type'] == 'image' -%}
{{- '<|vision_bos|><|IMAGE|><|vision_eos|>' -}}
{%- elif part['type'] == 'audio' -%}
{{- '<|audio_bos|><|AUDIO|><|audio_eos|>' -}}
{%- elif part['type'] == 'video' -%}
{{- '<|vision_bos|><|VIDEO|><|vision_eos|>' -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def write_text_files(folder: Path, tokenizer: SyntheticTokenizer) -> None:
    """Write tokenizer, preprocessor, chat template and generation files into ``folder``."""
    merges = ["#version: 0.2", *(" ".join(pair) for pair in tokenizer.document["model"]["merges"])]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
    ordered = dict(sorted(tokenizer.vocab.items(), key=lambda item: item[1]))
    documents: Mapping[str, Mapping[str, Any]] = {
        "tokenizer.json": tokenizer.document,
        "vocab.json": ordered,
        "added_tokens.json": tokenizer.controls,
        "tokenizer_config.json": _tokenizer_config(tokenizer),
        "special_tokens_map.json": {
            "additional_special_tokens": [t for t in CONTROL_TOKENS if t not in _PLAIN_CONTROLS],
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
        },
        "preprocessor_config.json": _PREPROCESSOR,
        "chat_template.json": {"chat_template": _CHAT_TEMPLATE},
        "generation_config.json": {
            "_from_model_config": True,
            "bos_token_id": tokenizer.controls["<|im_start|>"],
            "eos_token_id": tokenizer.controls["<|im_end|>"],
            "pad_token_id": tokenizer.controls["<|endoftext|>"],
            "transformers_version": "4.52.0",
        },
    }
    for name, document in documents.items():
        text = json.dumps(document, ensure_ascii=False, indent=2)
        (folder / name).write_text(text + "\n", encoding="utf-8")
