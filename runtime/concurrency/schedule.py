"""Scheduling of graph runs on shared CPU cores.

Two graphs that run at once on the same cores are slower than one after the other: the threads of each wait for one
another while the other graph has the core. So each run takes one of a few slots (``RunSlots``). And until the first
sound is out, thinker and talker make no more than its window takes (``Pace``): what they do ahead of it delays it.

Neither changes a result: each worker has its own random stream, and what it computes does not depend on when.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..bundle.parts import PARTS
from .cancel import CancelToken
from .timing import StageTimer


def distance(graph: str) -> int:
    """Parts of a reply between this one and the sound; more than all of them for another graph."""
    nearest = list(reversed(PARTS))
    return nearest.index(graph) if graph in PARTS else len(nearest)


class RunSlots:
    """A few graph runs at a time. Of those that wait, the nearest to the sound is next.

    None waits for long: a slot is free when its run ends, and a worker that has just run is not among those that wait.

    Args:
        count: runs at a time.
        token: when it is set, whoever waits stops with Cancelled.
        timer: told how long each slot was waited for, so that it does not count as work.
    """

    def __init__(self, count: int, token: CancelToken, timer: StageTimer) -> None:
        self._count, self._token, self._timer = count, token, timer
        self._changed = threading.Condition()
        self._waiting: list[int] = []
        self._running = 0
        token.subscribe(self._wake)

    @contextmanager
    def take(self, graph: str) -> Iterator[None]:
        """Hold a slot for one run of that graph."""
        self._enter(distance(graph))
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _enter(self, rank: int) -> None:
        with self._changed:
            start = time.perf_counter()
            self._waiting.append(rank)
            try:
                self._changed.wait_for(lambda: self._token.cancelled or self._is_next(rank))
            finally:
                self._waiting.remove(rank)
            self._timer.leave_out(time.perf_counter() - start)
            self._token.check()
            self._running += 1
            self._changed.notify_all()  # there may be a slot for the next as well

    def _is_next(self, rank: int) -> bool:
        return self._running < self._count and rank == min(self._waiting)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


class Pace:
    """Holds thinker and talker back, each once it has made what the first sound takes, until that is out.

    On a machine that makes codes so fast that the second window would be there in time, nobody is held: the break could
    be heard then, and there is little to win.

    Args:
        codes: that the first window takes, and rows, since each code takes one.
        rate: codes a second that leave no gap after it.
        clock: seconds.
        token: when it is set, whoever is held stops with Cancelled.
    """

    def __init__(self, codes: int, rate: float, clock: Callable[[], float], token: CancelToken) -> None:
        self._codes, self._rate, self._clock, self._token = codes, rate, clock, token
        self._began = clock()
        self._open = threading.Event()
        token.subscribe(self._open.set)

    def begin(self) -> None:
        """The first row is begun now."""
        self._began = self._clock()

    def hold(self, made: int) -> float:
        """A worker has handed on its ``made``-th row or code: wait if it was the last one needed; gives the seconds."""
        if made != self._codes or made >= self._rate * (self._clock() - self._began):
            return 0.0
        start = time.perf_counter()
        self._open.wait()
        self._token.check()
        return time.perf_counter() - start

    def release(self) -> None:
        """The first sound is out, or there will be none."""
        self._open.set()
