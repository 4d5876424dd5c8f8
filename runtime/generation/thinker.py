"""Run the thinker: a prompt in its KV cache in, text tokens and the talker's conditioning out.

The talker's conditioning of a token is ``hidden + embedding`` after the thinker has consumed it. The last token that is
generated never is consumed: it has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..bundle.reader import EmbeddingTable
from ..concurrency.timing import StageTimer
from ..errors import PromptTooLong
from .decoder import Decoder
from .sampling import Sampler

#: given tokens that are consumed at once: about as many as the first window of speech takes
_PIECE = 32


@dataclass(frozen=True)
class ThinkerStep:
    """One generated token.

    Attributes:
        stop: the token ends the reply and is not part of it.
        last: no step follows: a stop token, the last of ``max_new_tokens``, or a full cache.
    """

    token_id: int
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
        given: the tokens of the reply, which are consumed instead of any that would be picked; there must be room.

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
        given: Sequence[int] = (),
    ) -> None:
        self.conditioning: list[NDArray[np.float32]] = []
        self.finish_reason = "stop"
        self._decoder = decoder
        self._prompt = decoder.length
        self._logits = logits
        self._prompt_ids = prompt_ids
        self._position = position
        self._sampler = sampler
        self._embedding = embedding
        self._stop = frozenset(stop)
        self._given = given
        self._timer = timer

    def steps(self) -> Iterator[ThinkerStep]:
        """Give the tokens until a stop token, ``max_new_tokens``, or a full cache; or those that were given."""
        return self._give() if self._given else self._generate()

    def end_with(self, kept: int, ids: Sequence[int]) -> None:
        """End here: the first ``kept`` tokens stay, and ``ids`` follow in the place of those after them."""
        del self.conditioning[kept:]
        self._decoder.truncate(self._prompt + kept)
        self.finish_reason = "stop"
        if 0 < len(ids) <= self._decoder.room:
            self._consume(ids)

    def _generate(self) -> Iterator[ThinkerStep]:
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
            yield ThinkerStep(token, stop, last)
            if last:
                return
            seen[count + k] = token
            logits = self._consume([token])

    def _give(self) -> Iterator[ThinkerStep]:
        for start in range(0, len(self._given), _PIECE):
            piece = self._given[start : start + _PIECE]
            self._consume(piece)
            for token in piece:
                yield ThinkerStep(token, stop=False, last=False)
        yield ThinkerStep(self._given[-1], stop=True, last=True)

    def _consume(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Run tokens of the reply; gives the logits [V] after them."""
        with self._timer("thinker"):
            embeds = self._embedding.rows(ids)
            first = self._position + self._decoder.length - self._prompt
            positions = np.tile(np.arange(first, first + len(ids)), (3, 1))
            logits, hidden = self._decoder.forward(embeds, positions)
            if hidden is not None:
                self.conditioning.extend(hidden + embeds)
        return logits


def require_room(tokens: int, capacity: int, reply: int = 1) -> None:
    """PromptTooLong unless a prompt and at least ``reply`` more tokens fit."""
    if tokens + reply > capacity:
        raise PromptTooLong(
            f"the prompt takes {tokens} tokens, and the reply needs at least {reply} more; the KV cache holds "
            f"{capacity}. Shorten the prompt or its media, or export with a larger --max-context"
        )
