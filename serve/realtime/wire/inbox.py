"""What a client has sent, and what else a session has to do: in order, one after the other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from .client_events import Known, NotUnderstood

Work = Callable[[], Awaitable[None]]
#: seconds of sound, and events, that wait for the session at most
_SOUND, _EVENTS = 2.0, 64
#: seconds that they may stay as many
_PATIENCE = 10.0


class TooFast(Exception):
    """The client sends faster than its events are taken."""


@dataclass(frozen=True)
class _Waiting:
    """One thing to do. ``seconds`` of sound that it was counted as: the format may change before it is taken."""

    what: Known | NotUnderstood | Work
    seconds: float
    arrived: float


class Inbox:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._seconds = 0.0
        self._taken = asyncio.Event()

    def later(self, work: Work) -> None:
        """Do this in its turn."""
        self._queue.put_nowait(_Waiting(work, 0.0, time.monotonic()))

    async def put(self, event: Known | NotUnderstood, seconds: float) -> None:
        """An event, once there is room.

        Raises:
            TooFast: there is none for a long time.
        """
        arrived = time.monotonic()
        while self._queue.qsize() >= _EVENTS or (self._seconds and self._seconds + seconds > _SOUND):
            self._taken.clear()
            try:
                await asyncio.wait_for(self._taken.wait(), _PATIENCE)
            except asyncio.TimeoutError:
                raise TooFast from None
        self._seconds += seconds
        self._queue.put_nowait(_Waiting(event, seconds, arrived))

    async def run(self, handle: Callable[[Known | NotUnderstood, float], Awaitable[None]]) -> None:
        """Do what comes; ``handle`` gets an event and the seconds that it waited."""
        while True:
            waiting = await self._queue.get()
            if callable(waiting.what):
                await waiting.what()
            else:
                await handle(waiting.what, time.monotonic() - waiting.arrived)
                self._seconds -= waiting.seconds
            self._taken.set()
