"""The WebSocket of a session: handshake, limits, and what comes and goes."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import Any

from omniport.runtime.errors import OmniportError
from starlette.websockets import WebSocket, WebSocketDisconnect

from ..http.access import given_key
from ..http.api_errors import ApiError, busy, from_runtime, not_ready
from ..replicas.session_store import SessionState
from ..service import Service
from ..signed_keys import session_of
from .held_session import HeldSession
from .taking_up import take_up
from .wire.client_events import AudioAppend, Known, NotUnderstood, read_event
from .wire.inbox import TooFast
from .wire.outbox import Unread

_LOG = logging.getLogger(__name__)
#: the one that the server speaks; a key may come as another, and must not come back
PROTOCOL = "realtime"
_CLOSED, _AWAY, _POLICY, _TOO_BIG, _TRY_LATER = 1000, 1001, 1008, 1009, 1013
#: seconds between looks at whether the server stops, and for a close frame to leave
_GLANCE, _FAREWELL = 0.25, 5.0


async def realtime(websocket: WebSocket, service: Service) -> None:
    """Serve one client until it leaves."""
    token = websocket.query_params.get("resume")
    if service.state != "ready":
        return await _refuse(websocket, not_ready(service.state))
    held: HeldSession | SessionState | None = None
    try:
        if token is not None:
            held = await take_up(service, token)
        elif not await service.realtime.make_room():
            raise busy(1.0)
    except ApiError as error:
        return await _refuse(websocket, error)
    try:
        await websocket.accept(PROTOCOL if PROTOCOL in websocket.scope.get("subprotocols", []) else None)
        await _serve(websocket, service, held)
    finally:
        service.realtime.leave()
        if isinstance(held, HeldSession) and held.unconnected.is_set() and not held.ended:
            service.realtime.keep(held)  # the client has left before it took the session up


async def _refuse(websocket: WebSocket, told: ApiError) -> None:
    """By an HTTP status; where the server has no way to send one, by a close code."""
    if "websocket.http.response" in websocket.scope.get("extensions", {}):
        await websocket.send_denial_response(told.response())
        return
    await websocket.accept()
    await websocket.close(_TRY_LATER if told.retry_after is not None else _POLICY, told.code)


async def _serve(websocket: WebSocket, service: Service, found: HeldSession | SessionState | None) -> None:
    begun, after = time.monotonic(), websocket.query_params.get("after")
    connection = _Connection(websocket, service)
    held = found if isinstance(found, HeldSession) else None
    try:
        if isinstance(found, SessionState):
            held = await connection.restore(found, websocket.query_params["resume"], after)
        elif held is None:
            held = await connection.begin()
        else:
            await held.resume(after)
        if held is None or held.ended:
            return
        await connection.run(held)
    except (ApiError, OmniportError) as error:
        _LOG.error("a session cannot begin", exc_info=error)
        connection.closing = _TRY_LATER, "no session can begin now"
    finally:
        with suppress(RuntimeError, WebSocketDisconnect, asyncio.TimeoutError):  # it has left already
            await asyncio.wait_for(websocket.close(*connection.closing), _FAREWELL)
        name = "" if held is None else held.session.id
        _LOG.info("WebSocket %s %.0f s %s", websocket.url.path, time.monotonic() - begun, name)


class _Connection:
    """One WebSocket.

    Attributes:
        closing: code and reason.
    """

    def __init__(self, websocket: WebSocket, service: Service) -> None:
        self._websocket, self._service = websocket, service
        self.closing = (_CLOSED, "")
        self._lost = False  # the client may come back
        self._unwritten = False  # it is gone; what it said last is read still

    async def begin(self) -> HeldSession | None:
        """A new session, as the key was signed for; None where that cannot be any more, which is told."""
        held = HeldSession(self._service, self._dialect())
        signed = session_of(given_key(self._websocket.scope), self._service.settings)
        try:
            if signed is not None:
                await held.session.configure(signed)
        except (ApiError, OmniportError) as error:
            await held.end()
            told = error if isinstance(error, ApiError) else from_runtime(error)
            if told is None:
                raise
            held.outbox.error(told)
            held.outbox.end()
            await held.outbox.run(self._websocket.send_text)
            self.closing = _POLICY, told.code
            return None
        self._service.realtime.add(held)
        held.begin()
        return held

    async def restore(self, state: SessionState, token: str, after: str | None) -> HeldSession:
        """A session that another replica has saved."""
        held = HeldSession(self._service, self._dialect(), token)
        try:
            await held.restore(state, after)
        except BaseException:
            await held.end()
            raise
        self._service.realtime.add(held)
        return held

    async def run(self, held: HeldSession) -> None:
        """Until the client leaves or is lost, the server stops, or the session's time is over."""
        reading, writing = asyncio.ensure_future(self._read(held)), asyncio.ensure_future(self._write(held))
        replaced = asyncio.ensure_future(held.replaced.wait())
        try:
            await self._wait(held, reading, writing, replaced)
        finally:
            if self._unwritten:  # a client that says goodbye while it is written to is not lost
                read, _ = await asyncio.wait([reading], timeout=_GLANCE)
                self._lost = self._lost or not read or reading.exception() is not None
            await _cancel(reading, replaced)
            if self._lost:
                held.outbox.detach()
                await _cancel(writing)
            if self._lost and held.worth_keeping and not held.taken and self._service.state == "ready":
                held.lose()
                if not held.replaced.is_set():
                    self._service.realtime.keep(held)
            else:
                await self._service.realtime.remove(held)
                held.outbox.end()
                await asyncio.gather(writing, return_exceptions=True)
                if held.seconds_left <= 0 or not (self._lost or self.closing[0] == _AWAY):
                    await held.forget()
            held.unconnected.set()

    async def _wait(self, held: HeldSession, *tasks: asyncio.Future[Any]) -> None:
        stopping: float | None = None
        while not (await asyncio.wait(tasks, timeout=_GLANCE, return_when=asyncio.FIRST_COMPLETED))[0]:
            if held.seconds_left <= 0:
                held.outbox.error(ApiError(400, "session_expired", "the session has lasted an hour; begin another"))
                self.closing = _AWAY, "session_expired"
                return
            if self._service.state == "draining":
                stopping = stopping or time.monotonic()
                patience = self._service.settings.limits.drain_seconds
                if not held.session.replying or time.monotonic() - stopping > patience:
                    self.closing = _AWAY, "the server stops"
                    return
        if held.replaced.is_set():
            self.closing, self._lost = (_POLICY, "resumed by another connection"), True

    async def _write(self, held: HeldSession) -> None:
        try:
            await held.outbox.run(self._websocket.send_text)
        except Unread:
            self.closing = _POLICY, "nothing was read"
        except (WebSocketDisconnect, RuntimeError):
            self._unwritten = True

    async def _read(self, held: HeldSession) -> None:
        """Take what comes; while much of it waits, the WebSocket is not read, and TCP holds the client back."""
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                self._lost = message.get("code") != _CLOSED
                return
            text = message.get("text")
            if text is None:
                self.closing = _POLICY, "text frames only"
                return
            event = _understood(text)
            try:
                await held.inbox.put(event, _seconds(event, held))
            except TooFast:
                held.outbox.error(ApiError(400, "input_too_fast", "sound comes faster than it is taken"))
                self.closing = _TOO_BIG, "input_too_fast"
                return

    def _dialect(self) -> str:
        dialect, headers = self._service.settings.dialect, self._websocket.headers
        if dialect == "dashscope" or headers.get("user-agent", "").startswith("dashscope/"):
            return "dashscope"
        return "beta" if dialect == "beta" or "realtime=v1" in headers.get("openai-beta", "") else "ga"


def _understood(text: str) -> Known | NotUnderstood:
    try:
        return read_event(text)
    except NotUnderstood as error:
        return error


def _seconds(event: Known | NotUnderstood, held: HeldSession) -> float:
    """Of sound in an event."""
    if not isinstance(event, AudioAppend):
        return 0.0
    return len(event.audio) * 0.75 / held.session.settings.input_format.bytes_per_second


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            _LOG.error("a connection failed", exc_info=result)
