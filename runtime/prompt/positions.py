"""Lay out a prompt: token ids and 3-D TMRoPE positions, appended segment by segment.

The positions are what ``get_rope_index`` of transformers' modeling_qwen2_5_omni.py gives. Everything in a layout counts
from the layout's own start, so that a turn can be laid out before it is known what it follows.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import Manifest
from .tokenizer import TextCodec

Positions = NDArray[np.int64]
Fill = tuple[NDArray[np.int64], NDArray[np.float32], int]
"""indices [n] of placeholder tokens, the embeddings [n, H] that take their places, and their key"""


def fresh_key() -> int:
    """A key for embeddings that equal no others."""
    return secrets.randbits(62) + 1


@dataclass(eq=False)
class Segment:
    """Consecutive tokens of a conversation, as they enter the thinker.

    Attributes:
        ids: int64 [n].
        positions: int64 [3, n], counted from where the segment starts; below 0 where a medium goes on beside another.
        advance: from the segment's start to the next one's.
        indices: int64 [m], ascending: tokens whose embedding is not that of their id.
        keys: int64 [m], not 0: of the media that they belong to. Tokens at the same place of media with the same key
            have the same embedding.
        embeds: float32 [m, H], their embeddings; None until they are encoded.
    """

    ids: NDArray[np.int64]
    positions: Positions
    advance: int
    indices: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    keys: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    embeds: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def place(self, media: Sequence[tuple[NDArray[np.int64], int]]) -> Segment:
        """The same tokens, some of which belong to media: the indices [n] and the key of each."""
        if not media:
            return self
        indices = np.concatenate([indices for indices, _ in media])
        keys = np.concatenate([np.full(len(indices), key) for indices, key in media])
        order = np.argsort(indices)  # a video and its sound come one after the other, and lie side by side
        return replace(self, indices=indices[order], keys=keys[order])

    def fill(self, fills: Sequence[Fill]) -> Segment:
        """The same tokens with the embeddings of media; nothing else has embeddings yet."""
        if not fills:
            return self
        made = self.place([(indices, key) for indices, _, key in fills])
        order = np.argsort(np.concatenate([indices for indices, _, _ in fills]))
        return replace(made, embeds=np.concatenate([embeds for _, embeds, _ in fills])[order])


def joined(segments: Sequence[Segment]) -> Segment:
    """The tokens of segments that follow one another, without media."""
    starts = np.cumsum([0, *(segment.advance for segment in segments)])
    placed = [segment.positions + start for segment, start in zip(segments, starts, strict=False)]
    ids = np.concatenate([segment.ids for segment in segments])
    return Segment(ids, np.concatenate(placed, axis=1), int(starts[-1]))


class Layout:
    """Appends text, control tokens and media.

    Attributes:
        length: tokens so far, without text that is held back.
        cursor: the position that the next segment starts at: one past the highest position of the *last* segment, as in
            the reference, which is not always one past the highest position so far (see ``SoundVideo``).
    """

    def __init__(self, manifest: Manifest, codec: TextCodec) -> None:
        self.manifest = manifest
        self._codec = codec
        self._text: list[str] = []
        self._ids: list[NDArray[np.int64]] = []
        self._positions: list[Positions] = []
        self._fills: list[Fill] = []
        self.length = 0
        self.cursor = 0
        self._taken = self._taken_cursor = 0

    def text(self, text: str) -> None:
        """Append text. It is held back until the next control token: BPE must see the whole stretch."""
        self._text.append(text)

    def control(self, token_id: int) -> None:
        """Append one control token."""
        self.flush()
        self.line(np.asarray([token_id]))

    def pair(self, first: int, second: int) -> None:
        """Append two control tokens at one position, as around a video with sound."""
        self.flush()
        self.add(np.asarray([first, second]), np.full((3, 2), self.cursor))

    def flush(self) -> None:
        """Encode the text that is held back."""
        text = "".join(self._text)
        self._text.clear()
        if text:
            self.line(np.asarray(self._codec.encode(text), np.int64))

    def line(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Append tokens whose components advance together (text, audio); gives their indices."""
        if not len(ids):
            return np.zeros(0, np.int64)
        return self.add(ids, np.broadcast_to(self.cursor + np.arange(len(ids)), (3, len(ids))))

    def add(self, ids: NDArray[np.int64], positions: Positions) -> NDArray[np.int64]:
        """Append one segment at positions [3, n]; gives its tokens' indices."""
        self._ids.append(ids)
        self._positions.append(positions)
        indices = np.arange(self.length, self.length + len(ids))
        self.length += len(ids)
        self.cursor = int(positions.max()) + 1
        return indices

    @property
    def pending(self) -> int:
        """Tokens since the last ``segment``, with those of text that is held back."""
        return self.length - self._taken + len(self._codec.encode("".join(self._text)))

    def fill(self, indices: NDArray[np.int64], embeds: NDArray[np.float32], key: int) -> None:
        """Give tokens that were appended since the last ``segment`` their embeddings."""
        self._fills.append((indices - self._taken, embeds, key))

    @property
    def filled(self) -> bool:
        """Whether any was given since the last ``segment``."""
        return bool(self._fills)

    def segment(self) -> Segment:
        """What was appended since the last call, without text that is held back."""
        ids = np.concatenate([np.zeros(0, np.int64), *self._ids])
        positions = np.concatenate([np.zeros((3, 0), np.int64), *self._positions], axis=1) - self._taken_cursor
        made = Segment(ids, positions, self.cursor - self._taken_cursor).fill(self._fills)
        for held in (self._ids, self._positions, self._fills):
            held.clear()
        self._taken, self._taken_cursor = self.length, self.cursor
        return made


class Piece(NamedTuple):
    """Consecutive tokens of one medium of a video with sound, laid out.

    Attributes:
        part: which of the medium's tokens.
        indices: int64 [n], theirs in the layout.
    """

    kind: Literal["video", "audio"]
    part: slice
    indices: NDArray[np.int64]


class _Pieces:
    """One medium of a video with sound, cut into pieces of ``span`` while its tokens arrive.

    A cut looks for the next multiple of ``span`` but takes at least one token, as in the reference, so a jump over
    several multiples (video steps longer than a piece) leaves one-token pieces until the count has caught up.
    """

    def __init__(self, kind: Literal["video", "audio"], token_id: int, span: int) -> None:
        self.kind = kind
        self.token_id = token_id
        self.positions: Positions = np.zeros((3, 0), np.int64)
        self.next_time: int | None = 0
        """first component of the token that follows the known ones; None if none does"""
        self._span = span
        self._bound = span
        self._cut = 0

    @property
    def exhausted(self) -> bool:
        """Nothing is left and nothing will come."""
        return self.next_time is None and self._cut == self.positions.shape[1]

    def cut(self) -> slice | None:
        """The next piece; None while its end is not known."""
        known, times = self.positions.shape[1], self.positions[0]
        least = self._cut + 1 if self._bound > self._span else 0
        end = max(int(np.searchsorted(times, self._bound)), least)
        if self.next_time is None:
            end = min(end, known)
        elif end > known or self.next_time < self._bound:
            return None
        piece, self._cut = slice(self._cut, end), end
        self._bound += self._span
        return piece


class SoundVideo:
    """A video and its sound in a layout: alternating pieces of 2 s, the video's first.

    Both count from the same start. What follows continues from the piece that happens to be last, even where the other
    medium has reached a higher position: the reference does so, and the model was trained with it.

    Args:
        layout: where to; between opening and ``close`` nothing else may be appended.
    """

    def __init__(self, layout: Layout) -> None:
        tokens, span = layout.manifest.tokens, piece_span(layout.manifest)
        self._layout = layout
        layout.pair(tokens.vision_bos, tokens.audio_bos)
        self._start = layout.cursor
        self._seen, self._heard = _Pieces("video", tokens.video, span), _Pieces("audio", tokens.audio, span)
        self._next = self._seen

    def advance(self, grid: Positions, next_time: int | None, sound: int, ended: bool = False) -> list[Piece]:
        """Lay out every piece that is complete, and give them.

        Args:
            grid: positions [3, n] of the pictures' tokens so far, from 0.
            next_time: time position of the picture after those; None if none follows.
            sound: audio tokens so far.
            ended: no more of them follow.
        """
        self._seen.positions, self._seen.next_time = grid, next_time
        self._heard.positions = np.broadcast_to(np.arange(sound), (3, sound))
        self._heard.next_time = None if ended else sound
        laid: list[Piece] = []
        while not (self._seen.exhausted and self._heard.exhausted):
            medium = self._next
            if not medium.exhausted:
                part = medium.cut()
                if part is None:
                    break
                positions = self._start + medium.positions[:, part]
                indices = self._layout.add(np.full(positions.shape[1], medium.token_id), positions)
                laid.append(Piece(medium.kind, part, indices))
            self._next = self._heard if medium is self._seen else self._seen
        return laid

    def close(self) -> None:
        """Append the closing tokens, after the last ``advance``."""
        tokens = self._layout.manifest.tokens
        self._layout.pair(tokens.audio_eos, tokens.vision_eos)


def piece_span(manifest: Manifest) -> int:
    """Positions that one piece of a video with sound covers."""
    return int(manifest.position_id_per_seconds * manifest.seconds_per_chunk)


def video_times(count: int, second_per_grid: float, manifest: Manifest) -> NDArray[np.int64]:
    """Time positions of the first ``count`` temporal patches of a video, from 0.

    float32 as in get_rope_index: the truncation to whole positions depends on it. The reference's processor cuts its
    placeholders in float64, so that at some rates (1.4 s a patch, not at the usual 1 s) its tokens and its positions
    fall out of step; here one set of times places both.
    """
    seconds = np.arange(count, dtype=np.float32) * np.float32(second_per_grid)
    return (seconds * np.float32(manifest.position_id_per_seconds)).astype(np.int64)


def grid_positions(grid_thw: tuple[int, int, int], times: NDArray[np.int64], merge: int) -> Positions:
    """Positions [3, T*h*w] of a picture or video from 0, h and w in merged patches, for time positions [T]."""
    shape = (len(times), grid_thw[1] // merge, grid_thw[2] // merge)
    axes = (times.reshape(-1, 1, 1), np.arange(shape[1]).reshape(1, -1, 1), np.arange(shape[2]).reshape(1, 1, -1))
    return np.stack([np.broadcast_to(axis, shape).reshape(-1) for axis in axes]).astype(np.int64)
