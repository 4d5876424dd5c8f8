"""A decoder that is fed the same random tokens in every bundle, and timed."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omniport.runtime.backends.base import Backend
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.generation.decoder import Decoder


class FixedTokens:
    """``count`` embeddings of the decoder's own table, drawn with a fixed seed.

    Args:
        name: thinker or talker, which reads rows of the thinker's width; its own table has them.
        capacity: tokens that the KV cache holds; ``count`` if None.
    """

    def __init__(self, bundle: Bundle, backend: Backend, name: str, count: int, capacity: int | None = None) -> None:
        embeddings = bundle.embedding(name)
        self._rows = embeddings.rows(np.random.default_rng(0).integers(0, embeddings.vocab_size, count))
        self.graph = backend.graph(name)
        self._decoder = Decoder(self.graph, self.graph.new_cache(capacity or count))

    def feed(self, start: int, stop: int) -> tuple[float, NDArray[Any]]:
        """Tokens ``start`` to ``stop``, forgetting any that were fed from ``start`` on: seconds, and logits [V]."""
        self._decoder.truncate(start)
        positions = np.repeat(np.arange(start, stop)[None], 3, axis=0)
        begun = time.perf_counter()
        logits, _ = self._decoder.forward(self._rows[start:stop], positions)
        return time.perf_counter() - begun, logits
