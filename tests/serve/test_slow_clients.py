"""Clients that send nothing or take nothing: their connections end, and those of others do not."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, closing, suppress
from pathlib import Path

import pytest
from omniport.serve.http.answering import Stream
from omniport.serve.server import Server, listen
from omniport.serve.settings import Limits
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message
from support.served import Served
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

QUICK = Limits(head_seconds=0.3, unread_seconds=0.4, upload_seconds=0.4, connections=8)
HEAD = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"


@pytest.fixture
def served(root: Path) -> Iterator[Served]:
    with Served(root, limits=QUICK) as made:
        yield made.start()


def dial(served: Served, room: int | None = None) -> socket.socket:
    port = int(served.url.rpartition(":")[2])
    made = socket.socket()
    if room is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    made.settimeout(10)
    made.connect(("127.0.0.1", port))
    return made


def ended(connection: socket.socket) -> float:
    """Seconds until the server has closed it."""
    started = time.monotonic()
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass  # closed as well: something that was sent to it was not read
    return time.monotonic() - started


BEGUN = {
    "nothing": b"",
    "a word": b"GET",
    "half a head": HEAD,
    "half a second head": HEAD + b"\r\n" + HEAD,
    "half a handshake": HEAD + b"Connection: Upgrade\r\nUpgrade: websocket\r\n",
    "half a body": POST + b"Content-Length: 9\r\n\r\n{",
    "half a chunk": POST + b"Transfer-Encoding: chunked\r\n\r\n9\r\n{",
}


@pytest.mark.parametrize("begun", BEGUN.values(), ids=BEGUN)
def test_what_is_begun_and_not_ended(served: Served, begun: bytes) -> None:
    with closing(dial(served)) as connection:
        connection.sendall(begun)
        assert ended(connection) < 8.0  # uvicorn has 5 s of its own
    assert served.http().get("/health").status_code == 200


def test_a_head_that_drips(served: Served) -> None:
    with closing(dial(served)) as connection:
        started = time.monotonic()
        with suppress(OSError):
            for byte in HEAD * 100:
                connection.sendall(bytes([byte]))
                time.sleep(0.05)
        assert time.monotonic() - started < 3.0


def test_a_body_that_drips_though_it_was_refused(served: Served) -> None:
    with closing(dial(served)) as connection:
        started = time.monotonic()
        with suppress(OSError):
            connection.sendall(POST + b"Content-Length: 999\r\n\r\n")
            for _ in range(999):
                connection.sendall(b" ")
                time.sleep(0.05)
        assert time.monotonic() - started < 8.0


def test_connections_beyond_the_limit_are_refused(served: Served) -> None:
    made = [dial(served) for _ in range(QUICK.connections)]
    try:
        time.sleep(0.1)
        with closing(dial(served)) as one_more:
            assert ended(one_more) < 0.2, "at once, not when its head is due"
    finally:
        for connection in made:
            connection.close()
    with closing(dial(served)) as connection:
        connection.sendall(HEAD + b"\r\n")
        assert connection.recv(15) == b"HTTP/1.1 200 OK"


@pytest.fixture
def large(served: Served) -> Iterator[Callable[[], socket.socket]]:
    """Asks for 32 MiB, and gives the connection."""

    async def send(request: Request) -> Response:
        return Response(bytes(32 << 20))

    server = Server(served.service, Starlette(routes=[Route("/", send)]))
    with listen("127.0.0.1", 0) as bound:
        address = bound.getsockname()
        thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
        thread.start()

        def ask() -> socket.socket:
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
            connection.settimeout(10)
            connection.connect(address)
            connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            return connection

        yield ask
        server.should_exit = True
        thread.join(20)


def test_an_answer_that_nobody_reads(large: Callable[[], socket.socket]) -> None:
    with closing(large()) as connection:
        time.sleep(1.5)
        received = 0
        try:
            while data := connection.recv(1 << 16):
                received += len(data)
        except ConnectionResetError:
            pass  # closed with the rest of the answer unsent
        assert received < 32 << 20


def test_an_answer_that_is_read_slowly(large: Callable[[], socket.socket]) -> None:
    """In thrice the time that a client may take nothing."""
    with closing(large()) as connection:
        started, received = time.monotonic(), 0
        while data := connection.recv(1 << 16):
            received += len(data)
            time.sleep(0.002)
        assert time.monotonic() - started > 3 * QUICK.unread_seconds
        assert received > 32 << 20


def test_a_websocket_that_is_not_read(served: Served) -> None:
    connection = connect(served.url.replace("http", "ws") + "/v1/realtime", sock=dial(served, 1 << 14), max_queue=1)
    update = json.dumps({"type": "session.update", "session": {"type": "realtime", "instructions": "x" * 4000}})
    with suppress(ConnectionClosed, OSError):
        for _ in range(100_000):
            connection.send(update)
            connection.send("no event")
    due = time.monotonic() + 10
    while served.service.realtime.open:
        assert time.monotonic() < due, "its place is free"
        time.sleep(0.05)
    while any(served._server.server_state.connections):
        assert time.monotonic() < due, "its socket is closed"
        time.sleep(0.05)
    connection.socket.close()


def test_a_body_that_times_out_itself_is_no_client_that_stalls(served: Served) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"x"
        raise asyncio.TimeoutError

    async def send(message: Message) -> None:
        pass

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def answer() -> None:
        await Stream(body(), AsyncExitStack(), served.service, "audio/wav")({}, receive, send)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(answer())
    assert 'reason="client_stalled"' not in served.http().get("/metrics").text
