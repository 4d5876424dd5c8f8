"""Chat messages to a prompt: token ids, 3-D TMRoPE positions, and the media that fill the placeholder tokens.

The token sequence is what Qwen2.5-Omni's chat template and ``Qwen2_5OmniProcessor`` give; the positions are what
``get_rope_index`` of transformers' modeling_qwen2_5_omni.py gives, built segment by segment while the prompt grows.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .audio import audio_tokens, chunk_mel, load_audio, log_mel
from .errors import MediaError, PromptError, PromptTooLong
from .manifest import Manifest
from .text import TextCodec
from .video import load_video
from .vision import VisionInput, image_input, load_image, video_input

__all__ = ["MediaSpan", "Prompt", "build_prompt"]

MediaKind = Literal["audio", "image", "video"]

_ROLES = ("system", "user", "assistant")
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
        positions: int64 [n], ascending: the places in the sequence that take this medium's n embeddings, in order.
        chunks: audio only: float32 [C, n_mels, chunk_frames], zero padded.
        frames: audio only: int64 [C], valid mel frames of each chunk.
        vision: image and video only.
    """

    kind: MediaKind
    positions: NDArray[np.int64]
    chunks: NDArray[np.float32] | None = None
    frames: NDArray[np.int64] | None = None
    vision: VisionInput | None = None


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt that ends where the assistant's reply begins.

    Attributes:
        token_ids: int64 [S].
        position_ids: int64 [3, S]: time, height, width.
        next_position: position, in all three components, of the first generated token; the k-th has this plus k. The
            reply continues the prompt's last segment, as it does when it becomes part of the next prompt: that is not
            one past the highest position where a medium reaches past the text behind it.
        media: in the order in which the messages name them; a video comes before its own sound.
    """

    token_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    next_position: int
    media: list[MediaSpan]

    @property
    def media_mask(self) -> NDArray[np.bool_]:
        """bool [S]: where media embeddings go. The talker is conditioned on the hidden state alone there."""
        mask = np.zeros(len(self.token_ids), np.bool_)
        for span in self.media:
            mask[span.positions] = True
        return mask


@dataclass(frozen=True)
class _Part:
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
        checked.insert(0, ("system", [_Part("text", manifest.chat.system_prompt, "the bundle's system prompt")]))
    tokens = manifest.tokens
    layout = _Layout(manifest, codec)
    for role, parts in checked:
        layout.control(tokens.im_start)
        layout.text(f"{role}\n")
        for part in parts:
            layout.part(part)
        layout.control(tokens.im_end)
        layout.text("\n")
    layout.control(tokens.im_start)
    layout.text("assistant\n")
    return layout.finish()


class _Layout:
    """A prompt under construction.

    ``_cursor`` is the position that the next segment starts at: one past the highest position of the *last* segment, as
    in the reference, which is not always one past the highest position so far (see ``_video_with_sound``).
    """

    def __init__(self, manifest: Manifest, codec: TextCodec) -> None:
        self._manifest = manifest
        self._codec = codec
        self._text: list[str] = []
        self._ids: list[NDArray[np.int64]] = []
        self._positions: list[NDArray[np.int64]] = []
        self._media: list[MediaSpan] = []
        self._length = 0
        self._cursor = 0

    def text(self, text: str) -> None:
        # Held back until the next control token: BPE must see the whole stretch, as it does in the rendered template.
        self._text.append(text)

    def control(self, token_id: int) -> None:
        self._flush()
        self._line(np.asarray([token_id]))

    def part(self, part: _Part) -> None:
        if part.kind == "text":
            self.text(part.value)
            return
        lay_out = {"audio": self._audio, "image": self._image, "video": self._video}[part.kind]
        try:
            lay_out(part)
        except MediaError as error:
            raise MediaError(f"{part.where}: {error}") from error

    def finish(self) -> Prompt:
        self._flush()
        capacity = self._manifest.kv.max_context
        if self._length > capacity:
            media = sum(len(span.positions) for span in self._media)
            raise PromptTooLong(
                f"the prompt takes {self._length} tokens ({self._length - media} of text, {media} of media); this "
                f"bundle's KV cache holds {capacity}. Shorten it, or export with a larger --max-context"
            )
        positions = np.concatenate(self._positions, axis=1)
        return Prompt(np.concatenate(self._ids), positions, self._cursor, self._media)

    def _flush(self) -> None:
        text = "".join(self._text)
        self._text.clear()
        if text:
            self._line(np.asarray(self._codec.encode(text), np.int64))

    def _add(self, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Append one segment, positions [3, n]; gives its places in the sequence."""
        self._ids.append(ids)
        self._positions.append(positions)
        places = np.arange(self._length, self._length + len(ids))
        self._length += len(ids)
        self._cursor = int(positions.max()) + 1
        return places

    def _line(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Append a segment whose components advance together (text, audio)."""
        if not len(ids):
            return np.zeros(0, np.int64)
        return self._add(ids, np.broadcast_to(self._cursor + np.arange(len(ids)), (3, len(ids))))

    def _pair(self, first: int, second: int) -> None:
        """Two control tokens at one position, as around a video with sound."""
        self._flush()
        self._add(np.asarray([first, second]), np.full((3, 2), self._cursor))

    def _audio(self, part: _Part) -> None:
        frontend, tokens = self._manifest.audio, self._manifest.tokens
        mel = log_mel(load_audio(part.value, frontend.sampling_rate), frontend)
        chunks, frames = chunk_mel(mel, frontend)
        self.control(tokens.audio_bos)
        places = self._line(np.full(audio_tokens(mel.shape[1]), tokens.audio))
        self.control(tokens.audio_eos)
        self._media.append(MediaSpan("audio", places, chunks=chunks, frames=frames))

    def _image(self, part: _Part) -> None:
        vision, tokens = image_input(load_image(part.value), self._manifest.vision), self._manifest.tokens
        times = np.arange(vision.grid_thw[0]) * self._manifest.position_id_per_seconds
        self.control(tokens.vision_bos)
        places = self._add(np.full(vision.tokens, tokens.image), self._cursor + self._grid(vision, times))
        self.control(tokens.vision_eos)
        self._media.append(MediaSpan("image", places, vision=vision))

    def _video(self, part: _Part) -> None:
        manifest, tokens = self._manifest, self._manifest.tokens
        clip = load_video(part.value, manifest.vision, with_audio=part.use_audio)
        vision = video_input(clip.frames, manifest.vision)
        # float32 as in get_rope_index: the truncation to whole positions depends on it. The reference's processor cuts
        # its placeholders in float64, so that at some rates (1.4 s a patch, not at the usual 1 s) its tokens and its
        # positions fall out of step; here one set of times places both.
        seconds = np.arange(vision.grid_thw[0], dtype=np.float32) * np.float32(clip.second_per_grid)
        grid = self._grid(vision, (seconds * np.float32(manifest.position_id_per_seconds)).astype(np.int64))
        # The reference has one use_audio_in_video switch for the whole prompt, under which a video without a sound
        # track breaks its positions. Here every video decides for itself; a silent one is laid out as if not asked.
        mel = None if clip.audio is None or not clip.audio.size else log_mel(clip.audio, manifest.audio)
        count = 0 if mel is None else audio_tokens(mel.shape[1])
        if mel is None or not count:
            self.control(tokens.vision_bos)
            places = self._add(np.full(vision.tokens, tokens.video), self._cursor + grid)
            self.control(tokens.vision_eos)
            self._media.append(MediaSpan("video", places, vision=vision))
            return
        chunks, frames = chunk_mel(mel, manifest.audio)
        seen, heard = self._video_with_sound(grid, count)
        self._media.append(MediaSpan("video", seen, vision=vision))
        self._media.append(MediaSpan("audio", heard, chunks=chunks, frames=frames))

    def _video_with_sound(self, grid: NDArray[np.int64], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Lay out a video, grid [3, n], and its ``count`` audio tokens in alternating pieces of 2 s.

        Both count from the same start. What follows continues from the piece that happens to be last, even where the
        other medium has reached a higher position: the reference does so, and the model was trained with it.

        Returns:
            places in the sequence of the video's tokens and of the audio's.
        """
        manifest, tokens = self._manifest, self._manifest.tokens
        span = int(manifest.position_id_per_seconds * manifest.seconds_per_chunk)
        self._pair(tokens.vision_bos, tokens.audio_bos)
        start = self._cursor
        line = np.broadcast_to(np.arange(count), (3, count))
        seen: list[NDArray[np.int64]] = []
        heard: list[NDArray[np.int64]] = []
        for piece, sound in itertools.zip_longest(_pieces(grid[0], span), _pieces(line[0], span)):
            for part, positions, token_id, places in (
                (piece, grid, tokens.video, seen),
                (sound, line, tokens.audio, heard),
            ):
                if part is not None:
                    positions = start + positions[:, part]
                    places.append(self._add(np.full(positions.shape[1], token_id), positions))
        self._pair(tokens.audio_eos, tokens.vision_eos)
        return np.concatenate(seen), np.concatenate(heard)

    def _grid(self, vision: VisionInput, times: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions [3, T*h*w] of a picture or video from 0, h and w in merged patches."""
        merge = self._manifest.vision.merge_size
        rows, columns = vision.grid_thw[1] // merge, vision.grid_thw[2] // merge
        shape = (len(times), rows, columns)
        axes = (times.reshape(-1, 1, 1), np.arange(rows).reshape(1, -1, 1), np.arange(columns).reshape(1, 1, -1))
        return np.stack([np.broadcast_to(axis, shape).reshape(-1) for axis in axes]).astype(np.int64)


def _pieces(times: NDArray[np.int64], span: int) -> list[slice]:
    """Cut ascending times from 0 into pieces of ``span``.

    As in the reference every cut looks for the next multiple of ``span`` but takes at least one token, so a jump over
    several multiples (video steps longer than a piece) leaves one-token pieces until the count has caught up.
    """
    ends: list[int] = []
    while True:
        least = ends[-1] + 1 if ends else 0
        end = max(int(np.searchsorted(times, (len(ends) + 1) * span)), least)
        if end >= len(times):
            break
        ends.append(end)
    return [slice(a, b) for a, b in itertools.pairwise([0, *ends, len(times)])]


def _check_messages(messages: object) -> list[tuple[str, list[_Part]]]:
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


def _check_message(message: object, where: str) -> tuple[str, list[_Part]]:
    if not isinstance(message, Mapping):
        raise PromptError(f'{where} is a {type(message).__name__}; {{"role": ..., "content": ...}} was expected')
    _check_keys(message, frozenset({"role", "content"}), frozenset({"role", "content"}), where)
    role, content = message["role"], message["content"]
    if role not in _ROLES:
        raise PromptError(f"{where} has role {role!r}; one of {', '.join(_ROLES)} was expected")
    if isinstance(content, str):
        return role, [_Part("text", content, where)]
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise PromptError(f"{where}.content is a {type(content).__name__}; a string or a list of parts was expected")
    return role, [_check_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]


def _check_part(part: object, where: str) -> _Part:
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
    return _Part(kind, value, f"{where}.{kind}", use_audio)


def _check_keys(given: Mapping[Any, Any], known: frozenset[str], needed: frozenset[str], where: str) -> None:
    unknown = [repr(key) for key in given if key not in known]
    missing = [repr(key) for key in sorted(needed) if key not in given]
    if unknown or missing:
        problems = [f"{word} {', '.join(keys)}" for word, keys in (("unknown", unknown), ("missing", missing)) if keys]
        raise PromptError(
            f"{where} has the wrong keys ({'; '.join(problems)}); {', '.join(sorted(known))} were expected"
        )
