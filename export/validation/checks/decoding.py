"""Check the KV cache: a decoder must give the same result however its tokens are fed.

Each decoder runs the same tokens in one piece, in chunks, token by token, as a second turn on the same cache, and after
the cache was truncated and other tokens written, all through the runtime's own `Decoder`. Each way is compared with the
reference, which keeps no cache, and with prefill in one piece into a new cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate

import msgspec
import numpy as np
from numpy.typing import NDArray
from omniport.runtime.backends.base import Graph
from omniport.runtime.bundle.parts import PARTS
from omniport.runtime.errors import OmniportError
from omniport.runtime.generation.decoder import Decoder

from ..comparison import array_check
from ..context import Context
from ..types import FAIL, PASS, Check
from .decode_reference import CUT, FIRST, REWRITTEN, WHOLE, Tokens, Trail, decoder_references, token_sequences
from .graphs import load_graph

Array = NDArray[np.float32]


def decode_checks(context: Context) -> Iterator[Check]:
    """Two checks, against the reference and against prefill in one piece, for every way to feed a decoder."""
    graphs = [name for name in context.graphs if PARTS[name].decodes]
    wanted = {graph: decoder_references(context, graph) for graph in graphs}
    context.reference.release()
    for graph in graphs:
        loaded = load_graph(context.backend, graph)
        if isinstance(loaded, Check):
            yield loaded
            continue
        yield from _Ways(context, graph, loaded, wanted[graph]).checks()


class _Ways:
    """The ways to feed one decoder."""

    def __init__(self, context: Context, graph: str, loaded: Graph, wanted: dict[str, Trail]) -> None:
        self.context, self.graph, self.loaded, self.wanted = context, graph, loaded, wanted
        self.tokens = token_sequences(context, graph)

    def checks(self) -> Iterator[Check]:
        """Run all ways."""
        kept, rewritten = self.tokens["kept"], self.tokens["rewritten"]
        ends = (1, 6, FIRST, WHOLE)
        try:
            single = self._in_one_piece(kept, ends)
            again = self._in_one_piece(rewritten, (CUT, REWRITTEN))
        except OmniportError as error:
            yield self._refused("in one piece", error)
            return
        yield self._compare("in one piece", "kept", single, None)
        ways = {
            "in chunks of 1, 5 and the rest": (1, 5, WHOLE - 6),
            "token by token": (1,) * WHOLE,
            "two turns on one cache": (FIRST, WHOLE - FIRST),
            "a turn, then token by token": (FIRST, *(1,) * (WHOLE - FIRST)),
        }
        for name, pieces in ways.items():
            yield from self._both(name, "kept", partial(self._feed, kept, pieces), single)
        for name, tail in {"in one piece": (REWRITTEN - CUT,), "token by token": (1,) * (REWRITTEN - CUT)}.items():
            yield from self._both(
                f"cut back, then rewritten {name}",
                "rewritten",
                partial(self._cut_back, kept, rewritten, tail),
                again,
            )
        if "long" in self.tokens:
            long = self.tokens["long"]
            yield from self._both("700 tokens in one call", "long", partial(self._feed, long, (700,)), None)

    def _decoder(self) -> Decoder:
        return Decoder(self.loaded, self.loaded.new_cache(self.context.max_context))

    def _in_one_piece(self, tokens: Tokens, ends: Sequence[int]) -> Trail:
        """Each number of tokens in one piece into a new cache."""
        logits: dict[int, Array] = {}
        hidden: Array | None = None
        for end in ends:
            self.context.progress(f"{self.graph}: {end} tokens in one piece")
            logits[end], hidden = self._decoder().forward(tokens.embeds[:end], tokens.positions[:, :end])
        return Trail(logits, hidden)

    def _feed(self, tokens: Tokens, pieces: Sequence[int], decoder: Decoder | None = None) -> Trail:
        """Pieces of these lengths, one after the other, from where the decoder's cache ends."""
        decoder = decoder or self._decoder()
        logits: dict[int, Array] = {}
        hidden = []
        start = decoder.length
        for end in accumulate(pieces, initial=start):
            if end > start:
                logits[end], states = decoder.forward(tokens.embeds[start:end], tokens.positions[:, start:end])
                hidden += [] if states is None else [states]
            start = end
        return Trail(logits, np.concatenate(hidden) if hidden else None)

    def _cut_back(self, kept: Tokens, rewritten: Tokens, tail: Sequence[int]) -> Trail:
        """Two turns, the cache cut back, other tokens written over what was there. Hidden states of those only."""
        decoder = self._decoder()
        self._feed(kept, (FIRST, WHOLE - FIRST), decoder)
        decoder.length = CUT
        return self._feed(rewritten, tail, decoder)

    def _both(self, way: str, case: str, run: Callable[[], Trail], single: Trail | None) -> Iterator[Check]:
        self.context.progress(f"{self.graph}: {way}")
        try:
            got = run()
        except OmniportError as error:
            yield self._refused(way, error)
            return
        yield self._compare(way, case, got, None)
        if single is not None:
            yield self._compare(way, case, got, single)

    def _refused(self, way: str, error: OmniportError) -> Check:
        return Check.failed(self.graph, way, f"the graph did not run: {error}")

    def _compare(self, way: str, case: str, got: Trail, single: Trail | None) -> Check:
        """With prefill in one piece, or with the reference if there is none. The worse of logits and hidden decides."""
        against = "reference" if single is None else "one piece"
        rule = "graph.rel_rms" if single is None else "decode.rel_rms"
        other = self.wanted[case] if single is None else single
        name, precision = f"{way}, against {against}", self.context.precision[self.graph]
        ends = [end for end in got.logits if end in other.logits]
        rows, wanted = (np.stack([trail.logits[end] for end in ends]) for trail in (got, other))
        check = array_check(self.graph, name, rows, wanted, precision, rule=rule, logits=True)
        if got.hidden is None or other.hidden is None:
            return check
        last = max(got.logits)
        states = other.hidden[last - len(got.hidden) : last]
        hidden = array_check(self.graph, name, got.hidden, states, precision, rule=rule)
        return _joined(check, hidden)


def _joined(logits: Check, hidden: Check) -> Check:
    """One check of the logits' figures and the hidden states' with ``hidden_`` before them."""
    return msgspec.structs.replace(
        logits,
        status=PASS if logits.status == hidden.status == PASS else FAIL,
        figures=logits.figures | {f"hidden_{figure}": value for figure, value in hidden.figures.items()},
        limits=logits.limits | {f"hidden_{figure}": value for figure, value in hidden.limits.items()},
        reasons=logits.reasons | {f"hidden_{figure}": reason for figure, reason in hidden.reasons.items()},
        message="; ".join(filter(None, (logits.message, hidden.message and f"hidden states: {hidden.message}"))),
    )
