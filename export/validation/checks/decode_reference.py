"""The reference of decode checks: token sequences, with logits and hidden states after every token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ...models.decoder import decoder_of, reference_hidden, reference_logits
from ...models.registry import MODEL_PARTS
from ...models.signals import generator, random_positions, random_tokens
from ..context import Context
from ..reference import array_key

Array = NDArray[np.float32]

#: tokens of the first turn, of the whole conversation, where the cache is cut back to, and length after that: shorter
#: than before, so that slots past its end still hold what was there
FIRST, WHOLE, CUT, REWRITTEN = 19, 31, 23, 28


@dataclass(frozen=True)
class Tokens:
    """embeds [S, E], positions [3, S]."""

    embeds: Array
    positions: NDArray[np.int64]


@dataclass(frozen=True)
class Trail:
    """A decoder's results: logits by number of tokens consumed, and the thinker's hidden states [S, H]."""

    logits: dict[int, Array]
    hidden: Array | None


def decoder_references(context: Context, graph: str) -> dict[str, Trail]:
    """The reference's hidden states after every token and logits after the last `WHOLE`, for each token sequence."""
    found, part = {}, MODEL_PARTS[graph]
    for name, tokens in token_sequences(context, graph).items():
        embeds, positions = tokens.embeds[None], tokens.positions[:, None]
        context.progress(f"{graph}: reference, {len(tokens.embeds)} tokens one by one")

        def run(
            module: nn.Module, embeds: Array = embeds, positions: NDArray[np.int64] = positions
        ) -> Mapping[str, torch.Tensor]:
            hidden = reference_hidden(module, part, embeds, positions)
            return {"hidden": hidden[0], "logits": reference_logits(module, part, hidden[0, -WHOLE:])}

        result = context.reference.result(graph, f"every token {array_key(embeds, positions)}", run)
        rows = result["logits"]
        logits = {len(tokens.embeds) - len(rows) + i + 1: row for i, row in enumerate(rows)}
        found[name] = Trail(logits, result["hidden"] if decoder_of(part).gives_hidden else None)
    return found


def token_sequences(context: Context, graph: str) -> dict[str, Tokens]:
    """``kept``: two turns. ``rewritten``: the same as far as the cut, then other tokens. ``long``: many pieces."""
    rng = generator(f"decode {graph}")

    def tokens(length: int) -> Tokens:
        return Tokens(random_tokens(context.bundle, graph, length, rng), random_positions(length, rng))

    kept, other = tokens(WHOLE), tokens(REWRITTEN - CUT)
    positions = np.concatenate([kept.positions[:, :CUT], kept.positions[:, CUT - 1 : CUT] + 1 + other.positions], 1)
    found = {"kept": kept, "rewritten": Tokens(np.concatenate([kept.embeds[:CUT], other.embeds]), positions)}
    if context.full and context.max_context >= 700:
        found["long"] = tokens(700)
    return found
