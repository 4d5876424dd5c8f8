"""Around every request: its id, the limits on it, its line in the log, and an answer where something fails."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..settings import Limits
from .access import OPEN
from .api_errors import ApiError, busy, internal

_LOG = logging.getLogger(__name__)
#: what the log and the measurements call a request whose client has left, as nginx does
_CLIENT_LEFT = 499


class RequestScope:
    """The outermost layer. ``x-request-id`` goes with every answer.

    Args:
        counted: called with the scope and the status of every request that has ended.
    """

    def __init__(self, app: ASGIApp, limits: Limits, counted: Callable[[Scope, int], None]) -> None:
        self._app, self._limits, self._counted = app, limits, counted
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = _Request(receive, send, self._limits)
        started = time.perf_counter()
        self._open += 1
        try:
            if self._open > self._limits.requests:
                raise busy(1.0)
            request.check_size(Headers(scope=scope).get("content-length", ""))
            await self._app(scope, request.receive, request.send)
        except ApiError as error:
            await error.response()(scope, receive, request.send)
        except ClientDisconnect:
            request.status = _CLIENT_LEFT
        except Exception:  # noqa: BLE001 - whatever it is, the next request is served
            _LOG.exception("request %s failed", request.id)
            if not request.status:
                await internal(request.id).response()(scope, receive, request.send)
        finally:
            self._open -= 1
            self._counted(scope, request.status)
            taken = time.perf_counter() - started
            level = logging.DEBUG if scope["path"] in OPEN else logging.INFO  # probes come every few seconds
            what = scope["method"], quote(scope["path"]), request.status, taken, request.id
            _LOG.log(level, "%s %s %d %.3f s %s", *what)


class _Request:
    """One request: what comes in is counted, what goes out is marked.

    Attributes:
        status: of the answer; 0 as long as there is none.
    """

    def __init__(self, receive: Receive, send: Send, limits: Limits) -> None:
        self.id, self.status = f"req_{secrets.token_hex(12)}", 0
        self._receive, self._send, self._limits = receive, send, limits
        self._size, self._whole = 0, False
        self._due = time.monotonic() + limits.upload_seconds

    def check_size(self, announced: str) -> None:
        """413 if the header alone says that it is too large."""
        self._count(int(announced) if announced.isdecimal() and announced.isascii() else 0)
        self._size = 0

    async def receive(self) -> Message:
        if self._whole:  # all that can come now is that the client leaves
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._due - time.monotonic()))
        except asyncio.TimeoutError:  # another class than Python's own before 3.11
            limit = f"{self._limits.upload_seconds:g} s"
            raise ApiError(408, "request_timeout", f"the request did not arrive within {limit}") from None
        if message["type"] == "http.request":
            self._count(len(message.get("body", b"")))
            self._whole = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self.id
        await self._send(message)

    def _count(self, size: int) -> None:
        self._size += size
        if self._size > self._limits.body:
            message = f"the request has more than {self._limits.body >> 20} MiB: send shorter or smaller media"
            raise ApiError(413, "request_too_large", message)
