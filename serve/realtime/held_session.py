"""A session and what it needs to outlive its connection."""

from __future__ import annotations

import asyncio
import secrets
import time

from ..service import Service
from .client_events import Known, NotUnderstood
from .inbox import Inbox
from .live_session import LIFETIME, RealtimeSession
from .outbox import Outbox


class HeldSession:
    """One session.

    Args:
        dialect: its client speaks the ``beta`` form, or DashScope's.

    Attributes:
        token: by which a client that was lost takes it up.
        replaced: asks the connection that it has to end. unconnected: it has none. ended: it is free.
    """

    def __init__(self, service: Service, dialect: str) -> None:
        self._service = service
        self.token = secrets.token_urlsafe(24)
        self.outbox, self.inbox = Outbox(service.settings.limits.unread_seconds), Inbox()
        if dialect != "ga":
            self.outbox.dialect = "beta"
        kept = service.realtime.seconds
        self.session = RealtimeSession(service, self.outbox, self.inbox.later, dialect == "dashscope")
        self.session.resumable = {"resume_token": self.token, "resume_seconds": kept} if kept else {}
        self.replaced, self.unconnected, self.ended = asyncio.Event(), asyncio.Event(), False
        self._worker: asyncio.Task[None] | None = None
        self._expires = time.monotonic() + LIFETIME

    @property
    def seconds_left(self) -> float:
        """Until it has lasted for as long as it may."""
        return self._expires - time.monotonic()

    @property
    def worth_keeping(self) -> bool:
        """Whether its client would miss it."""
        return self._service.realtime.seconds > 0 and self.session.has_items and self.seconds_left > 0

    def begin(self) -> None:
        """Greet a new client."""
        self._worker = asyncio.ensure_future(self.inbox.run(self._handle))
        self.session.begin()

    async def resume(self, after: str | None) -> None:
        """Greet a client that is back, and send what it has missed since the event ``after``.

        If it has another connection still, which nobody has seen end, that one ends.
        """
        while not self.unconnected.is_set():
            self.replaced.set()
            await self.unconnected.wait()
        if not self.ended:
            self.unconnected.clear()
            self.replaced.clear()
            missed = self.outbox.attach(after)
            self.session.begin(resumed=True)
            self.outbox.again(missed)

    def lose(self) -> None:
        """Its client is gone, and may come back: what is being said is stopped."""
        self.outbox.detach()
        self.inbox.later(self.session.client_lost)

    async def end(self) -> None:
        """Free it; what it has to say still can be sent."""
        self.ended = True
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.cancel()
            await asyncio.gather(worker, return_exceptions=True)
        await self.session.close()

    def abandon(self) -> None:
        """Free it, without an event loop."""
        self.session.abandon()

    async def _handle(self, event: Known | NotUnderstood, waited: float) -> None:
        await self.outbox.room()
        if isinstance(event, NotUnderstood):
            self.outbox.error(event.told, event.event_id)
        else:
            await self.session.handle(event, waited)
