"""Run the thinker: a prompt in its KV cache in, text tokens and the talker's conditioning out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..bundle.reader import EmbeddingTable
from ..concurrency.timing import StageTimer
from ..errors import PromptTooLong
from .decoder import Decoder
from .sampling import Sampler


@dataclass(frozen=True)
class ThinkerStep:
    """One generated token.

    Attributes:
        token_id: the k-th generated token.
        conditioning: float32 [H], the talker's: ``hidden + embedding`` of generated token k - 1, which was consumed to
            pick this one; None at k = 0. The last generated token is never consumed: it has none.
        stop: the token ends the reply and is not part of it.
        last: no step follows: a stop token, the last of ``max_new_tokens``, or a full cache.
    """

    token_id: int
    conditioning: NDArray[np.float32] | None
    stop: bool
    last: bool


class ThinkerRun:
    """One reply of the thinker, after prefill.

    Args:
        decoder: holds the prompt, and nothing else.
        embedding: the thinker's.
        logits: float32 [V] after the prompt.
        prompt_ids: int64 [S], what the repetition penalty sees beside the reply.
        position: of the first generated token, in all three components; the k-th has this plus k.
        stop: ids that end the reply.

    Attributes:
        conditioning: float32 [H] each, the talker's, of the generated tokens that were consumed so far.
        finish_reason: once ``steps`` has ended: ``stop``, ``length`` (``max_new_tokens``) or ``context`` (full cache).
    """

    def __init__(
        self,
        decoder: Decoder,
        sampler: Sampler,
        embedding: EmbeddingTable,
        timer: StageTimer,
        *,
        logits: NDArray[np.float32],
        prompt_ids: NDArray[np.int64],
        position: int,
        stop: Iterable[int],
    ) -> None:
        self.conditioning: list[NDArray[np.float32]] = []
        self.finish_reason = "stop"
        self._decoder = decoder
        self._logits = logits
        self._prompt_ids = prompt_ids
        self._position = position
        self._sampler = sampler
        self._embedding = embedding
        self._stop = frozenset(stop)
        self._timer = timer

    def steps(self) -> Iterator[ThinkerStep]:
        """Generate until a stop token, ``max_new_tokens``, or a full cache."""
        # The last token is not consumed, so a reply may be one token longer than the room.
        limit = min(self._sampler.config.max_new_tokens, self._decoder.room + 1)
        seen = np.concatenate([self._prompt_ids, np.zeros(limit, np.int64)])
        count, logits = len(self._prompt_ids), self._logits
        for k in range(limit):
            with self._timer("thinker"):
                token = self._sampler.pick(logits, seen[: count + k])
            stop = token in self._stop
            last = stop or k + 1 == limit
            if last and not stop:
                self.finish_reason = "length" if limit == self._sampler.config.max_new_tokens else "context"
            yield ThinkerStep(token, self.conditioning[-1] if self.conditioning else None, stop, last)
            if last:
                return
            seen[count + k] = token
            with self._timer("thinker"):
                embed = self._embedding.rows([token])
                logits, hidden = self._decoder.forward(embed, np.full((3, 1), self._position + k, np.int64))
                if hidden is not None:
                    self.conditioning.append(hidden[0] + embed[0])


def require_room(tokens: int, capacity: int, reply: int = 1) -> None:
    """PromptTooLong unless a prompt and at least ``reply`` more tokens fit."""
    if tokens + reply > capacity:
        raise PromptTooLong(
            f"the prompt takes {tokens} tokens, and the reply needs at least {reply} more; the KV cache holds "
            f"{capacity}. Shorten the prompt or its media, or export with a larger --max-context"
        )
