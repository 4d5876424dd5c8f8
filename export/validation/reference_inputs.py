"""Make the reference's inputs from messages with transformers' chat template, tokenizer and processors.

``Qwen2_5OmniProcessor`` needs torchvision for its video processor, so its pieces are called one by one; placeholders
are expanded by its own functions and positions come from ``get_rope_index``. Video frames go through the PIL image
processor one at a time, and the two frames of a temporal patch are joined afterwards. No weights are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omniport.runtime.bundle.manifest import VisionFrontend
from omniport.runtime.errors import CheckpointError
from omniport.runtime.system.files import read_text

from ..checkpoint.checkpoint import Checkpoint
from ..evaluation.conversations import Conversation, Film
from .types import NoChatTemplate


@dataclass(frozen=True, eq=False)
class Inputs:
    """A prompt as the reference takes it.

    Attributes:
        token_ids: int64 [S]. positions: int64 [3, S]. next_position: of the reply's first token.
        features: media tensors by the names that the thinker's forward uses.
        heard: the prompt's videos have sound (``use_audio_in_video``).
        kinds: of each medium in order: audio, image, video.
        media_ids: placeholder ids of audio, image and video.
    """

    text: str
    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    next_position: int
    features: dict[str, torch.Tensor]
    heard: bool
    kinds: tuple[str, ...] = ()
    media_ids: tuple[int, ...] = ()

    def rope_arguments(self) -> tuple[Any, ...]:
        """Arguments of ``get_rope_index`` after the mask."""
        mask = self.features.get("feature_attention_mask")
        lengths = None if mask is None else mask.sum(dim=1)
        return self.heard, lengths, self.features.get("video_second_per_grid")


class Processor:
    """The checkpoint's processors.

    Args:
        vision: of the bundle; where it was exported with lower bounds of pixels, they hold here too.

    Raises:
        CheckpointError: the checkpoint lacks a processor's files.
    """

    def __init__(self, checkpoint: Checkpoint, vision: VisionFrontend | None = None) -> None:
        from transformers import AutoTokenizer, WhisperFeatureExtractor
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.config, self.speaks = checkpoint.config.thinker_config, checkpoint.has_speech
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint.path)
            self.extractor: Any = WhisperFeatureExtractor.from_pretrained(checkpoint.path)
            self.images: Any = Qwen2VLImageProcessorPil.from_pretrained(checkpoint.path)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{checkpoint.name} lacks files of transformers' tokenizer or processors: {error}. Copy "
                "tokenizer_config.json and preprocessor_config.json from the base model."
            ) from error
        self._still_size, self._clip_size = _sizes(self.images.size, vision)
        self.checkpoint = checkpoint
        self._prompts: dict[str, Inputs] = {}

    def prompt(self, conversation: Conversation) -> Inputs:
        """As ``inputs`` without the media, and once only for each built-in conversation."""
        if conversation.where:
            return replace(self.inputs(conversation), features={})
        if conversation.name not in self._prompts:
            self._prompts[conversation.name] = replace(self.inputs(conversation), features={})
        return self._prompts[conversation.name]

    def inputs(self, conversation: Conversation) -> Inputs:
        """Process a conversation that the reference supports (``Conversation.unsupported`` is empty).

        Raises:
            NoChatTemplate: the checkpoint has none, so there is no reference for its prompts.
        """
        media = _Media(self, conversation.heard)
        messages = conversation.decoded(self.speaks)
        parts = [part for message in messages for part in message["content"] if part["type"] != "text"]
        expansions = [(str(part["type"]), media.expand(part)) for part in parts]
        text = self.tokenizer.apply_chat_template(
            messages,
            chat_template=_chat_template(self.checkpoint, self.tokenizer),
            tokenize=False,
            add_generation_prompt=True,
        )
        text = _fill(text, [(getattr(self.tokenizer, f"{kind}_token"), inside) for kind, inside in expansions])
        ids = np.asarray(self.tokenizer(text, add_special_tokens=False).input_ids, np.int64)
        drawn = Inputs(text, ids, np.zeros((3, 0), np.int64), 0, media.features(), conversation.heard)
        replied = torch.from_numpy(np.append(ids, ids[-1]))[None]  # with a token of the reply, whichever it is
        places = self.rope_index(replied, drawn)
        config = self.config
        return replace(
            drawn,
            positions=places[:, :-1],
            next_position=int(places[0, -1]),
            kinds=tuple(kind for kind, _ in expansions),
            media_ids=(config.audio_token_id, config.image_token_id, config.video_token_id),
        )

    def rope_index(self, ids: torch.Tensor, inputs: Inputs) -> NDArray[np.int64]:
        """``get_rope_index`` of int64 [1, S] without padding: [3, S]."""
        from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as modeling

        source: Any = modeling.Qwen2_5OmniPreTrainedModelForConditionalGeneration
        # The method reads nothing of the model but this.
        model: Any = SimpleNamespace(
            config=self.config, spatial_merge_size=self.config.vision_config.spatial_merge_size
        )
        for name in ("get_llm_pos_ids_for_vision", "get_chunked_index"):
            setattr(model, name, getattr(source, name).__get__(model))
        grids = (inputs.features.get("image_grid_thw"), inputs.features.get("video_grid_thw"))
        positions, _ = source.get_rope_index(model, ids, *grids, torch.ones_like(ids), *inputs.rope_arguments())
        return np.array(positions[:, 0].numpy(), np.int64)

    def mel(self, samples: NDArray[np.float32]) -> tuple[torch.Tensor, torch.Tensor]:
        """input_features float32 [1, n_mels, padded] and the mask of valid frames [1, padded]."""
        out = self.extractor(
            samples, sampling_rate=16000, padding="max_length", return_attention_mask=True, return_tensors="pt"
        )
        return out["input_features"], out["attention_mask"]

    def still(self, pixels: NDArray[np.uint8], size: Mapping[str, int] | None = None) -> tuple[torch.Tensor, list[int]]:
        """Patches [N, 1176] and grid of one picture."""
        out = self.images(pixels, return_tensors="pt", size=dict(size or self._still_size))
        return out["pixel_values"], [int(n) for n in out["image_grid_thw"][0]]

    def clip(self, frames: NDArray[np.uint8]) -> tuple[torch.Tensor, list[int]]:
        """Patches [T * N, 1176] and grid of uint8 [F, H, W, 3]; an odd last frame is repeated."""
        frames = np.concatenate([frames, frames[-1:]]) if len(frames) % 2 else frames
        stills = [self.still(frame, self._clip_size) for frame in frames]
        _, rows, columns = stills[0][1]
        # A still is shown twice, [N, C, 2, 14, 14]: the first half of one and the second of the next make a pair.
        doubled = [patches.reshape(rows * columns, 3, 2, 14, 14) for patches, _ in stills]
        pairs = [torch.stack([a[:, :, 0], b[:, :, 1]], 2) for a, b in zip(doubled[::2], doubled[1::2], strict=True)]
        return torch.cat(pairs).reshape(len(pairs) * rows * columns, -1), [len(pairs), rows, columns]


def _sizes(own: Any, vision: VisionFrontend | None) -> tuple[dict[str, int], dict[str, int]]:
    """Bounds of pixels for pictures and for videos, in the words of the processors."""
    from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import Qwen2_5OmniProcessor

    sizes: list[dict[str, int]] = []
    videos: Any = Qwen2_5OmniProcessor.videos_kwargs["size"]  # type: ignore[typeddict-item, unused-ignore]
    for size, prefix in ((own, ""), (videos, "video_")):
        edges = {"shortest_edge": f"{prefix}min_pixels", "longest_edge": f"{prefix}max_pixels"}
        sizes.append(
            {edge: size[edge] if vision is None else min(size[edge], getattr(vision, n)) for edge, n in edges.items()}
        )
    return sizes[0], sizes[1]


@lru_cache(maxsize=1)
def open_processor(checkpoint: Checkpoint, vision: VisionFrontend | None = None) -> Processor:
    """The checkpoint's processors, kept for the groups of checks that follow each other.

    Raises:
        CheckpointError: as `Processor`.
    """
    return Processor(checkpoint, vision)


def _chat_template(checkpoint: Checkpoint, tokenizer: Any) -> str:
    """The checkpoint's template: chat_template.jinja, chat_template.json, or the tokenizer's own."""
    jinja, stored = checkpoint.path / "chat_template.jinja", checkpoint.path / "chat_template.json"
    if jinja.exists():
        return read_text(jinja)
    if stored.exists():
        return str(json.loads(read_text(stored))["chat_template"])
    if tokenizer.chat_template:
        return str(tokenizer.chat_template)
    raise NoChatTemplate(f"{checkpoint.name} has no chat template; copy chat_template.json from the base model.")


@dataclass
class _Media:
    """Media of one prompt, in order of appearance."""

    processor: Processor
    heard: bool
    mels: list[torch.Tensor] = field(default_factory=list)
    masks: list[torch.Tensor] = field(default_factory=list)
    images: list[tuple[torch.Tensor, list[int]]] = field(default_factory=list)
    videos: list[tuple[torch.Tensor, list[int]]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def expand(self, part: dict[str, Any]) -> str:
        """Keep one medium; gives the text that stands for it."""
        from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import Qwen2_5OmniProcessor as Reference

        kind, value, parts = part["type"], part[part["type"]], self._pieces()
        if kind == "audio":
            return str(Reference.replace_audio_token(parts, {"num_audio_tokens": [self._hear(value)]}, 0))
        if kind == "image":
            self.images.append(self.processor.still(value))
            return str(Reference.replace_image_token(parts, {"image_grid_thw": torch.tensor([self.images[-1][1]])}, 0))
        film: Film = value
        self.videos.append(self.processor.clip(film.frames))
        self.seconds.append(film.second_per_grid)
        grid = [self.videos[-1][1]]
        seen: dict[str, Any] = {"video_grid_thw": torch.tensor(grid), "video_second_per_grid": self.seconds[-1:]}
        if not self.heard or film.sound is None:
            return str(Reference.replace_video_token(parts, seen, 0, load_audio_from_video=False))
        seen["video_grid_thw"] = np.asarray(grid)
        sound = {"num_audio_tokens": [self._hear(film.sound)]}
        config = self.processor.config
        rates = {
            "position_id_per_seconds": config.position_id_per_seconds,
            "seconds_per_chunk": float(config.seconds_per_chunk),
        }
        return str(Reference.replace_video_with_audio_token(parts, seen, 0, sound, 0, **rates))

    def _pieces(self) -> Any:
        """What ``Qwen2_5OmniProcessor``'s methods read of their object."""
        from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import Qwen2_5OmniProcessor

        names = ("image_token", "audio_token", "video_token", "audio_bos_token", "audio_eos_token")
        merge = SimpleNamespace(merge_size=self.processor.images.merge_size)
        pieces: Any = SimpleNamespace(
            **{name: getattr(self.processor.tokenizer, name) for name in names},
            image_processor=merge,
            video_processor=merge,
        )
        pieces.get_chunked_index = lambda *arguments: Qwen2_5OmniProcessor.get_chunked_index(pieces, *arguments)
        return pieces

    def _hear(self, samples: NDArray[np.float32]) -> int:
        from transformers.models.qwen2_5_omni import processing_qwen2_5_omni as processing

        lengths: Any = processing._get_feat_extract_output_lengths
        mel, mask = self.processor.mel(samples)
        self.mels.append(mel)
        self.masks.append(mask)
        return int(lengths(mask.sum()))

    def features(self) -> dict[str, torch.Tensor]:
        features: dict[str, torch.Tensor] = {}
        if self.mels:
            features["input_features"] = torch.cat(self.mels)
            features["feature_attention_mask"] = torch.cat(self.masks)
        for kind, suffix, seen in (("image", "", self.images), ("video", "_videos", self.videos)):
            if seen:
                features[f"pixel_values{suffix}"] = torch.cat([patches for patches, _ in seen])
                features[f"{kind}_grid_thw"] = torch.tensor([grid for _, grid in seen])
        if self.seconds:
            features["video_second_per_grid"] = torch.tensor(self.seconds)
        return features


def _fill(text: str, expansions: Sequence[tuple[str, str]]) -> str:
    """Replace each placeholder token, in order, by its expansion."""
    filled = ""
    for token, inside in expansions:
        before, found, text = text.partition(token)
        if not found:
            raise CheckpointError(f"the chat template gave no {token} where a medium was given; is it this model's?")
        filled += before + inside
    return filled + text
