"""Build a prompt from chat messages: token ids, 3-D TMRoPE positions, and media for the placeholder tokens.

The token sequence is what Qwen2.5-Omni's chat template and ``Qwen2_5OmniProcessor`` give; the positions are what
``get_rope_index`` of transformers' modeling_qwen2_5_omni.py gives, built segment by segment while the prompt grows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import Manifest
from ..errors import MediaError, PromptError, PromptTooLong
from ..media.audio import load_audio
from ..media.image import VisionInput, image_input, load_image, video_input
from ..media.log_mel import audio_tokens, chunk_mel, log_mel
from ..media.video import load_video
from . import chat_template
from .positions import Layout, Segment, SoundVideo, grid_positions, video_times
from .tokenizer import TextCodec

MediaKind = Literal["audio", "image", "video"]

#: part type -> its keys
_PARTS: Mapping[str, frozenset[str]] = {
    "text": frozenset({"type", "text"}),
    "audio": frozenset({"type", "audio"}),
    "image": frozenset({"type", "image"}),
    "video": frozenset({"type", "video", "use_audio"}),
}
_PART_HELP = (
    '{"type": "text", "text": T}, {"type": "audio", "audio": X}, {"type": "image", "image": X} or '
    '{"type": "video", "video": X, "use_audio": true}'
)


@dataclass(frozen=True, eq=False)
class MediaSpan:
    """One medium of the prompt and where its embeddings go.

    Attributes:
        indices: int64 [n], ascending: the tokens of the sequence that take this medium's n embeddings, in order.
        chunks: audio only: float32 [C, n_mels, chunk_frames], zero padded.
        frames: audio only: int64 [C], valid mel frames of each chunk.
        vision: image and video only.
    """

    kind: MediaKind
    indices: NDArray[np.int64]
    chunks: NDArray[np.float32] | None = None
    frames: NDArray[np.int64] | None = None
    vision: VisionInput | None = None


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt that ends where the assistant's reply begins.

    Attributes:
        tokens: all of it, without the media's embeddings.
        media: in the order in which the messages name them; a video comes before its own sound.
    """

    tokens: Segment
    media: list[MediaSpan]

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """int64 [S]."""
        return self.tokens.ids

    @property
    def position_ids(self) -> NDArray[np.int64]:
        """int64 [3, S]: time, height, width."""
        return self.tokens.positions

    @property
    def next_position(self) -> int:
        """Position, in all three components, of the first generated token; the k-th has this plus k.

        The reply continues the prompt's last segment, as it does when it becomes part of the next prompt: that is not
        one past the highest position where a medium reaches past the text behind it.
        """
        return self.tokens.advance

    @property
    def media_mask(self) -> NDArray[np.bool_]:
        """bool [S]: where media embeddings go. The talker is conditioned on the hidden state alone there."""
        mask = np.zeros(len(self.token_ids), np.bool_)
        for span in self.media:
            mask[span.indices] = True
        return mask


@dataclass(frozen=True)
class Part:
    """One checked piece of content. ``where`` names it in messages to the user."""

    kind: str
    value: Any
    where: str
    use_audio: bool = False


def build_prompt(messages: Sequence[Mapping[str, Any]], manifest: Manifest, codec: TextCodec) -> Prompt:
    """Read the media that ``messages`` name and lay everything out as one prompt.

    Args:
        messages: ``{"role": "system" | "user" | "assistant", "content": ...}``; content is a string or a list of parts:
            text, audio, image, or video, the last with its sound if ``use_audio`` is true (false if left out, as in the
            reference). Unless the first message is a system message the bundle's system prompt is put in.

    Raises:
        PromptError: the messages are malformed. All of them are checked before any medium is read.
        PromptTooLong: more tokens than the bundle's KV cache was exported for.
        MediaError: a medium cannot be read or used.
    """
    checked = _check_messages(messages)
    if checked[0][0] != "system":
        checked.insert(0, ("system", [Part("text", manifest.chat.system_prompt, "the bundle's system prompt")]))
    layout = Layout(manifest, codec)
    media = Media(layout)
    for role, parts in checked:
        chat_template.begin_message(layout, role)
        for part in parts:
            media.read(part)()
        chat_template.end_message(layout)
    chat_template.begin_reply(layout)
    capacity = manifest.kv.max_context
    if layout.length > capacity:
        filled = sum(len(span.indices) for span in media.spans)
        raise PromptTooLong(
            f"the prompt takes {layout.length} tokens ({layout.length - filled} of text, {filled} of media); this "
            f"bundle's KV cache holds {capacity}. Shorten it, or export with a larger --max-context"
        )
    return Prompt(layout.segment(), media.spans)


class Media:
    """Reads media and lays them out.

    Attributes:
        spans: the media laid out so far, with their indices in the layout.
    """

    def __init__(self, layout: Layout) -> None:
        self._manifest = layout.manifest
        self._layout = layout
        self.spans: list[MediaSpan] = []

    def read(self, part: Part) -> Callable[[], None]:
        """Read what a part names; gives the function that appends it, which cannot fail.

        Raises:
            MediaError: it cannot be read or used.
        """
        if part.kind == "text":
            return lambda: self._layout.text(part.value)
        read = {"audio": self._audio, "image": self._image, "video": self._video}[part.kind]
        try:
            return read(part)
        except MediaError as error:
            raise MediaError(f"{part.where}: {error}") from error

    def _audio(self, part: Part) -> Callable[[], None]:
        frontend, tokens, layout = self._manifest.audio, self._manifest.tokens, self._layout
        mel = log_mel(load_audio(part.value, frontend.sampling_rate), frontend)
        chunks, frames = chunk_mel(mel, frontend)

        def lay() -> None:
            layout.control(tokens.audio_bos)
            indices = layout.line(np.full(audio_tokens(mel.shape[1]), tokens.audio))
            layout.control(tokens.audio_eos)
            self.spans.append(MediaSpan("audio", indices, chunks=chunks, frames=frames))

        return lay

    def _image(self, part: Part) -> Callable[[], None]:
        vision = image_input(load_image(part.value), self._manifest.vision)
        return lambda: self.image(vision)

    def image(self, vision: VisionInput) -> None:
        """Append a still picture."""
        manifest, layout = self._manifest, self._layout
        times = np.arange(vision.grid_thw[0]) * manifest.position_id_per_seconds
        layout.control(manifest.tokens.vision_bos)
        grid = grid_positions(vision.grid_thw, times, manifest.vision.merge_size)
        indices = layout.add(np.full(vision.tokens, manifest.tokens.image), layout.cursor + grid)
        layout.control(manifest.tokens.vision_eos)
        self.spans.append(MediaSpan("image", indices, vision=vision))

    def _video(self, part: Part) -> Callable[[], None]:
        manifest = self._manifest
        clip = load_video(part.value, manifest.vision, with_audio=part.use_audio)
        vision = video_input(clip.frames, manifest.vision)
        times = video_times(vision.grid_thw[0], clip.second_per_grid, manifest)
        grid = grid_positions(vision.grid_thw, times, manifest.vision.merge_size)
        # The reference has one use_audio_in_video switch for the whole prompt, under which a video without a sound
        # track breaks its positions. Here every video decides for itself; a silent one is laid out as if not asked.
        mel = None if clip.audio is None or not clip.audio.size else log_mel(clip.audio, manifest.audio)
        if mel is None or not audio_tokens(mel.shape[1]):
            return lambda: self._silent(vision, grid)
        return lambda: self._sounding(vision, grid, mel)

    def _silent(self, vision: VisionInput, grid: NDArray[np.int64]) -> None:
        tokens, layout = self._manifest.tokens, self._layout
        layout.control(tokens.vision_bos)
        indices = layout.add(np.full(vision.tokens, tokens.video), layout.cursor + grid)
        layout.control(tokens.vision_eos)
        self.spans.append(MediaSpan("video", indices, vision=vision))

    def _sounding(self, vision: VisionInput, grid: NDArray[np.int64], mel: NDArray[np.float32]) -> None:
        chunks, frames = chunk_mel(mel, self._manifest.audio)
        both = SoundVideo(self._layout)
        pieces = both.advance(grid, None, audio_tokens(mel.shape[1]), ended=True)
        both.close()
        seen, heard = (np.concatenate([p.indices for p in pieces if p.kind == kind]) for kind in ("video", "audio"))
        self.spans.append(MediaSpan("video", seen, vision=vision))
        self.spans.append(MediaSpan("audio", heard, chunks=chunks, frames=frames))


def _check_messages(messages: object) -> list[tuple[str, list[Part]]]:
    """Role and parts of every message, all checked."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise PromptError(
            f"messages are a {type(messages).__name__}; a list of messages was expected, such as "
            '[{"role": "user", "content": "Hello"}]'
        )
    if not messages:
        raise PromptError('there are no messages; at least [{"role": "user", "content": "..."}] was expected')
    checked = [_check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    asked = (part for role, parts in checked if role == "user" for part in parts)
    if not any(part.kind != "text" or part.value.strip() for part in asked):
        raise PromptError(
            "no message with role 'user' has any content, so there is nothing to reply to; "
            "add text, audio, an image or a video"
        )
    return checked


def _check_message(message: object, where: str) -> tuple[str, list[Part]]:
    if not isinstance(message, Mapping):
        raise PromptError(f'{where} is a {type(message).__name__}; {{"role": ..., "content": ...}} was expected')
    _check_keys(message, frozenset({"role", "content"}), frozenset({"role", "content"}), where)
    role, content = message["role"], message["content"]
    if role not in chat_template.ROLES:
        raise PromptError(f"{where} has role {role!r}; one of {', '.join(chat_template.ROLES)} was expected")
    return role, [Part("text", content, where)] if isinstance(content, str) else check_content(
        content, f"{where}.content"
    )


def check_content(content: object, where: str) -> list[Part]:
    """The parts of one message's content; PromptError, which calls it ``where``, if malformed."""
    if isinstance(content, str):
        return [Part("text", content, where)]
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise PromptError(f"{where} is a {type(content).__name__}; a string or a list of parts was expected")
    return [_check_part(part, f"{where}[{i}]") for i, part in enumerate(content)]


def _check_part(part: object, where: str) -> Part:
    if not isinstance(part, Mapping):
        raise PromptError(f"{where} is a {type(part).__name__}; {_PART_HELP} was expected")
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _PARTS:
        problem = f"has type {kind!r}" if "type" in part else "has no type"
        raise PromptError(f"{where} {problem}; {_PART_HELP} was expected")
    _check_keys(part, _PARTS[kind], frozenset({"type", kind}), where)
    value, use_audio = part[kind], part.get("use_audio", False)
    if kind == "text" and not isinstance(value, str):
        raise PromptError(f"{where}.text is a {type(value).__name__}; a string was expected")
    if value is None:
        raise PromptError(f"{where}.{kind} is None; a path, bytes or an array was expected")
    if not isinstance(use_audio, bool):
        raise PromptError(f"{where}.use_audio is {use_audio!r}; true or false was expected")
    return Part(kind, value, f"{where}.{kind}", use_audio)


def _check_keys(given: Mapping[Any, Any], known: frozenset[str], needed: frozenset[str], where: str) -> None:
    unknown = [repr(key) for key in given if key not in known]
    missing = [repr(key) for key in sorted(needed) if key not in given]
    if unknown or missing:
        problems = [f"{word} {', '.join(keys)}" for word, keys in (("unknown", unknown), ("missing", missing)) if keys]
        raise PromptError(
            f"{where} has the wrong keys ({'; '.join(problems)}); {', '.join(sorted(known))} were expected"
        )
