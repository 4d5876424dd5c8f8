"""Connections of clients that send nothing, or take nothing: they are ended, for each holds a socket and memory."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from .settings import Limits

#: bytes that a client takes at least, of what waits for it, in the time that it has for them
_LEAST = 1 << 16


class _Watched:
    """Ends a connection whose client does not take what is sent. Goes before a protocol of uvicorn."""

    limits: Limits
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    _stalling: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        super().pause_writing()  # type: ignore[misc]
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()  # type: ignore[misc]
        self._rest()

    def connection_lost(self, exc: Exception | None) -> None:
        self._rest()
        super().connection_lost(exc)  # type: ignore[misc]

    def _watch(self) -> None:
        waiting = self.transport.get_write_buffer_size()
        self._stalling = self.loop.call_later(self.limits.unread_seconds, self._look, waiting)

    def _look(self, before: int) -> None:
        if self.transport.get_write_buffer_size() > before - _LEAST:
            self.transport.abort()
        else:
            self._watch()

    def _rest(self) -> None:
        if self._stalling is not None:
            self._stalling.cancel()
            self._stalling = None


class _Http(_Watched, H11Protocol):
    """Gives a client a time for the head of each request, or for the rest of one that is answered already."""

    _heading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            transport.abort()
        else:
            self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._have_head()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if not idle or self.transport.get_protocol() is not self:  # a request is answered, or it is a WebSocket now
            self._have_head()
        elif self._heading is None:
            self._heading = self.loop.call_later(self.limits.head_seconds, self.transport.abort)

    def _have_head(self) -> None:
        if self._heading is not None:
            self._heading.cancel()
            self._heading = None


class _WebSocket(_Watched, WebSocketsSansIOProtocol):
    async def send(self, message: Any) -> None:
        await super().send(message)
        if self.initial_response is not None and self.close_sent:
            self.handshake_complete = True  # refused; uvicorn would log that there was no handshake


def protocols(limits: Limits) -> dict[str, Any]:
    """uvicorn's ``http`` and ``ws``."""
    return {"http": type("Http", (_Http,), {"limits": limits}), "ws": type("Ws", (_WebSocket,), {"limits": limits})}
