"""A conversation: its tokens, turn by turn, and how much of them the KV caches of thinker and talker hold.

Both caches always hold a prefix of the tokens here. So nothing has to be undone when a turn is dropped, cut short or
changed: the tokens are set right, the caches are cut back to what is still true, and the next prefill does the rest.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import cast

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Backend, KvCache
from ..bundle.reader import Bundle
from ..concurrency.timing import StageTimer
from ..errors import OmniportError
from ..events import TurnsDropped
from ..prompt.positions import Segment
from .decoder import Decoder
from .thinker import require_room

Floats = NDArray[np.float32]

#: 0.3 s of speech for a token: 150 English words of 1.3 tokens in a minute
_CODES_PER_TOKEN = 15.0


class Conversation:
    """The tokens of a conversation and its two KV caches.

    Args:
        new_cache: gives the cache of the graph of that name, for ``capacity`` tokens.

    Attributes:
        turns: segments of each turn, a question with its reply; the first is the system message.
        logits: float32 [V] after the last prefilled token.
        prefilled: tokens that the thinker has prefilled, all in all.
        codes_per_token: codec tokens that speech takes for a text token: those of the last reply that was spoken to its
            end, before that ``_CODES_PER_TOKEN``.
    """

    def __init__(self, bundle: Bundle, new_cache: Callable[[str], KvCache], capacity: int) -> None:
        self.turns: list[list[Segment]] = [[]]
        self.logits: Floats = np.zeros(0, np.float32)
        self.prefilled = 0
        self.codes_per_token = _CODES_PER_TOKEN
        self._bundle = bundle
        self._new_cache = new_cache
        self.capacity = capacity
        self._speaks = bundle.manifest.talker is not None
        self._decoders: dict[str, Decoder] = {}
        # float32 [n, H] of the tokens that the thinker has and the talker does not
        self._conditioning: Floats = np.zeros((0, bundle.manifest.thinker.hidden_size), np.float32)
        self._dropped = self._refilled = 0
        self._lock = threading.Lock()  # a reply may be shortened while the next turn begins
        self._backend: Backend | None = None
        self._timer = StageTimer()

    def use(self, backend: Backend, timer: StageTimer) -> None:
        """Run on this backend from now on, and count time there."""
        self._backend, self._timer = backend, timer
        for name, decoder in self._decoders.items():
            decoder.graph = backend.graph(name)

    def decoder(self, name: str) -> Decoder:
        """The decoder of that name; its graph and cache are made on first use."""
        if name not in self._decoders:
            assert self._backend is not None, "use() comes first"
            with self._timer("load"):
                self._decoders[name] = Decoder(self._backend.graph(name), self._new_cache(name))
        return self._decoders[name]

    @property
    def ids(self) -> NDArray[np.int64]:
        """All tokens [S]."""
        return np.concatenate([np.zeros(0, np.int64), *(segment.ids for segment in self._segments())])

    @property
    def length(self) -> int:
        """Number of tokens."""
        return sum(len(segment) for segment in self._segments())

    @property
    def cached(self) -> int:
        """Tokens in the thinker's cache."""
        return self._length("thinker")

    @property
    def cursor(self) -> int:
        """Position of the next token."""
        return sum(segment.advance for segment in self._segments())

    @property
    def highest(self) -> int:
        """Highest position of any token."""
        cursor, highest = 0, -1
        for segment in self._segments():
            highest = max(highest, cursor + int(segment.positions.max()))
            cursor += segment.advance
        return highest

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self.turns = [[]]
            self._cut(0)

    def begin_turn(self) -> None:
        """What is added from now on is a new turn; the last one can't be shortened any more."""
        with self._lock:
            self.turns.append([])

    def undo_turn(self) -> None:
        """Discard the last turn."""
        self.turns.pop()
        self._cut(self.length)

    def add(self, segment: Segment) -> None:
        """Append tokens to the current turn; ``prefill`` runs them."""
        if len(segment):
            self.turns[-1].append(segment)

    def prefill(self, reserve: int = 1, least: int = 1) -> None:
        """Run the tokens that the thinker does not have yet.

        Args:
            reserve: tokens of room to leave; for that the oldest turns after the system message are dropped.
            least: tokens of room without which nothing is run.

        Raises:
            PromptTooLong: the current turn does not fit, even alone with the system message. Nothing has changed.
        """
        self._make_room(reserve, least)
        decoder, start = self.decoder("thinker"), self.cached
        if start == self.length:
            return
        with self._timer("prefill"):
            embeds, positions, media = self._from(start)
            try:
                self.logits, hidden = decoder.forward(embeds, positions)
            except BaseException:
                decoder.truncate(start)  # the hidden states of a part of them are lost
                raise
            if hidden is None:
                raise OmniportError("the thinker graph gives no 'hidden'; export the bundle again")
            self.prefilled += len(embeds)
            if self._speaks:
                embeds[media] = 0
                self._conditioning = np.concatenate([self._conditioning, hidden + embeds])

    @property
    def committed(self) -> int:
        """Tokens of the system message and the current turn, which are never dropped."""
        return sum(map(_tokens, (self.turns[0], self.turns[-1]) if len(self.turns) > 1 else (self.turns[0],)))

    def require_room(self, tokens: int = 0, least: int = 1) -> None:
        """Whether the current turn can take so many more tokens, with ``least`` more behind them.

        Raises:
            PromptTooLong: it could not, even alone with the system message.
        """
        require_room(self.committed + tokens, self.capacity, least)

    def take_dropped(self) -> TurnsDropped | None:
        """What was dropped since this was last asked."""
        dropped, refilled, self._dropped, self._refilled = self._dropped, self._refilled, 0, 0
        return TurnsDropped(dropped, refilled) if dropped else None

    def catch_up(self) -> None:
        """Let the talker prefill what the thinker has."""
        decoder, start = self.decoder("talker"), self._length("talker")
        if not len(self._conditioning):
            return
        with self._timer("talker_prefill"):
            _, positions, _ = self._from(start)
            try:
                decoder.forward(self._conditioning, positions[:, : len(self._conditioning)])
            except BaseException:
                decoder.truncate(start)
                raise
            self._conditioning = self._conditioning[:0]

    def replace_embeds(self, indices: NDArray[np.int64], embeds: Floats) -> None:
        """Give tokens of the current turn, named by their indices [n] in it, other embeddings [n, H]."""
        start = self.length - sum(len(segment) for segment in self.turns[-1])
        self._cut(start + int(indices.min()))
        for segment in self.turns[-1]:
            found = np.isin(indices, segment.indices)
            if found.any():
                assert segment.embeds is not None
                segment.embeds[np.searchsorted(segment.indices, indices[found])] = embeds[found]
            indices = indices - len(segment)

    def answer(self, ids: list[int], conditioning: list[Floats], closing: NDArray[np.int64]) -> None:
        """Append a reply.

        Args:
            ids: the tokens that count as said, without a stop token. Both caches are cut back to them.
            conditioning: float32 [H] each, the talker's, of the tokens that the thinker has consumed.
            closing: what ends the assistant's message.
        """
        prompt = self.length
        consumed = min(len(conditioning), len(ids)) if self.cached >= prompt else 0
        self.add(_line(np.asarray(ids, np.int64)))
        self._length_is("talker", prompt)
        self._length_is("thinker", prompt + consumed)
        if consumed and self._speaks:
            self._conditioning = np.concatenate([self._conditioning, np.stack(conditioning[:consumed])])
        self.add(_line(closing))

    def shorten_answer(self, turn: list[Segment] | None, ids: list[int], first: int) -> bool:
        """Let a turn's reply be ``ids``, of which ``first`` are its first ones, if it is the last; whether it is."""
        with self._lock:
            if self.turns[-1] is not turn:
                return False
            closing = turn[-1]
            del turn[-2:]
            prompt = self.length
            self.add(_line(np.asarray(ids, np.int64)))
            self._cut(prompt + first)
            self.add(closing)
            return True

    def _segments(self) -> Iterator[Segment]:
        for turn in self.turns:
            yield from turn

    def _length(self, name: str) -> int:
        return self._decoders[name].length if name in self._decoders else 0

    def _length_is(self, name: str, length: int) -> None:
        if name in self._decoders:
            self._decoders[name].truncate(length)

    def _cut(self, length: int) -> None:
        """Forget what the caches hold behind the first ``length`` tokens."""
        self._length_is("thinker", length)
        self._length_is("talker", self.cached)
        self._conditioning = self._conditioning[: self.cached - self._length("talker")]

    def _make_room(self, reserve: int, least: int) -> None:
        self.require_room(least=least)
        system, dropped, cached = _tokens(self.turns[0]), 0, self.cached
        while len(self.turns) > 2 and self.length + reserve > self.capacity:
            self.turns.pop(1)
            dropped += 1
        if dropped:
            self._cut(system)
            self._dropped += dropped
            self._refilled += max(0, min(cached, self.length) - system)

    def _from(self, start: int) -> tuple[Floats, NDArray[np.int64], NDArray[np.bool_]]:
        """Embeddings [n, H] and positions [3, n] of the tokens from ``start`` on, and which are media's."""
        table = self._bundle.embedding("thinker")
        embeds, positions, media = [], [], []
        offset = cursor = 0
        for segment in self._segments():
            if offset + len(segment) > start:
                first = max(0, start - offset)
                rows = table.rows(segment.ids)
                if segment.embeds is not None:
                    rows[segment.indices] = segment.embeds
                embeds.append(rows[first:])
                positions.append(cursor + segment.positions[:, first:])
                media.append(segment.media_mask[first:])
            offset += len(segment)
            cursor += segment.advance
        return np.concatenate(embeds), np.concatenate(positions, axis=1), np.concatenate(media)


def _tokens(turn: list[Segment]) -> int:
    return sum(len(segment) for segment in turn)


def _line(ids: NDArray[np.int64]) -> Segment:
    """Text tokens."""
    return Segment(ids, cast("NDArray[np.int64]", np.tile(np.arange(len(ids)), (3, 1))), len(ids))
