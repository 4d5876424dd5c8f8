"""A client of the Realtime protocol that speaks JSON, and can be lost."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

BY_HAND = {"type": "realtime", "output_modalities": ["audio"], "audio": {"input": {"turn_detection": None}}}


class Socket:
    """One connection. ``url``: of the server."""

    def __init__(self, url: str, query: str = "", **options: Any) -> None:
        self.inner: ClientConnection = connect(f"ws{url[4:]}/v1/realtime?{query}", open_timeout=60, **options)

    def send(self, type: str, **fields: Any) -> None:
        self.inner.send(json.dumps({"type": type, **fields}))

    def until(self, kind: str) -> list[dict[str, Any]]:
        came: list[dict[str, Any]] = []
        while not came or came[-1]["type"] != kind:
            came.append(json.loads(self.inner.recv(timeout=20)))
        return came

    def created(self) -> dict[str, Any]:
        session: dict[str, Any] = self.until("session.created")[0]["session"]
        return session

    def lose(self) -> None:
        """No close frame."""
        self.inner.socket.shutdown(socket.SHUT_RDWR)

    def closed(self) -> int:
        with suppress(ConnectionClosed):
            for _ in self.inner:
                pass
        assert self.inner.protocol.close_rcvd is not None
        return self.inner.protocol.close_rcvd.code

    def write(self, text: str) -> None:
        content = [{"type": "input_text", "text": text}]
        self.send("conversation.item.create", item={"type": "message", "role": "user", "content": content})
        self.until("conversation.item.done")


def wait_until(so: Callable[[], bool]) -> None:
    due = time.monotonic() + 20
    while not so():
        assert time.monotonic() < due
        time.sleep(0.01)
