"""Check the KV cache: a decoder must give the same result however its tokens are fed.

Each decoder runs the same tokens in one piece, in chunks, token by token, as a second turn on the same cache, and after
the cache was truncated and other tokens written, all through the runtime's own `Decoder`. Each way is compared with the
reference, which keeps no cache, and with prefill in one piece into a new cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from omniport.runtime.backends.base import Graph
from omniport.runtime.bundle.parts import PARTS
from omniport.runtime.errors import OmniportError
from omniport.runtime.generation.decoder import Decoder
from torch import nn

from ...models.decoder_stack import decoder_of, reference_hidden, reference_logits
from ...models.model_parts import MODEL_PARTS
from ...models.signals import generator, random_positions, random_tokens
from ..comparison import array_check, load_graph
from ..context import Context
from ..reference import array_key
from ..types import FAIL, PASS, Check

Array = NDArray[np.float32]

#: tokens of the first turn, of the whole conversation, where the cache is cut back to, and length after that: shorter
#: than before, so that slots past its end still hold what was there
_FIRST, _WHOLE, _CUT, _REWRITTEN = 19, 31, 23, 28


@dataclass(frozen=True)
class _Tokens:
    """embeds [S, E], positions [3, S]."""

    embeds: Array
    positions: NDArray[np.int64]


@dataclass(frozen=True)
class _Trail:
    """A decoder's results: logits by number of tokens consumed, and the thinker's hidden states [S, H]."""

    logits: dict[int, Array]
    hidden: Array | None


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


def decoder_references(context: Context, graph: str) -> dict[str, _Trail]:
    """The reference's hidden states after every token and logits after the last `_WHOLE`, for each token sequence."""
    found, part = {}, MODEL_PARTS[graph]
    for name, tokens in _token_sequences(context, graph).items():
        embeds, positions = tokens.embeds[None], tokens.positions[:, None]
        context.progress(f"{graph}: reference, {len(tokens.embeds)} tokens one by one")

        def run(
            module: nn.Module, embeds: Array = embeds, positions: NDArray[np.int64] = positions
        ) -> Mapping[str, torch.Tensor]:
            hidden = reference_hidden(module, part, embeds, positions)
            return {"hidden": hidden[0], "logits": reference_logits(module, part, hidden[0, -_WHOLE:])}

        result = context.reference.result(graph, f"every token {array_key(embeds, positions)}", run)
        rows = result["logits"]
        logits = {len(tokens.embeds) - len(rows) + i + 1: row for i, row in enumerate(rows)}
        found[name] = _Trail(logits, result["hidden"] if decoder_of(part).gives_hidden else None)
    return found


def _token_sequences(context: Context, graph: str) -> dict[str, _Tokens]:
    """``kept``: two turns. ``rewritten``: the same as far as the cut, then other tokens. ``long``: many pieces."""
    rng = generator(f"decode {graph}")

    def tokens(length: int) -> _Tokens:
        return _Tokens(random_tokens(context.bundle, graph, length, rng), random_positions(length, rng))

    kept, other = tokens(_WHOLE), tokens(_REWRITTEN - _CUT)
    positions = np.concatenate([kept.positions[:, :_CUT], kept.positions[:, _CUT - 1 : _CUT] + 1 + other.positions], 1)
    found = {"kept": kept, "rewritten": _Tokens(np.concatenate([kept.embeds[:_CUT], other.embeds]), positions)}
    if context.full and context.max_context >= 700:
        found["long"] = tokens(700)
    return found


class _Ways:
    """The ways to feed one decoder."""

    def __init__(self, context: Context, graph: str, loaded: Graph, wanted: dict[str, _Trail]) -> None:
        self.context, self.graph, self.loaded, self.wanted = context, graph, loaded, wanted
        self.tokens = _token_sequences(context, graph)

    def checks(self) -> Iterator[Check]:
        """Run all ways."""
        kept, rewritten = self.tokens["kept"], self.tokens["rewritten"]
        ends = (1, 6, _FIRST, _WHOLE)
        try:
            single = self._in_one_piece(kept, ends)
            again = self._in_one_piece(rewritten, (_CUT, _REWRITTEN))
        except OmniportError as error:
            yield self._refused("in one piece", error)
            return
        yield self._compare("in one piece", "kept", single, None)
        ways = {
            "in chunks of 1, 5 and the rest": (1, 5, _WHOLE - 6),
            "token by token": (1,) * _WHOLE,
            "two turns on one cache": (_FIRST, _WHOLE - _FIRST),
            "a turn, then token by token": (_FIRST, *(1,) * (_WHOLE - _FIRST)),
        }
        for name, pieces in ways.items():
            yield from self._both(name, "kept", partial(self._feed, kept, pieces), single)
        for name, tail in {"in one piece": (_REWRITTEN - _CUT,), "token by token": (1,) * (_REWRITTEN - _CUT)}.items():
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

    def _in_one_piece(self, tokens: _Tokens, ends: Sequence[int]) -> _Trail:
        """Each number of tokens in one piece into a new cache."""
        logits: dict[int, Array] = {}
        hidden: Array | None = None
        for end in ends:
            self.context.progress(f"{self.graph}: {end} tokens in one piece")
            logits[end], hidden = self._decoder().forward(tokens.embeds[:end], tokens.positions[:, :end])
        return _Trail(logits, hidden)

    def _feed(self, tokens: _Tokens, pieces: Sequence[int], decoder: Decoder | None = None) -> _Trail:
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
        return _Trail(logits, np.concatenate(hidden) if hidden else None)

    def _cut_back(self, kept: _Tokens, rewritten: _Tokens, tail: Sequence[int]) -> _Trail:
        """Two turns, the cache cut back, other tokens written over what was there. Hidden states of those only."""
        decoder = self._decoder()
        self._feed(kept, (_FIRST, _WHOLE - _FIRST), decoder)
        decoder.length = _CUT
        return self._feed(rewritten, tail, decoder)

    def _both(self, way: str, case: str, run: Callable[[], _Trail], single: _Trail | None) -> Iterator[Check]:
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

    def _compare(self, way: str, case: str, got: _Trail, single: _Trail | None) -> Check:
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
