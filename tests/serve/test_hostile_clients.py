"""A server in the hands of hostile clients, each drawn from a seed: an error each, and the next client is served.

`make serve-check` runs 500 of them.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import httpx
import pytest
from omniport.serve.settings import Limits
from support.hostile import BODIES, damaged, event, large_json, mutated, raw_request
from support.served import Served, session_threads
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

COUNT = int(os.environ.get("OMNIPORT_HOSTILE_CLIENTS", "70"))
FIRST = int(os.environ.get("OMNIPORT_HOSTILE_FIRST", "0"))
CHAT = "/v1/chat/completions"
LIMITS = Limits(head_seconds=0.5, upload_seconds=0.5, unread_seconds=1.0)
#: of answers to bodies that nobody can take amiss
REFUSED = {400, 404, 408, 413, 415, 422, 429}


@pytest.fixture
def served(root: Path) -> Iterator[Served]:
    with Served(root, limits=LIMITS, resume_seconds=0.5) as made:
        yield made.start()


def ask(served: Served, path: str, **what: object) -> None:
    response = httpx.post(served.url + path, timeout=30, **what)  # type: ignore[arg-type]
    assert response.status_code in {200, *REFUSED}, response.text
    assert "internal_error" not in response.text
    if response.status_code != 200:
        assert response.json()["error"].keys() == {"message", "type", "param", "code"}


def send_body(served: Served, rng: random.Random) -> None:
    path = rng.choice(list(BODIES))
    ask(served, path, content=mutated(BODIES[path], rng))


def send_large(served: Served, rng: random.Random) -> None:
    ask(served, CHAT, content=large_json(rng))


def send_file(served: Served, rng: random.Random) -> None:
    kind, data = damaged(rng)
    url = {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}
    name = rng.choice(("image_url", "audio_url", "video_url"))
    content = [{"type": "text", "text": "What is it?"}, {"type": name, name: url}]
    ask(served, CHAT, json={"messages": [{"role": "user", "content": content}], "max_tokens": 1})


def send_form(served: Served, rng: random.Random) -> None:
    _, data = damaged(rng)
    fields = {rng.choice(("model", "stream", "temperature", "file", "\0")): rng.choice(("tiny", "true", "x", "9"))}
    ask(served, "/v1/audio/transcriptions", files={rng.choice(("file", "other")): ("a", data)}, data=fields)


def send_raw(served: Served, rng: random.Random) -> None:
    with closing(dial(served)) as connection:
        answered = b""
        connection.settimeout(0.8)
        with suppress(ConnectionError, TimeoutError):
            connection.sendall(raw_request(rng))
            if rng.random() < 0.3:
                connection.shutdown(socket.SHUT_WR)
            while data := connection.recv(1 << 16):
                answered += data
        assert b" 500 " not in answered.partition(b"\r\n")[0], answered


def leave_half_open(served: Served, rng: random.Random) -> None:
    connection = dial(served)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 500\r\n\r\n".encode()
    connection.sendall((head + b'{"messages": [')[: rng.randrange(len(head) + 14)])
    threading.Timer(rng.choice((0.0, 1.0)), connection.close).start()


def talk(served: Served, rng: random.Random) -> None:
    try:
        connection = connect(served.url.replace("http", "ws") + "/v1/realtime", open_timeout=60, close_timeout=0.2)
    except InvalidStatus as error:  # those before have not all left
        if error.response.status_code != 429:
            raise
        return
    with suppress(ConnectionClosed):
        for _ in range(rng.randrange(1, 30)):
            connection.send(event(rng))
            if rng.random() < 0.2:
                with suppress(TimeoutError):
                    told = json.loads(connection.recv(0.05))
                    assert told.get("error", {}).get("code") != "internal_error", told
    if rng.random() < 0.5:
        connection.close()
    else:
        with suppress(OSError):
            connection.socket.shutdown(socket.SHUT_RDWR)
        connection.socket.close()


def dial(served: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), 15)


CLIENTS: list[Callable[[Served, random.Random], None]] = [
    send_body,
    send_large,
    send_file,
    send_form,
    send_raw,
    leave_half_open,
    talk,
]


def wait(what: str, done: Callable[[], bool]) -> None:
    due = time.monotonic() + 15
    while not done():
        assert time.monotonic() < due, what
        time.sleep(0.05)


def rest(served: Served, others: set[threading.Thread]) -> int:
    """Wait until nobody is left, and no thread but ``others`` and the pools'; open files then."""
    realtime = served.service.realtime
    wait("no reply is made", served.quiet)
    wait("every session has ended", lambda: not realtime.open and not realtime.kept and not realtime._all)
    wait("every connection is closed", lambda: not served._server.server_state.connections)
    wait("every thread of a session has ended", lambda: not session_threads() - others)
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def test_hostile_clients(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    client = served.client()

    def serve_next() -> None:
        answer = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hello"}])
        assert answer.choices[0].message.content

    others = session_threads()
    serve_next()
    before = 0
    for seed in range(FIRST, FIRST + COUNT):
        rng = random.Random(seed)
        CLIENTS[seed % len(CLIENTS)](served, rng)
        if seed - FIRST == 4 * len(CLIENTS):  # by now every kind of thread and file is there that is kept
            before = rest(served, others)
        if seed % 20 == 19:
            serve_next()
    serve_next()
    files = rest(served, others)
    wrong = [record for record in caplog.records if record.levelno >= logging.ERROR or record.exc_info]
    assert not wrong, wrong[0].getMessage()
    assert len(served.service.sessions.kept) <= 4
    assert files <= before + 8, "the client's own connections stay"
