"""Sample the next token: repetition penalty, suppression, temperature, top-k and top-p, or greedy.

The order of the steps, and what happens at ties, follow transformers' ``generate``: RepetitionPenaltyLogitsProcessor,
SuppressTokensLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, multinomial. Nothing here
sorts the whole vocabulary: each filter first drops, in one pass, what it cannot keep.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import SamplingConfig
from ..errors import OmniportError, UsageError

#: Below this temperature the division leaves float32, and only the best token has a chance anyway.
_COLDEST = 1e-6
_FLOAT32_MAX = float(np.finfo(np.float32).max)


def validate_sampling(config: SamplingConfig, name: str = "sampling") -> None:
    """Check every value of ``config``; ``name`` says in messages whose it is (thinker, talker).

    Raises:
        UsageError: names the field, what it holds and what it may hold.
    """
    if not isinstance(config, SamplingConfig):
        raise UsageError(
            f"{name} is a {type(config).__name__}; a SamplingConfig was expected: SamplingConfig(temperature=0.7) of "
            "omniport.runtime"
        )
    whole = {"max_new_tokens": 1, "top_k": 0}
    for field, least in whole.items():
        value = getattr(config, field)
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
            raise UsageError(f"{name}.{field} is {value!r}; a whole number of at least {least} was expected")
    for field in ("temperature", "top_p", "repetition_penalty"):
        value = getattr(config, field)
        number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
        if not number or not abs(value) <= _FLOAT32_MAX:
            raise UsageError(f"{name}.{field} is {value!r}; a finite number was expected")
    if config.temperature < 0:
        raise UsageError(f"{name}.temperature is {config.temperature}; 0 (greedy) or more was expected")
    if not 0 < config.top_p <= 1:
        raise UsageError(f"{name}.top_p is {config.top_p}; more than 0 and at most 1 (off) was expected")
    if np.float32(config.repetition_penalty) <= 0:
        raise UsageError(
            f"{name}.repetition_penalty is {config.repetition_penalty}; more than 0 was expected (1 is off)"
        )


class Sampler:
    """Picks tokens for one reply.

    Args:
        config: how to pick; ``temperature=0`` or ``top_k=1`` is greedy.
        rng: source of randomness; the same seed and logits give the same tokens. Fresh entropy if None.
        suppress: ids that are never picked.

    Raises:
        UsageError: a value of ``config`` or an id in ``suppress`` is out of range.
    """

    def __init__(self, config: SamplingConfig, rng: np.random.Generator | None, suppress: Sequence[int] = ()) -> None:
        validate_sampling(config)
        self.config = config
        self.greedy = config.temperature < _COLDEST or config.top_k == 1
        self._rng = np.random.default_rng() if rng is None and not self.greedy else rng
        self._suppress = np.asarray(suppress, np.int64).reshape(-1)
        if self._suppress.size and self._suppress.min() < 0:
            raise UsageError(f"suppressed token ids are {list(suppress)}; ids of at least 0 were expected")

    def pick(self, logits: NDArray[np.float32], history: Sequence[int] | NDArray[np.int64]) -> int:
        """The next token.

        Args:
            logits: float32 [V], left as they are.
            history: ids that the repetition penalty applies to: prompt and reply so far, in any order.

        Raises:
            OmniportError: the logits are not finite, or nothing is left to pick.
        """
        if self.greedy:
            return int(np.argmax(self._scores(logits, history)))  # argmax takes the lowest index among equals
        ids, probabilities = self.distribution(logits, history)
        assert self._rng is not None
        cumulative = np.cumsum(probabilities)
        draw = self._rng.random() * cumulative[-1]
        return int(ids[min(int(np.searchsorted(cumulative, draw, side="right")), len(ids) - 1)])

    def distribution(
        self, logits: NDArray[np.float32], history: Sequence[int] | NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """What ``pick`` draws from: the ids that are left, ascending, and their probabilities, which sum to 1."""
        scores = self._scores(logits, history)
        if self.greedy:
            return np.asarray([np.argmax(scores)], np.int64), np.ones(1)
        scores /= np.float32(self.config.temperature)
        ids = _top_k(scores, self.config.top_k)
        weights = np.exp((scores[ids] - scores[ids].max()).astype(np.float64))
        probabilities = weights / weights.sum()
        if self.config.top_p < 1:
            kept = _top_p(probabilities, float(self.config.top_p))
            ids, probabilities = ids[kept], probabilities[kept] / probabilities[kept].sum()
        return ids, probabilities

    def _scores(self, logits: NDArray[np.float32], history: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [V] after penalty and suppression, as a copy."""
        scores = np.array(logits, np.float32)
        if scores.ndim != 1 or not scores.size:
            raise OmniportError(f"logits have shape {list(scores.shape)}; [vocabulary] was expected")
        _require_finite(scores)
        penalty = np.float32(self.config.repetition_penalty)
        if penalty != 1 and len(history):
            seen = np.asarray(history, np.int64)
            _require_known(seen, scores.size, "the tokens so far")
            # An id that occurs twice is written twice with the same value: the penalty applies once.
            values = scores[seen]
            scores[seen] = np.where(values < 0, values * penalty, values / penalty)
        if self._suppress.size:
            _require_known(self._suppress, scores.size, "the suppressed tokens")
            scores[self._suppress] = -np.inf
            if np.isneginf(scores.max()):
                raise OmniportError(f"all {scores.size} tokens are suppressed; at least one must be left to pick from")
        return scores


def _top_k(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Ids of the ``k`` highest scores, ascending, with everything that equals the lowest of them; k = 0 keeps all."""
    if 0 < k < scores.size:
        lowest = np.partition(scores, scores.size - k)[scores.size - k]
        kept = scores >= lowest
        if np.isneginf(lowest):  # fewer than k are not suppressed
            kept = scores > lowest
        return np.flatnonzero(kept)
    return np.flatnonzero(scores > -np.inf)


def _top_p(probabilities: NDArray[np.float64], p: float) -> NDArray[np.int64]:
    """Indices, ascending, of the smallest set whose probabilities reach ``p``; at least one.

    Cut from below as the reference does: sort ascending, drop while the running sum is at most 1 - p. Equal values at
    the cut lose the lower index.
    """
    budget = 1.0 - p
    # What is below budget / n sums to less than the budget whatever it is: it goes before anything is sorted.
    candidates = np.flatnonzero(probabilities >= budget / (2 * probabilities.size))
    floor = max(0.0, 1.0 - float(probabilities[candidates].sum()))
    order = candidates[np.argsort(probabilities[candidates], kind="stable")]
    running = floor + np.cumsum(probabilities[order])
    first = min(int(np.searchsorted(running, budget, side="right")), order.size - 1)
    kept: NDArray[np.int64] = np.sort(order[first:])
    return kept


def _require_finite(scores: NDArray[np.float32]) -> None:
    finite = np.isfinite(scores)
    if finite.all():
        return
    nans, first = int(np.isnan(scores).sum()), int(np.argmin(finite))
    raise OmniportError(
        f"the model gave {scores.size - int(finite.sum())} of {scores.size} logits that are not finite ({nans} NaN; "
        f"the first is {scores[first]} at token {first}); finite logits were expected. An FP16 overflow in the graph "
        "is the usual cause: check the bundle against PyTorch, or export it with --precision fp32"
    )


def _require_known(ids: NDArray[np.int64], vocabulary: int, what: str) -> None:
    if ids.min() < 0 or ids.max() >= vocabulary:
        bad = ids[(ids < 0) | (ids >= vocabulary)][0]
        raise OmniportError(f"{what} hold id {bad}; ids from 0 to {vocabulary - 1} (the logits' size) were expected")
