"""transformers' Qwen2.5-Omni as the oracle: messages in, ids, activations and waveform out.

Nothing here uses omniport: text goes through the checkpoint's chat template and tokenizer, media through transformers'
feature extractor and PIL image processor, placeholders through ``Qwen2_5OmniProcessor``'s own functions, and the reply
through ``Qwen2_5OmniForConditionalGeneration.generate``. Hooks on the modules record what went through them.

``Qwen2_5OmniProcessor`` itself needs torchvision for its video processor, so its pieces are called one by one. Video
frames go through the image processor one at a time (Pillow's bicubic in place of torchvision's) and the two frames of
a temporal patch are joined afterwards.

**The talker's mask.** ``generate`` of transformers 5.23 drops an attention mask that is all ones. The talker's forward
adds the codec-pad and codec-bos embeddings and computes 3-D positions only ``if attention_mask is not None``: without
padding it would leave all that out, against its own batches and earlier releases. ``generate`` here gives the talker
that mask back; with ``padding`` it leaves transformers untouched: a padded prompt keeps its mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, Qwen2_5OmniForConditionalGeneration, WhisperFeatureExtractor
from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import Qwen2_5OmniProcessor
from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import (
    _get_feat_extract_output_lengths as audio_output_length,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

Floats = NDArray[np.float32]

#: the system prompt that speech was trained with (the model card's)
SYSTEM = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory and "
    "visual inputs, as well as generating text and speech."
)
FPS = 2.0


def relative_rms(got: NDArray[Any], want: NDArray[Any]) -> float:
    """Root mean square of the difference over that of ``want``."""
    assert got.shape == want.shape, (got.shape, want.shape)
    want = want.astype(np.float64)
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


@dataclass
class Inputs:
    """A prompt as the model takes it.

    Attributes:
        token_ids: int64 [S]. positions: int64 [3, S], and that of the reply's first token, by ``get_rope_index``.
        features: media tensors by the names that the thinker's forward uses.
    """

    text: str
    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    next_position: int
    features: dict[str, Any]
    use_audio_in_video: bool


@dataclass
class DecoderTrace:
    """Everything that one decoder consumed and gave, token by token.

    Attributes:
        embeds: [n, E]. positions: int64 [3, n]. hidden: [n, H], the thinker's only.
        logits: [V] by the index of the token after which they came.
    """

    _embeds: list[Floats] = field(default_factory=list)
    _positions: list[NDArray[np.int64]] = field(default_factory=list)
    _hidden: list[Floats] = field(default_factory=list)
    logits: dict[int, Floats] = field(default_factory=dict)

    @property
    def embeds(self) -> Floats:
        return np.concatenate(self._embeds)

    @property
    def positions(self) -> NDArray[np.int64]:
        return np.concatenate(self._positions, axis=1)

    @property
    def hidden(self) -> Floats:
        return np.concatenate(self._hidden)

    @property
    def length(self) -> int:
        return sum(len(part) for part in self._embeds)

    def consume(self, embeds: NDArray[Any], positions: NDArray[Any], hidden: NDArray[Any] | None = None) -> None:
        """Tokens that went in: embeds [S, E], positions [3, S]; hidden [S, H] if it is known already."""
        self._embeds.append(np.array(embeds))
        self._positions.append(np.array(positions))
        if hidden is not None:
            self._hidden.append(np.array(hidden))

    def gave(self, logits: NDArray[Any]) -> None:
        """Logits [V] after the last of the tokens consumed so far."""
        self.logits[self.length - 1] = np.array(logits)


@dataclass
class Reply:
    """What a model said. ``token_ids`` and ``codec_ids`` hold no stop id; mel is float32 [80, T]."""

    token_ids: list[int]
    codec_ids: list[int]
    waveform: Floats
    mel: Floats
    thinker: DecoderTrace
    talker: DecoderTrace


class Reference:
    """The checkpoint in float32 on the CPU."""

    def __init__(self, checkpoint: Path) -> None:
        self.model: Any = Qwen2_5OmniForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
        self.template = (checkpoint / "chat_template.jinja").read_text()
        self.extractor: Any = WhisperFeatureExtractor.from_pretrained(checkpoint)
        self.images: Any = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)

    def inputs(self, messages: Sequence[Mapping[str, Any]], use_audio_in_video: bool = False) -> Inputs:
        """Process messages whose media are decoded already.

        Args:
            messages: parts ``audio`` hold float32 [n] at 16 kHz, ``image`` uint8 [H, W, 3], ``video`` a pair of uint8
                [F, H, W, 3] at 2 frames a second and its sound or None. A system message must be given.
        """
        media = _Media(self)
        parts = [p for m in messages if not isinstance(m["content"], str) for p in m["content"]]
        expansions = [media.expand(p, use_audio_in_video) for p in parts if p["type"] != "text"]
        text = self.tokenizer.apply_chat_template(
            list(messages), chat_template=self.template, tokenize=False, add_generation_prompt=True
        )
        text = _fill(text, [(getattr(self.tokenizer, f"{kind}_token"), inside) for kind, inside in expansions])
        ids = torch.tensor([self.tokenizer(text, add_special_tokens=False).input_ids])
        features = media.features()
        mask = features.get("feature_attention_mask")
        replied = torch.cat([ids, ids[:, -1:]], dim=1)  # with a token of the reply, whatever it is
        positions, _ = self.model.thinker.get_rope_index(
            replied,
            features.get("image_grid_thw"),
            features.get("video_grid_thw"),
            torch.ones_like(replied),
            use_audio_in_video,
            None if mask is None else mask.sum(dim=1),
            features.get("video_second_per_grid"),
        )
        places = positions[:, 0].numpy()
        return Inputs(text, ids[0].numpy(), places[:, :-1], int(places[0, -1]), features, use_audio_in_video)

    def generate(
        self,
        inputs: Inputs,
        noise: Floats,
        *,
        text_tokens: int,
        codec_tokens: int,
        stop: Sequence[int],
        codec_stop: Sequence[int],
        voice: str = "Chelsie",
        padding: int = 0,
    ) -> Reply:
        """``generate``, greedy, with the ODE started from ``noise`` [T, 80] instead of a drawn one.

        Args:
            text_tokens, codec_tokens: most to generate. stop, codec_stop: ids that end them.
            padding: masked tokens before the prompt. With some, transformers runs as it is; with none, the talker gets
                its mask back (see above). The traces hold the padding, too.
        """
        pad = torch.full((1, padding), self.tokenizer.pad_token_id)
        ids = torch.cat([pad, torch.from_numpy(inputs.token_ids)[None]], dim=1)
        mask = (torch.arange(ids.shape[1]) >= padding).long()[None]
        # Pixels must carry the prefix: as shared keywords they would reach the talker, which refuses them.
        features = {(f"thinker_{k}" if "pixel" in k else k): v for k, v in inputs.features.items()}
        with _recording(self.model) as record, _noise(noise), nullcontext() if padding else _masked(self.model.talker):
            sequences, waveform = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                speaker=voice,
                use_audio_in_video=inputs.use_audio_in_video,
                thinker_max_new_tokens=text_tokens,
                thinker_do_sample=False,
                thinker_eos_token_id=list(stop),
                talker_max_new_tokens=codec_tokens,
                talker_do_sample=False,
                talker_eos_token_id=list(codec_stop),
                **features,
            )
        tokens = sequences[0, ids.shape[1] :].tolist()
        return Reply(
            tokens[:-1] if tokens[-1] in stop else tokens,
            record["codes"][0].tolist(),
            waveform.reshape(-1).numpy(),
            record["mel"][0].numpy(),
            record["thinker"],
            record["talker"],
        )


class _Media:
    """Media of one prompt, in order of appearance."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._mels: list[torch.Tensor] = []
        self._masks: list[torch.Tensor] = []
        self._images: list[Any] = []
        self._videos: list[tuple[torch.Tensor, list[int]]] = []
        tokenizer = reference.tokenizer
        names = ("image_token", "audio_token", "video_token", "audio_bos_token", "audio_eos_token")
        self._processor: Any = SimpleNamespace(
            **{name: getattr(tokenizer, name) for name in names},
            image_processor=SimpleNamespace(merge_size=2),
            video_processor=SimpleNamespace(merge_size=2),
        )
        self._processor.get_chunked_index = lambda *a: Qwen2_5OmniProcessor.get_chunked_index(self._processor, *a)

    def expand(self, part: Mapping[str, Any], use_audio: bool) -> tuple[str, str]:
        """Keep one medium; gives its kind and the text that stands for it."""
        kind, value = part["type"], part[part["type"]]
        if kind == "audio":
            heard = {"num_audio_tokens": [self._hear(value)]}
            return kind, Qwen2_5OmniProcessor.replace_audio_token(self._processor, heard, 0)
        if kind == "image":
            self._images.append(self._reference.images(value, return_tensors="pt"))
            seen = {"image_grid_thw": self._images[-1]["image_grid_thw"]}
            return kind, Qwen2_5OmniProcessor.replace_image_token(self._processor, seen, 0)
        frames, sound = value
        patches, grid = self._watch(frames)
        self._videos.append((patches, grid))
        seen = {"video_grid_thw": torch.tensor([grid]), "video_second_per_grid": [2 / FPS]}
        if not use_audio:
            return kind, Qwen2_5OmniProcessor.replace_video_token(self._processor, seen, 0, load_audio_from_video=False)
        seen["video_grid_thw"] = np.asarray([grid])
        heard = {"num_audio_tokens": [self._hear(sound)]}
        rates = {"position_id_per_seconds": 25, "seconds_per_chunk": 2.0}
        return kind, Qwen2_5OmniProcessor.replace_video_with_audio_token(self._processor, seen, 0, heard, 0, **rates)

    def _hear(self, samples: Floats) -> int:
        out = self._reference.extractor(
            samples, sampling_rate=16000, padding="max_length", return_attention_mask=True, return_tensors="pt"
        )
        self._mels.append(out["input_features"])
        self._masks.append(out["attention_mask"])
        return int(audio_output_length(out["attention_mask"].sum()))

    def _watch(self, frames: NDArray[np.uint8]) -> tuple[torch.Tensor, list[int]]:
        """Patches [T * N, 1176] and grid of uint8 [F, H, W, 3]; an odd last frame is repeated."""
        frames = np.concatenate([frames, frames[-1:]]) if len(frames) % 2 else frames
        size = Qwen2_5OmniProcessor.videos_kwargs["size"]  # not the images' bounds
        stills = [self._reference.images(frame, size=size, return_tensors="pt") for frame in frames]
        _, rows, columns = stills[0]["image_grid_thw"][0].tolist()
        # A still is shown twice, [N, C, 2, 14, 14]: the first half of one and the second of the next make a pair.
        doubled = [still["pixel_values"].reshape(rows * columns, 3, 2, 14, 14) for still in stills]
        pairs = [torch.stack([a[:, :, 0], b[:, :, 1]], 2) for a, b in zip(doubled[::2], doubled[1::2], strict=True)]
        return torch.cat(pairs).reshape(-1, 1176), [len(pairs), rows, columns]

    def features(self) -> dict[str, Any]:
        features: dict[str, Any] = {}
        if self._mels:
            features["input_features"] = torch.cat(self._mels)
            features["feature_attention_mask"] = torch.cat(self._masks)
        if self._images:
            features["pixel_values"] = torch.cat([image["pixel_values"] for image in self._images])
            features["image_grid_thw"] = torch.cat([image["image_grid_thw"] for image in self._images])
        if self._videos:
            features["pixel_values_videos"] = torch.cat([patches for patches, _ in self._videos])
            features["video_grid_thw"] = torch.tensor([grid for _, grid in self._videos])
            features["video_second_per_grid"] = torch.full((len(self._videos),), 2 / FPS)
        return features


def _fill(text: str, expansions: Sequence[tuple[str, str]]) -> str:
    """Replace each placeholder token, in order, by its expansion."""
    filled = ""
    for token, inside in expansions:
        before, found, text = text.partition(token)
        assert found, f"the template gave no {token} where one was expected"
        filled += before + inside
    return filled + text


@contextmanager
def _noise(noise: Floats) -> Iterator[None]:
    """Hand out ``noise`` where ``Qwen2_5OmniToken2WavDiTModel.sample`` draws its own."""

    def given(shape: Sequence[int], **_: Any) -> torch.Tensor:
        batch, frames, mels = shape
        assert (batch, mels) == (1, noise.shape[1])
        assert frames <= len(noise)
        return torch.from_numpy(noise[None, :frames].copy())

    with mock.patch("torch.randn", given):
        yield


@contextmanager
def _masked(talker: Any) -> Iterator[None]:
    """Give the talker's forward the mask that its ``generate`` was called with, one entry a token so far."""

    def restore(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("attention_mask") is None:
            tokens = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
            cache = kwargs["cache"] if "cache" in kwargs else kwargs["past_key_values"]  # renamed in 5.24
            past = cache.get_seq_length()
            kwargs["attention_mask"] = torch.ones(1, past + tokens.shape[1], dtype=torch.long)
        return args, kwargs

    handle = talker.register_forward_pre_hook(restore, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _recording(model: Any) -> Iterator[dict[str, Any]]:
    """Record both decoders, the codes and the mel of one ``generate``."""
    thinker, talker = DecoderTrace(), DecoderTrace()
    record: dict[str, Any] = {"thinker": thinker, "talker": talker}
    projected: list[NDArray[Any]] = []

    def thinker_in(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        positions = kwargs["position_ids"][-3:, 0]  # a fourth row, for packing, comes first
        thinker.consume(kwargs["inputs_embeds"][0].numpy(), positions.numpy(), output.last_hidden_state[0].numpy())

    def talker_in(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        talker.consume(projected.pop(), kwargs["position_ids"][-3:, 0].numpy())

    text, wave = model.thinker, model.token2wav
    with ExitStack() as stack:
        for handle in (
            text.model.language_model.register_forward_hook(thinker_in, with_kwargs=True),
            text.lm_head.register_forward_hook(lambda _m, _a, logits: thinker.gave(logits[0, -1].numpy())),
            model.talker.thinker_to_talker_proj.register_forward_pre_hook(
                lambda _m, args: projected.append(args[0][0].numpy().copy())
            ),
            model.talker.model.register_forward_pre_hook(talker_in, with_kwargs=True),
            model.talker.codec_head.register_forward_hook(lambda _m, _a, out: talker.gave(out[0, -1].numpy())),
            wave.register_forward_pre_hook(lambda _m, args: record.update(codes=args[0].clone())),
            wave.code2wav_bigvgan_model.register_forward_pre_hook(lambda _m, args: record.update(mel=args[0].clone())),
        ):
            stack.callback(handle.remove)
        yield record
