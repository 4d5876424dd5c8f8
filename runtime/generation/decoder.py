"""Run a decoder (thinker or talker) over its KV cache: prefill, decode, cut back."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Graph, KvCache
from ..errors import OmniportError

#: tokens of one prefill call: attention on the CPU materialises heads x S x L scores
PREFILL_CHUNK = 512


class Decoder:
    """Feeds embeddings to a decoder graph and keeps count of the live cache.

    Args:
        graph: ``thinker`` or ``talker``.
        cache: its cache; what it held before is overwritten, not read.

    Attributes:
        length: live tokens. What lies behind them is overwritten, never read.
    """

    def __init__(self, graph: Graph, cache: KvCache) -> None:
        self.graph = graph
        self._cache = cache
        self.length = 0

    @property
    def room(self) -> int:
        """Tokens the cache can still take."""
        return self._cache.capacity - self.length

    def truncate(self, length: int) -> None:
        """Forget what lies behind the first ``length`` tokens."""
        self.length = min(self.length, length)

    def forward(
        self, embeds: NDArray[np.float32], positions: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Append tokens to the cache, in chunks of at most ``PREFILL_CHUNK``.

        Args:
            embeds: float32 [S, E], S at least 1.
            positions: int64 [3, S].

        Returns:
            logits [V] of the last token, and hidden [S, H] if the graph has that output.

        Raises:
            OmniportError: more tokens than the cache has room for.
        """
        if not 1 <= len(embeds) <= self.room:
            raise OmniportError(
                f"{len(embeds)} tokens for a KV cache with room for {self.room}; 1 to that were expected"
            )
        logits, hidden = np.zeros(0, np.float32), []
        for start in range(0, len(embeds), PREFILL_CHUNK):
            piece = slice(start, start + PREFILL_CHUNK)
            count = len(embeds[piece])
            outputs = self.graph.run(
                {
                    "inputs_embeds": np.ascontiguousarray(embeds[None, piece], np.float32),
                    "position_ids": np.ascontiguousarray(positions[:, None, piece], np.int64),
                    "kv_positions": np.arange(self.length + count, dtype=np.int64),
                    "write_index": np.asarray([self.length], np.int64),
                },
                self._cache,
            )
            self.length += count
            logits = outputs["logits"][0]
            if "hidden" in outputs:
                hidden.append(outputs["hidden"][0])
        return logits, np.concatenate(hidden) if hidden else None
