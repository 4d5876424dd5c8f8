"""While a request is answered: its body is read, its client may leave, its answer may be a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..admission import Full
from ..service import Service
from .api_errors import ApiError, busy, invalid

T = TypeVar("T")
#: seconds after which a stream that has nothing to say says so
_SILENCE = 10.0
#: of one JSON document
_VALUES = 200_000


async def read_json(request: Request) -> dict[str, Any]:
    """The body, a JSON object.

    Raises:
        ApiError: 400, it is none. 413, it has too many values.
    """
    data = await request.body()
    check_values(data)
    try:
        body = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise invalid(f"the body is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise invalid("the body is no JSON object")
    return body


def check_values(document: bytes | str) -> None:
    """Before it is parsed: three characters of JSON may become 60 bytes of memory. Base64 has none of these characters.

    Raises:
        ApiError: 413, JSON with too many values.
    """
    if isinstance(document, bytes):
        values = sum(document.count(mark) for mark in b",[{")
    else:
        values = sum(document.count(mark) for mark in ",[{")
    if values > _VALUES:
        raise ApiError(413, "request_too_large", f"the JSON has more than {_VALUES} values: send fewer")


def convert(body: Mapping[str, Any], kind: type[T]) -> T:
    """A body as a record.

    Raises:
        ApiError: 400, which names the field.
    """
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$.")
        raise invalid(str(error).replace("`$.", "`"), path.rstrip("`") or None if problem else None) from error


@asynccontextmanager
async def place(service: Service) -> AsyncIterator[None]:
    """A place for one reply.

    Raises:
        ApiError: 429, there is none.
    """
    async with AsyncExitStack() as stack:
        try:
            waited = await stack.enter_async_context(service.admission.place())
        except Full as error:
            raise busy(error.seconds) from error
        service.measurements.waited(waited)
        yield


async def while_connected(request: Request, service: Service, work: Coroutine[Any, Any, Response]) -> Response:
    """What ``work`` gives; it is cancelled if the client leaves before.

    Raises:
        ClientDisconnect: nobody is left to answer.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            service.measurements.interrupted("client_left")
            raise ClientDisconnect
        return await working
    finally:
        await _cancel(working, leaving)


class _Stalled(Exception):
    """The client takes nothing."""


class Stream(Response):
    """A body that is sent as it is made. What it holds is let go of when it ends, or when the client leaves or no
    longer reads.

    Args:
        body: pieces. held: closed at the end.
    """

    def __init__(
        self,
        body: AsyncIterator[bytes],
        held: AsyncExitStack,
        service: Service,
        media_type: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(None, 200, headers, media_type)
        del self.headers["content-length"]
        self._body, self._held, self._service = body, held, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            sending = asyncio.ensure_future(self._send(send))
            leaving = asyncio.ensure_future(_left(receive))
            try:
                await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if sending.done():
                    await sending
                else:
                    self._service.measurements.interrupted("client_left")
            except _Stalled:
                self._service.measurements.interrupted("client_stalled")
            finally:
                await _cancel(sending, leaving)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._body) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                sent = send({"type": "http.response.body", "body": piece, "more_body": True})
                try:
                    await asyncio.wait_for(sent, self._service.settings.limits.unread_seconds)
                except asyncio.TimeoutError:  # no other one: what makes the body may time out as well, which is a fault
                    raise _Stalled from None
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def event_line(value: object) -> bytes:
    """One event of a stream of events."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


async def kept_alive(lines: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Lines of a stream of events, with a comment wherever none comes for a while."""
    async with aclosing(lines):  # type: ignore[type-var]
        while True:
            coming = asyncio.ensure_future(anext(lines, None))
            try:
                while not (await asyncio.wait({coming}, timeout=_SILENCE))[0]:
                    yield b": working\n\n"
                line = await coming
            finally:
                await _cancel(coming)
            if line is None:
                return
            yield line


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task
