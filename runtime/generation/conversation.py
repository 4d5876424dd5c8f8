"""A conversation: its messages, whose tokens the KV caches of thinker and talker hold as far as they are prefilled.

Messages may be changed at any time, also while a reply is made: a prefill takes them as they are then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Backend, KvCache
from ..bundle.reader import Bundle
from ..concurrency.timing import StageTimer
from ..events import TurnsDropped
from ..prompt.builder import LaidMessage
from ..prompt.positions import Segment
from .caches import Caches
from .encoders import Encoders
from .entries import Entries, Entry, Tokens, text_segment
from .thinker import require_room

Floats = NDArray[np.float32]

#: 0.3 s of speech for a token: 150 English words of 1.3 tokens in a minute
_CODES_PER_TOKEN = 15.0


class Conversation:
    """The messages of a conversation and the KV caches of the two decoders.

    Args:
        new_cache: gives the cache of the graph of that name, for ``capacity`` tokens.

    Attributes:
        codes_per_token: codec tokens that speech takes for a text token: those of the last reply that was spoken to its
            end, before that ``_CODES_PER_TOKEN``.
    """

    def __init__(self, bundle: Bundle, new_cache: Callable[[str], KvCache], capacity: int) -> None:
        self.entries = Entries()
        self.caches = Caches(bundle, new_cache)
        self.capacity = capacity
        self.codes_per_token = _CODES_PER_TOKEN
        self._bundle, self._new_cache = bundle, new_cache
        self._encoders: Encoders | None = None
        self._turn: list[Entry] = []  # what was begun and has not ended: the user's, the reply
        self._prefilled = -1  # version of the entries
        self._dropped: list[Entry] = []
        self._turns_dropped = self._refilled = 0

    def use(self, backend: Backend, timer: StageTimer) -> None:
        """Run on this backend from now on, and count time there."""
        self.caches.use(backend, timer)
        self._encoders = Encoders(backend, timer)

    def clear(self) -> None:
        """Forget everything."""
        self.entries.replace([])
        self.caches.cut(0)

    def release(self) -> None:
        """Forget everything, and free the caches."""
        self.entries.replace([])
        self.caches = Caches(self._bundle, self._new_cache)

    @property
    def ids(self) -> NDArray[np.int64]:
        """All tokens [S]."""
        return Tokens.of(self.entries.segments()).ids

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.entries.length

    @property
    def behind(self) -> bool:
        """Whether something has changed since the last prefill."""
        return self._prefilled != self.entries.version

    # -- a turn

    def begin_turn(self) -> Entry:
        """A new turn begins, with a message of the user."""
        self.caches.kept = len(self.caches.held)
        self._turn = []
        return self.begin_message("user", begins=True)

    def begin_message(self, role: str, *segments: Segment, begins: bool = False) -> Entry:
        """What is added from now on is the turn's next message; that of the assistant is its reply.

        Args:
            begins: it is not dropped with what stands before it.
        """
        entry = self.entries.make(role, segments)
        entry.open, entry.begins = True, begins
        self.entries.insert(entry)
        self._turn.append(entry)
        return entry

    def end_turn(self) -> None:
        """The user's messages are complete."""
        for entry in self._turn:
            self.entries.put(entry, entry.segments, open=False)

    def undo_turn(self) -> None:
        """Discard the turn that was begun last, and its reply."""
        self.entries.remove(self._turn)
        self._turn = []
        self.caches.cut(len(self.caches.held))

    def add(self, segment: Segment) -> None:
        """Append tokens to the message that is open; ``prefill`` runs them."""
        if len(segment):
            entry = self._turn[-1]
            self.entries.put(entry, [*entry.segments, segment], open=entry.open)

    def replace_embeds(self, indices: NDArray[np.int64], embeds: Floats, key: int) -> None:
        """Give tokens of the open message, named by their indices [n] in it, other embeddings [n, H]."""
        entry = self._turn[-1]
        for segment in entry.segments:
            found = np.isin(indices, segment.indices)
            if found.any():
                assert segment.embeds is not None
                at = np.searchsorted(segment.indices, indices[found])
                segment.embeds[at], segment.keys[at] = embeds[found], key
            indices = indices - len(segment)
        self.entries.put(entry, entry.segments, open=entry.open)

    def answer(self, ids: list[int], conditioning: list[Floats], closing: NDArray[np.int64]) -> None:
        """The reply has ended.

        Args:
            ids: the tokens that count as said, without a stop token. Both caches are cut back to them.
            conditioning: float32 [H] each, the talker's, of the tokens that the thinker has consumed.
            closing: what ends the assistant's message.
        """
        said = np.asarray(ids, np.int64)
        self.caches.keep_reply(said, conditioning)
        if self._turn and self._turn[-1].role == "assistant":
            entry = self._turn[-1]
            self.entries.put(entry, [*entry.segments, text_segment(said), text_segment(closing)], open=False)
        self._turn = []

    # -- other messages

    def add_message(
        self, laid: LaidMessage, encoders: Encoders, before: Entry | None = None, result: str | None = None
    ) -> Entry:
        """Add a complete message, whose media are encoded now.

        Args:
            result: what a tool call gave, if it holds that alone.
        """
        entry = self._entry(laid)
        entry.result = result
        self._encode(entry, encoders)
        self.entries.insert(entry, before)
        return entry

    def replace(self, laid: Sequence[LaidMessage]) -> None:
        """Have these messages instead. Of those that are there, the same ones stay, with their media's embeddings."""
        with self.entries.lock:
            there = list(self.entries)
            made = []
            for message in laid:
                entry = self._entry(message)
                same = next((other for other in there if other.same_as(entry)), None)
                if same is not None:
                    there.remove(same)
                made.append(same or entry)
            self.entries.replace(made)

    def shorten(self, entry: Entry, texts: int) -> bool:
        """Cut a complete reply back to its first so many tokens of text; whether that made it shorter."""
        with self.entries.lock:
            if entry.said is None or entry.open or entry not in self.entries:
                return False
            header, said, closing = entry.segments
            ids = entry.said(texts)
            if len(ids) >= len(said):
                return False
            self.entries.put(entry, [header, text_segment(np.asarray(ids, np.int64)), closing], open=False)
            return True

    def shorten_spoken(self, entry: Entry, codes: int) -> bool:
        """Cut a reply back to what so many codec tokens said of it, by its pace; whether that made it shorter."""
        return bool(entry.pace) and self.shorten(entry, codes_to_tokens(codes, entry.pace or 1.0))

    # -- the caches

    def prefill(self, reserve: int | None = 1, least: int = 1, *, logits: bool = False) -> None:
        """Run the tokens that the thinker does not have yet.

        Args:
            reserve: tokens of room to leave; for that the oldest turns are dropped. None: nothing is dropped.
            least: tokens of room without which nothing is run.
            logits: those after the last token are asked for.

        Raises:
            PromptTooLong: the last turn does not fit, even alone with the system message. Nothing has changed.
        """
        dropped = False
        while True:
            with self.entries.lock:
                dropped |= self._make_room(reserve, least)
                waiting = [entry for entry in self.entries if entry.waiting]
                if not waiting:
                    version, segments = self.entries.version, self.entries.segments()
                    break
            assert self._encoders is not None, "use() comes first"
            for entry in waiting:
                self._encode(entry, self._encoders)
        tokens, held = Tokens.of(segments), self.caches.held
        if dropped:
            self._refilled += max(0, min(len(held), len(tokens)) - held.common(tokens))
        self.caches.prefill(tokens, segments, logits=logits)
        self._prefilled = version

    def catch_up(self) -> None:
        """Let the talker prefill what the thinker has."""
        self.caches.catch_up()

    @property
    def committed(self) -> int:
        """Tokens of the first system messages and the last turn, which are never dropped."""
        turns = self.entries.turns()
        return sum(map(len, turns[0])) + (sum(map(len, turns[-1])) if len(turns) > 1 else 0)

    def require_room(self, tokens: int = 0, least: int = 1) -> None:
        """Whether the last turn can take so many more tokens, with ``least`` more behind them.

        Raises:
            PromptTooLong: it could not, even alone with the system message.
        """
        require_room(self.committed + tokens, self.capacity, least)

    def take_dropped(self) -> TurnsDropped | None:
        """What was dropped since this was last asked."""
        turns, refilled, items = self._turns_dropped, self._refilled, [entry.id for entry in self._dropped]
        self._turns_dropped = self._refilled = 0
        self._dropped = []
        return TurnsDropped(turns, refilled, items) if turns else None

    def _entry(self, laid: LaidMessage) -> Entry:
        placed = laid.tokens.place([(span.indices, span.key) for span in laid.media])
        return self.entries.make(laid.role, [placed], laid.media)

    def _encode(self, entry: Entry, encoders: Encoders) -> None:
        fills = [(span.indices, encoders.embed(span), span.key) for span in entry.waiting]
        if fills:
            self.entries.put(entry, [entry.segments[0].fill(fills)], open=False)
            entry.waiting = []

    def _make_room(self, reserve: int | None, least: int) -> bool:
        """Whether something was dropped."""
        self.require_room(least=least)
        turns, length, count = self.entries.turns(), self.length, 0
        if reserve is None:
            require_room(length, self.capacity, least)
            return False
        while len(turns) - count > 2 and length + reserve > self.capacity:
            count += 1
            length -= sum(map(len, turns[count]))
        gone = [entry for turn in turns[1 : count + 1] for entry in turn]
        if gone:
            self.entries.remove(gone)
        self._dropped += gone
        self._turns_dropped += count
        return bool(gone)


def codes_to_tokens(codes: int, pace: float) -> int:
    """Text tokens that so many codec tokens have said, at ``pace`` for each."""
    return int(codes / pace + 1e-6)
