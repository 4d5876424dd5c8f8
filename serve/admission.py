"""Who may reply now: some at once, some waiting in order of arrival, the others refused.

One ``Admission`` stands before all replies of a server, whatever protocol asks for them, so the session is opened
without ``max_replies``. The runtime's own places would come too late here: a chat's media are read, and its
conversation takes a session with KV caches, before its turn asks for one. And who waits for one waits in a thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Full(Exception):
    """As many wait as may.

    Attributes:
        seconds: after which a place may be free.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__("the queue is full")
        self.seconds = seconds


class Admission:
    """Places for replies. Belongs to one event loop.

    Args:
        places: replies at once. queue: that wait for a place.

    Attributes:
        active, waiting: their numbers now.
    """

    def __init__(self, places: int, queue: int) -> None:
        self.places, self.active, self.waiting = places, 0, 0
        self._queue, self._free = queue, asyncio.Semaphore(places)
        self._seconds = 1.0  # that a reply holds its place, on average over the last ones

    @asynccontextmanager
    async def place(self) -> AsyncIterator[float]:
        """A place for one reply; gives the seconds that it was waited for.

        Raises:
            Full: there is none, and none to wait for.
        """
        if self.active + self.waiting >= self.places + self._queue:
            raise Full(self.expected_wait())
        asked = time.perf_counter()
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        begun = time.perf_counter()
        self.active += 1
        try:
            yield begun - asked
        finally:
            self.active -= 1
            self._free.release()
            self._seconds += 0.2 * (time.perf_counter() - begun - self._seconds)

    def expected_wait(self) -> float:
        """Seconds until a place is free for one who comes now; at least a tenth of one if none is."""
        before = self.active + self.waiting - self.places + 1
        return max(0.1, self._seconds * before / self.places) if before > 0 else 0.0
