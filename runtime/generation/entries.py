"""The entries of a conversation: messages in order, each with its tokens, and what of them is dropped first."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import SpecialTokens
from ..errors import UsageError
from ..events import TokenCounts
from ..prompt.builder import MediaSpan
from ..prompt.positions import Positions, Segment


@dataclass(eq=False)
class Entry:
    """One message.

    Attributes:
        segments: its tokens. Of a reply: what begins it, what counts as said, what ends it.
        waiting: media of its only segment that are not encoded yet.
        begins: a turn begins with it.
        open: it is being said: a turn that is not complete, or a reply under way.
        pace: codec tokens that a token of this reply took; None if it was not spoken.
        result: what a tool call gave. Such entries that follow one another are laid out as one message of the user.
        beside: ids of those that this one was laid out with; empty if with none.
        said: of the model's reply, gives its tokens if so many of them, the first ones, count as said.
    """

    id: str
    role: str
    segments: list[Segment] = field(default_factory=list)
    waiting: list[MediaSpan] = field(default_factory=list)
    _: KW_ONLY
    begins: bool = False
    open: bool = False
    pace: float | None = None
    said: Callable[[int], list[int]] | None = None
    result: str | None = None
    beside: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Number of tokens."""
        return sum(len(segment) for segment in self.segments)

    def same_as(self, other: Entry) -> bool:
        """Whether both have the same tokens."""
        mine, theirs = Tokens.of(self.segments), Tokens.of(other.segments)
        return self.role == other.role and len(mine) == len(theirs) == mine.common(theirs)


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens that follow one another, and where the next would be.

    Attributes:
        ids: int64 [S].
        positions: int64 [3, S].
        keys: int64 [S]: of the media that they belong to, see ``Segment.keys``; 0 for text.
        cursor: position of the next token.
    """

    ids: NDArray[np.int64]
    positions: Positions
    keys: NDArray[np.int64]
    cursor: int = 0

    @property
    def media_mask(self) -> NDArray[np.bool_]:
        """bool [S]: where media are. The talker is conditioned on the hidden state alone there."""
        mask: NDArray[np.bool_] = self.keys != 0
        return mask

    @staticmethod
    def of(segments: Sequence[Segment]) -> Tokens:
        """The tokens of segments."""
        ids, positions, keys, cursor = [np.zeros(0, np.int64)], [np.zeros((3, 0), np.int64)], [], 0
        for segment in segments:
            ids.append(segment.ids)
            positions.append(cursor + segment.positions)
            keys.append(np.zeros(len(segment), np.int64))
            keys[-1][segment.indices] = segment.keys
            cursor += segment.advance
        joined = np.concatenate([np.zeros(0, np.int64), *keys])
        return Tokens(np.concatenate(ids), np.concatenate(positions, axis=1), joined, cursor)

    def __len__(self) -> int:
        return len(self.ids)

    def count(self, special: SpecialTokens) -> TokenCounts:
        """How many are of what."""
        audio, image, video = (int((self.ids == one).sum()) for one in (special.audio, special.image, special.video))
        return TokenCounts(text=len(self) - audio - image - video, audio=audio, image=image, video=video)

    def first(self, count: int) -> Tokens:
        """The first so many; the cursor is not theirs."""
        return Tokens(self.ids[:count], self.positions[:, :count], self.keys[:count], self.cursor)

    def then(self, ids: NDArray[np.int64]) -> Tokens:
        """These tokens with text behind them."""
        after = self.cursor + np.arange(len(ids))
        return Tokens(
            np.concatenate([self.ids, ids]),
            np.concatenate([self.positions, np.broadcast_to(after, (3, len(ids)))], axis=1),
            np.concatenate([self.keys, np.zeros(len(ids), np.int64)]),
            self.cursor + len(ids),
        )

    def common(self, other: Tokens) -> int:
        """How many tokens of both are the same, from the first on."""
        most = min(len(self), len(other))
        differ = (self.ids[:most] != other.ids[:most]) | (self.keys[:most] != other.keys[:most])
        differ |= (self.positions[:, :most] != other.positions[:, :most]).any(axis=0)
        return int(np.argmax(differ)) if differ.any() else most


class Entries:
    """A conversation's messages. Hold ``lock`` where several calls belong together.

    They begin with system messages, which are never dropped. After these come turns: a message of the user with what
    follows it. Turns are dropped whole, the oldest first.

    Attributes:
        version: another number after every change.
        lay_results: gives the ids of each of results that follow one another.
    """

    def __init__(self) -> None:
        self.lay_results: Callable[[list[str]], list[NDArray[np.int64]]] | None = None
        self.lock = threading.RLock()
        self.version = 0
        self._numbers = itertools.count(1)
        self._all: list[Entry] = []

    def __iter__(self) -> Iterator[Entry]:
        with self.lock:
            return iter(tuple(self._all))

    def make(self, role: str, segments: Sequence[Segment] = (), waiting: Sequence[MediaSpan] = ()) -> Entry:
        """An entry that is not in the conversation yet."""
        return Entry(f"item_{next(self._numbers)}", role, list(segments), list(waiting), begins=role == "user")

    def insert(self, entry: Entry, before: Entry | None = None) -> None:
        """Add one, at the end if ``before`` is None or gone: that is before a user's turn that is not complete."""
        with self.lock:
            at = self._all.index(before) if before is not None and before in self._all else len(self._all)
            if at == len(self._all) and not entry.open:
                while at and self._all[at - 1].open and self._all[at - 1].role == "user":
                    at -= 1
            self._all.insert(at, entry)
            self._changed()

    def put(self, entry: Entry, segments: Sequence[Segment], *, open: bool) -> None:
        """Give one of them other tokens."""
        with self.lock:
            entry.segments, entry.open = list(segments), open
            self.version += 1

    def find(self, entry_id: str) -> Entry:
        """The complete one of that id.

        Raises:
            UsageError: there is none.
        """
        with self.lock:
            for entry in self._all:
                if entry.id == entry_id and not entry.open:
                    return entry
        raise UsageError(
            f"the conversation has no complete item {entry_id!r}: it was never there, was deleted or dropped, or is "
            "being said"
        )

    def remove(self, gone: Sequence[Entry]) -> None:
        """Take some away."""
        with self.lock:
            self._all = [entry for entry in self._all if entry not in gone]
            self._changed()

    def replace(self, entries: Sequence[Entry]) -> None:
        """Have these instead."""
        with self.lock:
            self._all = list(entries)
            self._changed()

    def segments(self) -> list[Segment]:
        """All tokens."""
        return [segment for entry in self for segment in entry.segments]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return sum(map(len, self))

    def turns(self) -> list[list[Entry]]:
        """The system messages that come first, perhaps none, then the turns."""
        turns: list[list[Entry]] = [[]]
        for entry in self:
            first = len(turns) == 1 and entry.role != "system"
            if first or (len(turns) > 1 and entry.begins):
                turns.append([])
            turns[-1].append(entry)
        return turns

    def _changed(self) -> None:
        """Others follow one another: lay out results anew that are no longer beside the same ones."""
        self.version += 1
        for are_results, run in itertools.groupby(self._all, lambda entry: entry.result is not None):
            listed = list(run)
            ids = tuple(entry.id for entry in listed) if len(listed) > 1 else ()
            if not are_results or all(entry.beside == ids for entry in listed):
                continue
            assert self.lay_results is not None
            pieces = self.lay_results([entry.result or "" for entry in listed])
            for entry, piece in zip(listed, pieces, strict=True):
                entry.segments, entry.beside, entry.begins = [text_segment(piece)], ids, entry is listed[0]


def text_segment(ids: NDArray[np.int64]) -> Segment:
    """Text tokens [n]."""
    return Segment(ids, np.tile(np.arange(len(ids)), (3, 1)), len(ids))
