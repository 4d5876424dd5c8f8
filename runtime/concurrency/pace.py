"""Until the first sound is out, thinker and talker make no more than its window takes: what they do ahead delays it.

This changes no result: each worker has its own random stream, and what it computes does not depend on when.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from .cancel import CancelToken


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
