"""The events of a reply for an event loop, while the runtime makes them in threads of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from types import TracebackType

from omniport.runtime import Event


class ReplyEvents:
    """``async with`` begins a reply, ``async for`` takes its events, leaving the block early cancels it.

    An event is taken only when it is asked for: of a reply that nobody reads, the runtime's queues hold the rest back.

    Args:
        begin: checks what is asked for, and gives the events; it and each wait for the next run in ``threads``.
    """

    def __init__(self, begin: Callable[[], Iterator[Event]], threads: Executor) -> None:
        self._begin, self._threads = begin, threads
        self._events: Iterator[Event] = iter(())

    async def __aenter__(self) -> ReplyEvents:
        beginning = asyncio.get_running_loop().run_in_executor(self._threads, self._begin)
        try:
            self._events = await asyncio.shield(beginning)
        except asyncio.CancelledError:
            self._events = await beginning  # it cannot be stopped; what it begins shall be
            await self._close()
            raise
        return self

    def __aiter__(self) -> ReplyEvents:
        return self

    async def __anext__(self) -> Event:
        loop = asyncio.get_running_loop()
        event = await loop.run_in_executor(self._threads, next, self._events, None)
        if event is None:
            raise StopAsyncIteration
        return event

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.shield(asyncio.ensure_future(self._close()))

    async def _close(self) -> None:
        close: Callable[[], None] | None = getattr(self._events, "close", None)
        if close is not None:
            await asyncio.get_running_loop().run_in_executor(self._threads, close)
