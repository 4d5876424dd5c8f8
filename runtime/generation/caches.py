"""The KV caches of thinker and talker, and which tokens they hold.

Both hold a prefix of the tokens of a conversation. So nothing has to be undone when a conversation is changed: the next
prefill compares, cuts both back to the first token that differs, and runs the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Backend, KvCache
from ..bundle.reader import Bundle
from ..concurrency.timing import StageTimer
from ..errors import OmniportError
from ..prompt.positions import Segment
from .decoder import Decoder
from .entries import Tokens

Floats = NDArray[np.float32]


class Caches:
    """Two KV caches, one user at a time.

    Args:
        new_cache: gives the cache of the graph of that name.

    Attributes:
        held: the tokens in the thinker's cache, without those of a reply under way.
        logits: float32 [V] after the last of them.
        prefilled: tokens that the thinker has prefilled, all in all.
        kept: tokens that were held when this was last set, and have been ever since.
    """

    def __init__(self, bundle: Bundle, new_cache: Callable[[str], KvCache]) -> None:
        self.held = Tokens.of([])
        self.logits: Floats = np.zeros(0, np.float32)
        self.prefilled = self.kept = 0
        self._bundle, self._new_cache = bundle, new_cache
        self._speaks = bundle.manifest.talker is not None
        self._decoders: dict[str, Decoder] = {}
        # float32 [n, H] of the tokens that the thinker has and the talker does not
        self._conditioning: Floats = np.zeros((0, bundle.manifest.thinker.hidden_size), np.float32)
        self._logits_at = -1
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
    def talks(self) -> bool:
        """Whether the talker has a cache."""
        return "talker" in self._decoders

    def cut(self, length: int) -> None:
        """Forget what both hold behind the first ``length`` tokens, and a reply that was under way."""
        if length < len(self.held):
            self.held = self.held.first(length)
        self.kept = min(self.kept, length)
        if length < self._logits_at:
            self._logits_at = -1
        length = len(self.held)
        for decoder in self._decoders.values():
            decoder.truncate(length)
        self._conditioning = self._conditioning[: length - self._talked]

    def prefill(self, tokens: Tokens, segments: Sequence[Segment], *, logits: bool = False) -> None:
        """Hold these tokens: cut back to what is the same, and run the rest.

        Args:
            segments: where the embeddings are.
            logits: those after the last token are asked for.
        """
        decoder, start = self.decoder("thinker"), self.held.common(tokens)
        self.cut(start)
        if start == len(tokens) and logits and self._logits_at != start > 0:
            start -= 1
            self.cut(start)
        if start == len(tokens):
            self.held = tokens  # its cursor
            return
        with self._timer("prefill"):
            embeds = self._embeds(segments, start)
            try:
                self.logits, hidden = decoder.forward(embeds, tokens.positions[:, start:])
            except BaseException:
                decoder.truncate(start)  # the hidden states of a part of them are lost
                raise
            if hidden is None:
                raise OmniportError("the thinker graph gives no 'hidden'; export the bundle again")
            self.held, self._logits_at = tokens, len(tokens)
            self.prefilled += len(embeds)
            if self._speaks:
                embeds[tokens.media_mask[start:]] = 0
                self._conditioning = np.concatenate([self._conditioning, hidden + embeds])

    def catch_up(self) -> None:
        """Let the talker prefill what the thinker has."""
        decoder, start = self.decoder("talker"), self._talked
        if not len(self._conditioning):
            return
        with self._timer("talker_prefill"):
            positions = self.held.positions[:, start : start + len(self._conditioning)]
            try:
                decoder.forward(self._conditioning, positions)
            except BaseException:
                decoder.truncate(start)
                raise
            self._conditioning = self._conditioning[:0]

    def keep_reply(self, ids: NDArray[np.int64], conditioning: Sequence[Floats]) -> None:
        """A reply has ended: keep what the thinker has consumed of the tokens that count as said.

        Args:
            conditioning: float32 [H] each, the talker's, of the tokens that the thinker has consumed.
        """
        prompt, consumed = len(self.held), min(len(conditioning), len(ids))
        thinker = self._decoders.get("thinker")
        if thinker is None or thinker.length < prompt + consumed:
            consumed = 0
        if self.talks:
            self._decoders["talker"].truncate(prompt)
        if thinker is not None:
            thinker.truncate(prompt + consumed)
        self.held = self.held.then(ids[:consumed])
        if consumed and self._speaks:
            self._conditioning = np.concatenate([self._conditioning, np.stack(conditioning[:consumed])])

    @property
    def _talked(self) -> int:
        return self._decoders["talker"].length if self.talks else 0

    def _embeds(self, segments: Sequence[Segment], start: int) -> Floats:
        """Embeddings [n, H] of the tokens from ``start`` on."""
        table, embeds, offset = self._bundle.embedding("thinker"), [], 0
        for segment in segments:
            if offset + len(segment) > start:
                rows = table.rows(segment.ids)
                if len(segment.indices):
                    assert segment.embeds is not None, "media are encoded first"
                    rows[segment.indices] = segment.embeds
                embeds.append(rows[max(0, start - offset) :])
            offset += len(segment)
        return np.concatenate(embeds)
