"""Events on their way to the client, and what holds them back."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from ..http.api_errors import ApiError
from .dialect import Dialect, translated

#: seconds of sound, and events, that wait to be sent at most
_SOUND, _EVENTS = 4.0, 256


class Unread(Exception):
    """The client takes nothing any more."""


class Outbox:
    """What is sent, in order. Belongs to one event loop.

    Attributes:
        dialect: that the client speaks.

    Args:
        send: sends one message, and returns when there is room for more.
        unread_seconds: for the client to take a message.
    """

    def __init__(self, send: Callable[[str], Awaitable[None]], unread_seconds: float) -> None:
        self.dialect: Dialect = "ga"
        self._send, self._unread_seconds = send, unread_seconds
        self._queue: asyncio.Queue[tuple[str, float, Callable[[float], None] | None] | None] = asyncio.Queue()
        self._sound = 0.0
        self._taken = asyncio.Event()

    def put(
        self, type: str, seconds: float = 0.0, written: Callable[[float], None] | None = None, **fields: Any
    ) -> None:
        """Send an event.

        Args:
            seconds: of sound in it. written: called with them once it was sent.
        """
        event: dict[str, Any] | None = {"type": type, "event_id": f"event_{secrets.token_hex(10)}", **fields}
        if event is not None and self.dialect == "beta":
            event = translated(event)
        if event is not None:
            self._sound += seconds
            self._queue.put_nowait((msgspec.json.encode(event).decode(), seconds, written))

    def error(self, told: ApiError, event_id: str | None = None) -> None:
        """Tell of an error; ``event_id`` is that of the client's event."""
        body = told.body()["error"]
        self.put("error", error={**body, "event_id": event_id})

    async def room(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Wait until the client has taken most of what was sent, or until ``stopped``, after a ``wake``."""
        while (self._sound >= _SOUND or self._queue.qsize() >= _EVENTS) and not stopped():
            self._taken.clear()
            await self._taken.wait()

    def wake(self) -> None:
        """Let those who wait for room look again."""
        self._taken.set()

    def end(self) -> None:
        """``run`` returns when all is sent."""
        self._queue.put_nowait(None)

    async def run(self) -> None:
        """Send.

        Raises:
            Unread: the client takes nothing.
        """
        while (waiting := await self._queue.get()) is not None:
            text, seconds, written = waiting
            try:
                await asyncio.wait_for(self._send(text), self._unread_seconds)
            except asyncio.TimeoutError:
                raise Unread from None
            if written is not None:
                written(seconds)
            self._sound -= seconds
            self._taken.set()
