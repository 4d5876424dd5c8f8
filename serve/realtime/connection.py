"""The WebSocket of a session: handshake, limits, and what comes and goes."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress

from omniport.runtime.errors import OmniportError
from starlette.websockets import WebSocket, WebSocketDisconnect

from ..http.access import given_key
from ..http.api_errors import ApiError, busy, from_runtime, not_ready
from ..service import Service
from ..signed_keys import session_of
from .client_events import AudioAppend, ClientEvent, Known, NotUnderstood, read_event
from .live_session import LIFETIME, RealtimeSession, Work
from .outbox import Outbox, Unread

_LOG = logging.getLogger(__name__)
#: the one that the server speaks; a key may come as another, and must not come back
PROTOCOL = "realtime"
#: seconds of sound, and events, that wait for the session at most
_SOUND, _EVENTS = 2.0, 64
#: seconds that they may stay as many
_PATIENCE = 10.0
_POLICY, _TOO_BIG, _CLOSED, _AWAY = 1008, 1009, 1000, 1001


async def realtime(websocket: WebSocket, service: Service) -> None:
    """Serve one client until it leaves."""
    refusal = _refusal(service)
    if refusal is not None:
        await websocket.send_denial_response(refusal.response())
        return
    service.realtime += 1
    try:
        offered = websocket.scope.get("subprotocols", [])
        await websocket.accept(PROTOCOL if PROTOCOL in offered else None)
        await _Connection(websocket, service).run()
    finally:
        service.realtime -= 1


def _refusal(service: Service) -> ApiError | None:
    if service.state != "ready":
        return not_ready(service.state)
    return busy(1.0) if service.realtime >= service.settings.sessions else None


class _Connection:
    def __init__(self, websocket: WebSocket, service: Service) -> None:
        self._websocket, self._service = websocket, service
        self._outbox = Outbox(websocket.send_text, service.settings.limits.unread_seconds)
        headers = websocket.headers
        dashscope = service.settings.dialect == "dashscope" or headers.get("user-agent", "").startswith("dashscope/")
        if dashscope or "realtime=v1" in headers.get("openai-beta", ""):
            self._outbox.dialect = "beta"
        self._session = RealtimeSession(service, self._outbox, self._later, dashscope)
        # with the seconds of sound that each was counted as: the format may change before it is taken
        self._events: asyncio.Queue[tuple[Known | NotUnderstood | Work, float]] = asyncio.Queue()
        self._waiting = 0.0  # seconds of sound in it
        self._taken = asyncio.Event()
        self._close = (_CLOSED, "")

    async def run(self) -> None:
        begun = time.monotonic()
        tasks = [asyncio.ensure_future(self._outbox.run())]
        try:
            if not await self._begin():
                return
            tasks = [*(asyncio.ensure_future(work()) for work in (self._read, self._work)), *tasks]
            ended, _ = await asyncio.wait(tasks, timeout=LIFETIME, return_when=asyncio.FIRST_COMPLETED)
            if not ended:
                self._outbox.error(ApiError(400, "session_expired", "the session has lasted an hour; begin another"))
                self._close = _AWAY, "session_expired"
        finally:
            for task in tasks[:-1]:
                task.cancel()
            await asyncio.gather(*tasks[:-1], return_exceptions=True)
            await self._session.close()
            self._outbox.end()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                self._note(result)
            with suppress(RuntimeError, WebSocketDisconnect):  # it has left already
                await self._websocket.close(*self._close)
            _LOG.info("WebSocket %s %.0f s %s", self._websocket.url.path, time.monotonic() - begun, self._session.id)

    async def _begin(self) -> bool:
        """Have the session that the key was signed for, and greet the client; False where it cannot be any more."""
        signed = session_of(given_key(self._websocket.scope), self._service.settings)
        try:
            if signed is not None:
                await self._session.configure(signed)
        except (ApiError, OmniportError) as error:
            told = error if isinstance(error, ApiError) else from_runtime(error)
            if told is None:
                raise
            self._outbox.error(told)
            self._close = _POLICY, told.code
            return False
        self._session.begin()
        return True

    def _note(self, result: object) -> None:
        if isinstance(result, Unread):
            self._close = _POLICY, "nothing was read"
        elif isinstance(result, Exception) and not isinstance(result, WebSocketDisconnect):
            _LOG.error("a connection failed", exc_info=result)

    def _later(self, work: Work) -> None:
        self._events.put_nowait((work, 0.0))

    async def _read(self) -> None:
        """Take what comes; while much of it waits, the WebSocket is not read, and TCP holds the client back."""
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            text = message.get("text")
            if text is None:
                self._close = _POLICY, "text frames only"
                return
            event = self._understood(text)
            seconds = self._seconds(event)
            while self._events.qsize() >= _EVENTS or (self._waiting and self._waiting + seconds > _SOUND):
                self._taken.clear()
                try:
                    await asyncio.wait_for(self._taken.wait(), _PATIENCE)
                except asyncio.TimeoutError:
                    self._outbox.error(ApiError(400, "input_too_fast", "sound comes faster than it is taken"))
                    self._close = _TOO_BIG, "input_too_fast"
                    return
            self._waiting += seconds
            self._events.put_nowait((event, seconds))

    async def _work(self) -> None:
        """Do what waits, in order."""
        while True:
            event, seconds = await self._events.get()
            if isinstance(event, NotUnderstood):
                self._outbox.error(event.told, event.event_id)
            elif isinstance(event, ClientEvent):
                await self._outbox.room()
                await self._session.handle(event)
            else:
                await event()
                continue
            self._waiting -= seconds
            self._taken.set()

    def _understood(self, text: str) -> Known | NotUnderstood:
        try:
            return read_event(text)
        except NotUnderstood as error:
            return error

    def _seconds(self, event: Known | NotUnderstood) -> float:
        if not isinstance(event, AudioAppend):
            return 0.0
        return len(event.audio) * 0.75 / self._session.settings.input_format.bytes_per_second
