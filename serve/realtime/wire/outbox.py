"""Events on their way to the client: what holds them back, and which a client that comes back has missed."""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from ...http.api_errors import ApiError
from .dialect import Dialect, translated

#: seconds of sound, and events, that wait to be sent at most
_SOUND, _EVENTS = 4.0, 256
#: characters of sent events that are kept for a client that comes back
_REMEMBERED = 1 << 20


class Unread(Exception):
    """The client takes nothing any more."""


@dataclass(frozen=True)
class SentEvent:
    """As it goes to the client. ``delta``: a piece of what a later event has whole."""

    id: str
    text: str
    seconds: float
    written: Callable[[float], None] | None
    delta: bool


class Outbox:
    """What is sent, in order. Belongs to one event loop.

    Attributes:
        dialect: that the client speaks. extras: it wants events that are not OpenAI's.
        save: awaited before an event is sent that is no delta, so that what a client was told is not lost.

    Args:
        unread_seconds: for the client to take a message.
    """

    def __init__(self, unread_seconds: float) -> None:
        self.dialect: Dialect = "ga"
        self.extras = False
        self._unread_seconds = unread_seconds
        self._waiting: deque[SentEvent] = deque()
        self._sent: deque[SentEvent] = deque()
        self._remembered = 0  # characters
        self._sound = 0.0
        self._taken, self._came = asyncio.Event(), asyncio.Event()
        self._ending = self._detached = False
        self.save: Callable[[], Awaitable[None]] | None = None
        self._saved = 0  # of those that wait, from the first on

    def put(
        self, type: str, seconds: float = 0.0, written: Callable[[float], None] | None = None, **fields: Any
    ) -> None:
        """Send an event.

        Args:
            seconds: of sound in it. written: called with them once it was sent.
        """
        id = f"event_{secrets.token_hex(10)}"
        event: dict[str, Any] | None = {"type": type, "event_id": id, **fields}
        if event is not None and self.dialect == "beta":
            event = translated(event)
        if event is not None:
            text = msgspec.json.encode(event).decode()
            self._sound += seconds
            self._waiting.append(SentEvent(id, text, seconds, written, type.endswith(".delta")))
            self._came.set()

    def extra(self, type: str, **fields: Any) -> None:
        """Send an event that is not OpenAI's, if the client has asked for such."""
        if self.extras:
            self.put(type, **fields)

    def error(self, told: ApiError, event_id: str | None = None) -> None:
        """Tell of an error; ``event_id`` is that of the client's event."""
        body = told.body()["error"]
        self.put("error", error={**body, "event_id": event_id})

    async def room(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Wait until the client has taken most of what was sent, or is lost, or until ``stopped``, after a ``wake``."""
        while not self._detached and (self._sound >= _SOUND or len(self._waiting) >= _EVENTS) and not stopped():
            self._taken.clear()
            await self._taken.wait()

    def wake(self) -> None:
        """Let those who wait for room look again."""
        self._taken.set()

    def end(self) -> None:
        """``run`` returns when all is sent."""
        self._ending = True
        self._came.set()

    async def run(self, send: Callable[[str], Awaitable[None]]) -> None:
        """Send.

        Args:
            send: one message; returns when there is room for more.

        Raises:
            Unread: the client takes nothing.
        """
        while (self._waiting or not self._ending) and not self._detached:  # ``wait_for`` may swallow a cancellation
            if not self._waiting:
                self._came.clear()
                await self._came.wait()
                continue
            event = self._waiting[0]
            if self.save is not None and not event.delta and not self._saved:
                waiting = len(self._waiting)
                await self.save()
                self._saved = waiting
            try:
                await asyncio.wait_for(send(event.text), self._unread_seconds)
            except asyncio.TimeoutError:
                raise Unread from None
            self._waiting.popleft()
            self._saved = max(0, self._saved - 1)
            self._remember(event)
            if event.written is not None:
                event.written(event.seconds)
            self._sound -= event.seconds
            self._taken.set()

    def detach(self) -> None:
        """The client is lost, and ``run`` has ended: nobody waits for it any more."""
        self._detached = True
        self.wake()

    def attach(self, after: str | None) -> list[SentEvent]:
        """The client is back: what it has missed, which is taken out, to be sent ``again``.

        Of a reply's text and sound the pieces are left out: the reply was stopped, and its end has all of the text.

        Args:
            after: id of the last event that it knows; if nobody knows that, all count that were not sent.
        """
        ids = [event.id for event in self._sent]
        known = ids.index(after) + 1 if after in ids else len(ids)
        missed = [*self._sent][known:] + [event for event in self._waiting if not event.delta]
        self._waiting.clear()
        self._saved = 0
        self._sent = deque([*self._sent][:known])
        self._remembered = sum(len(event.text) for event in self._sent)
        self._sound, self._detached = 0.0, False
        return missed

    @property
    def events(self) -> list[tuple[str, str]]:
        """(id, text) of those that are remembered, and of those that will be."""
        return [(event.id, event.text) for event in (*self._sent, *self._waiting) if not event.delta]

    def remember(self, events: Iterable[tuple[str, str]]) -> None:
        """These were sent, by another replica."""
        self._sent = deque(SentEvent(id, text, 0.0, None, False) for id, text in events)
        self._remembered = sum(len(event.text) for event in self._sent)

    def again(self, missed: list[SentEvent]) -> None:
        """Send what was missed."""
        self._waiting.extend(missed)
        self._came.set()

    def _remember(self, event: SentEvent) -> None:
        if event.delta:
            return
        self._sent.append(event)
        self._remembered += len(event.text)
        while self._remembered > _REMEMBERED:
            self._remembered -= len(self._sent.popleft().text)
