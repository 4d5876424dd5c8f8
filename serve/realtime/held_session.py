"""A session and what it needs to outlive its connection."""

from __future__ import annotations

import asyncio
import secrets
import time

from omniport.runtime import OmniSession

from ..replicas.saved_session import decode_head, decode_item
from ..replicas.session_keeper import SessionKeeper, key_of
from ..replicas.session_store import SessionState
from ..service import Service
from .live_session import LIFETIME, RealtimeSession
from .wire.client_events import Known, NotUnderstood
from .wire.inbox import Inbox
from .wire.outbox import Outbox


class HeldSession:
    """One session.

    Args:
        dialect: its client speaks the ``beta`` form, or DashScope's.
        token: by which a client that was lost takes it up; None: another one.

    Attributes:
        replaced: asks the connection that it has to end. unconnected: it has none. ended: it is free.
        taken: another replica goes on with it.
    """

    def __init__(self, service: Service, dialect: str, token: str | None = None) -> None:
        self._service = service
        self.token = token or secrets.token_urlsafe(24)
        self.outbox, self.inbox = Outbox(service.settings.limits.unread_seconds), Inbox()
        if dialect != "ga":
            self.outbox.dialect = "beta"
        kept = service.realtime.seconds
        self.session = RealtimeSession(service, self.outbox, self.inbox.later, dialect == "dashscope")
        self.session.resumable = {"resume_token": self.token, "resume_seconds": kept} if kept else {}
        self.replaced, self.unconnected, self.ended, self.taken = asyncio.Event(), asyncio.Event(), False, False
        self._keeper = self._keep()
        self._worker: asyncio.Task[None] | None = None
        self._expires = time.monotonic() + LIFETIME

    @property
    def conversation(self) -> OmniSession:
        """The runtime's session."""
        return self.session.conversation

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

    async def restore(self, state: SessionState, after: str | None) -> None:
        """Go on with what another replica has saved; see ``resume``."""
        head = decode_head(state.head)
        items = [decode_item(state.items[id], state.given.get(id)) for id in state.order]
        self._expires = time.monotonic() + head.expires - time.time()
        lost = await self.session.restore(head, items)
        self.outbox.remember(state.events)
        self._worker = asyncio.ensure_future(self.inbox.run(self._handle))
        missed = self.outbox.attach(after)
        self.session.begin(resumed=True)
        self.outbox.again(missed)
        self.session.tell_lost(head.response, lost)

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

    async def forget(self) -> None:
        """Nobody shall go on with it."""
        if self._keeper is not None:
            await self._keeper.forget()

    def give_up(self) -> None:
        """Another replica goes on with it."""
        self.taken = True
        self.replaced.set()

    def _keep(self) -> SessionKeeper | None:
        store, session, outbox = self._service.store, self.session, self.outbox
        if store is None:
            return None
        keeper = SessionKeeper(
            store,
            self._service.id,
            key_of(self.token),
            self._service.realtime.seconds,
            head=lambda: session.head,
            items=session.items,
            events=lambda: outbox.events,
            taken=self.give_up,
        )

        async def save() -> None:
            if session.has_items and not self.taken:
                await keeper.save()

        outbox.save = save
        return keeper

    async def _handle(self, event: Known | NotUnderstood, waited: float) -> None:
        await self.outbox.room()
        if isinstance(event, NotUnderstood):
            self.outbox.error(event.told, event.event_id)
        else:
            await self.session.handle(event, waited)
