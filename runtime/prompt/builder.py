"""Build a prompt from chat messages: token ids, 3-D TMRoPE positions, and media for the placeholder tokens.

The token sequence is what Qwen2.5-Omni's chat template and ``Qwen2_5OmniProcessor`` give; the positions are what
``get_rope_index`` of transformers' modeling_qwen2_5_omni.py gives, built segment by segment while the prompt grows.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import Manifest
from ..errors import MediaError
from ..media.audio import load_audio
from ..media.image import VisionInput, image_input, load_image, picture_size, video_input
from ..media.log_mel import audio_tokens, chunk_mel, log_mel
from ..media.video import open_video
from . import chat_template
from .messages import Part, check_messages, open_conversation
from .positions import Layout, Segment, SoundVideo, grid_positions, joined, video_times
from .room import PlannedImage, PlannedVideo, Room, too_long
from .tokenizer import TextCodec
from .tools import RoleParts, check_tools, lay_out

MediaKind = Literal["audio", "image", "video"]
_Made = TypeVar("_Made")
#: so that nobody can make two media that have the same key
_SALT = secrets.token_bytes(16)


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

    @cached_property
    def key(self) -> int:
        """What ``Segment.keys`` says of it: the same for the same medium."""
        known = hashlib.blake2b(digest_size=8, key=_SALT)
        for array in (self.chunks, self.frames) if self.vision is None else (self.vision.patches,):
            known.update(repr(None if array is None else array.shape).encode())
            known.update(b"" if array is None else np.ascontiguousarray(array).data)
        known.update(b"" if self.vision is None else repr(self.vision.grid_thw).encode())
        return int.from_bytes(known.digest(), "little", signed=True) or 1


@dataclass(frozen=True, eq=False)
class LaidMessage:
    """One message of a conversation, laid out.

    Attributes:
        tokens: without media.
        media: their indices count from the message's first token.
    """

    role: str
    tokens: Segment
    media: list[MediaSpan]


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


def build_prompt(
    messages: Sequence[Mapping[str, Any]],
    manifest: Manifest,
    codec: TextCodec,
    capacity: int | None = None,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    asked: bool = True,
) -> Prompt:
    """Read the media that ``messages`` name and lay everything out as one prompt.

    Args:
        messages: ``{"role": ..., "content": ...}``; the role is system, developer, user, assistant or tool (what a call
            gave), the content a string or a list of parts: text, audio, image, or video, the last with its sound if
            ``use_audio`` is true (false if left out, as in the reference). A picture or video may carry bounds, see
            ``VisionLimits``; those without are shown smaller if all together would not fit. Unless the first message is
            a system message the bundle's system prompt is put in; a first one of the role developer stands beside that
            prompt, in the same message. An assistant's message may have ``tool_calls``.
        capacity: tokens that the KV cache holds; what the bundle was exported for if None.
        tools: that the model may call, see ``check_tools``.
        asked: one message must hold something to reply to; without, there may be none.

    Raises:
        PromptError: the messages are malformed. All of them are checked before any medium is read.
        PromptTooLong: more tokens than the KV cache holds; known before pictures and videos are decoded.
        MediaError: a medium cannot be read or used.
    """
    checked, signatures = check_messages(messages, asked), check_tools(tools)
    checked = open_conversation(checked, manifest.chat.system_prompt, always=bool(signatures))
    capacity = manifest.kv.max_context if capacity is None else capacity
    layout = Layout(manifest, codec)
    laid = read_messages(lay_out(checked, signatures), layout, codec, Room(capacity))
    chat_template.begin_reply(layout)
    require_fit(laid, layout.length, capacity)
    media, start = [], 0
    for message in laid:
        media += [replace(span, indices=span.indices + start) for span in message.media]
        start += len(message.tokens)
    return Prompt(joined([*(message.tokens for message in laid), layout.segment()]), media)


def read_messages(messages: Sequence[RoleParts], layout: Layout, codec: TextCodec, room: Room) -> list[LaidMessage]:
    """Read the media of messages, which must fit ``room``, and append them all to ``layout``.

    Raises:
        PromptError: text that is not Unicode. PromptTooLong, MediaError.
    """
    media = Media(layout)
    lay = iter(media.read([part for _, parts in messages for part in parts], codec, room))
    laid = []
    for role, parts in messages:
        start = layout.length
        chat_template.begin_message(layout, role)
        for _ in parts:
            next(lay)()()
        chat_template.end_message(layout)
        layout.flush()
        spans = [replace(span, indices=span.indices - start) for span in media.spans]
        media.spans.clear()
        laid.append(LaidMessage(role, layout.segment(), spans))
    return laid


def require_fit(laid: Sequence[LaidMessage], length: int, capacity: int) -> None:
    """PromptTooLong if ``length`` tokens, of which these messages' media take some, do not fit."""
    if length > capacity:
        spans = [span for message in laid for span in message.media]
        sizes = {kind: sum(len(s.indices) for s in spans if s.kind == kind) for kind in ("audio", "image", "video")}
        filled = sum(sizes.values())
        sizes["text"] = length - filled
        raise too_long(length, length - filled, filled, capacity, sizes)


class Media:
    """Reads media and lays them out.

    Attributes:
        spans: the media laid out so far, with their indices in the layout.
    """

    def __init__(self, layout: Layout) -> None:
        self._manifest = layout.manifest
        self._layout = layout
        self.spans: list[MediaSpan] = []

    def read(self, parts: Sequence[Part], codec: TextCodec, room: Room) -> list[Callable[[], Callable[[], None]]]:
        """Plan parts: sound is read, pictures and videos are measured, and all must fit ``room`` together.

        Returns:
            for every part a function that decodes it, and gives the function that appends it, which cannot fail.

        Raises:
            MediaError: one cannot be read or used. PromptError: text that is not Unicode. PromptTooLong.
        """
        planned = [self._named(part, partial(self._plan, part, room, codec)) for part in parts]
        room.fit()
        return [partial(self._named, part, make) for part, make in zip(parts, planned, strict=True)]

    @staticmethod
    def _named(part: Part, make: Callable[[], _Made]) -> _Made:
        """``make()``, whose MediaError names the part."""
        try:
            return make()
        except MediaError as error:
            raise MediaError(f"{part.where}: {error}") from error

    def _plan(self, part: Part, room: Room, codec: TextCodec) -> Callable[[], Callable[[], None]]:
        if part.kind == "text":
            room.take("text", codec.count(part.value, room.capacity))
            return lambda: lambda: self._layout.text(part.value)
        if part.kind == "audio":
            lay, tokens = self._audio(part)
            room.take("audio", tokens)
            return lambda: lay
        return self._image(part, room) if part.kind == "image" else self._video(part, room)

    def _audio(self, part: Part) -> tuple[Callable[[], None], int]:
        frontend, tokens, layout = self._manifest.audio, self._manifest.tokens, self._layout
        mel = log_mel(load_audio(part.value, frontend.sampling_rate, max_seconds=frontend.max_seconds), frontend)
        chunks, frames = chunk_mel(mel, frontend)
        count = audio_tokens(mel.shape[1])

        def lay() -> None:
            layout.control(tokens.audio_bos)
            indices = layout.line(np.full(count, tokens.audio))
            layout.control(tokens.audio_eos)
            self.spans.append(MediaSpan("audio", indices, chunks=chunks, frames=frames))

        return lay, count

    def _image(self, part: Part, room: Room) -> Callable[[], Callable[[], None]]:
        vision = self._manifest.vision
        plan = PlannedImage(*picture_size(part.value), vision, part.limits)
        plan.size(1.0)
        room.add("image", plan)

        def decode() -> Callable[[], None]:
            made = image_input(load_image(part.value), vision, plan.size(room.share))
            return lambda: self.image(made)

        return decode

    def image(self, vision: VisionInput) -> None:
        """Append a still picture."""
        manifest, layout = self._manifest, self._layout
        times = np.arange(vision.grid_thw[0]) * manifest.position_id_per_seconds
        layout.control(manifest.tokens.vision_bos)
        grid = grid_positions(vision.grid_thw, times, manifest.vision.merge_size)
        indices = layout.add(np.full(vision.tokens, manifest.tokens.image), layout.cursor + grid)
        layout.control(manifest.tokens.vision_eos)
        self.spans.append(MediaSpan("image", indices, vision=vision))

    def _video(self, part: Part, room: Room) -> Callable[[], Callable[[], None]]:
        manifest, frontend = self._manifest, self._manifest.vision
        video = open_video(part.value)
        plan = PlannedVideo(video, frontend, part.limits)
        plan.shown(1.0)
        # The reference has one use_audio_in_video switch for the whole prompt, under which a video without a sound
        # track breaks its positions. Here every video decides for itself; a silent one is laid out as if not asked.
        audio = video.sound(part.limits, manifest.audio.max_seconds) if part.use_audio else None
        mel = None if audio is None or not audio.size else log_mel(audio, manifest.audio)
        if mel is not None and not audio_tokens(mel.shape[1]):
            mel = None
        room.add("video", plan)
        room.take("audio", 0 if mel is None else audio_tokens(mel.shape[1]))

        def decode() -> Callable[[], None]:
            shown, size = plan.shown(room.share)
            vision = video_input(video.read(shown.indices, size), frontend, size)
            times = video_times(vision.grid_thw[0], shown.second_per_grid, manifest)
            grid = grid_positions(vision.grid_thw, times, frontend.merge_size)
            return lambda: self._silent(vision, grid) if mel is None else self._sounding(vision, grid, mel)

        return decode

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
