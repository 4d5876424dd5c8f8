"""Speed on machines of any speed and load: processor time, and only as a ratio to other work in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable


def least(work: Callable[[], object], rounds: int = 5) -> float:
    """Processor seconds of this thread in the quickest of several rounds; other load does not count."""
    best = float("inf")
    for _ in range(rounds):
        start = time.thread_time()
        work()
        best = min(best, time.thread_time() - start)
    return best


def ratio(work: Callable[[], object], yardstick: Callable[[], object], rounds: int = 5, tries: int = 3) -> float:
    """Time of ``work`` by that of ``yardstick``, in turns; the least of several tries."""
    return min(least(work, rounds) / max(least(yardstick, rounds), 1e-7) for _ in range(tries))
