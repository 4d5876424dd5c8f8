"""A server in a thread of this process, for official clients: over fake graphs, or over any session."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import openai
from omniport.runtime import OmniSession
from omniport.serve.app import make_app
from omniport.serve.replicas.session_store import SessionStore
from omniport.serve.server import Server, listen
from omniport.serve.service import Service
from omniport.serve.settings import Settings
from starlette.testclient import TestClient
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from .live_turns import Live

if TYPE_CHECKING:
    from typing import Self  # Python 3.11

# The pools that answer every client: they grow to their size with the clients at once, and stay.
POOLS = ("omniport-serve", "omniport-media")


def session_threads() -> set[threading.Thread]:
    """Our threads that end with what they work for, a session or a reply."""
    names = {thread: thread.name for thread in threading.enumerate()}
    return {thread for thread, name in names.items() if name.startswith("omniport-") and not name.startswith(POOLS)}


class ServedSession:
    """A service over an open session; with ``start`` it listens on loopback. The session is closed with it.

    Attributes:
        url, wyoming: where it listens.
    """

    def __init__(self, session: OmniSession, store: SessionStore | None = None, **settings: Any) -> None:
        self.service = Service(session, Settings(port=0, **settings), store)
        self.service.state = "ready"
        self.app = make_app(self.service)
        self.url = ""
        self.wyoming = ("", 0)
        self._clients: list[openai.OpenAI] = []

    def start(self) -> Self:
        bound = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        self._server = Server(self.service, self.app)
        if self._server.wyoming is not None:
            self.wyoming = self._server.wyoming.address
        self._thread = threading.Thread(target=self._server.run, args=([bound],), daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        for client in self._clients:
            client.close()
        if self.url:
            self._server.should_exit = True
            self._thread.join(20)
            assert not self._thread.is_alive()
        self.service.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def client(self, **options: Any) -> openai.OpenAI:
        """OpenAI's client, unmodified, which does not try again."""
        options = {"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, "timeout": 30, **options}
        self._clients.append(openai.OpenAI(**options))
        return self._clients[-1]

    def http(self, **options: Any) -> TestClient:
        """Starlette's client, which needs no server."""
        return TestClient(self.app, **{"base_url": "http://127.0.0.1", "raise_server_exceptions": False, **options})

    def drop(self) -> None:
        """Cut all WebSockets off, as a network does that goes away."""
        for connection in [*self._server.server_state.connections]:
            if isinstance(connection, WebSocketsSansIOProtocol):
                connection.loop.call_soon_threadsafe(connection.transport.abort)

    def quiet(self, seconds: float = 5.0) -> bool:
        """Wait until no reply is made or waited for; whether that came."""
        due = time.monotonic() + seconds
        admission = self.service.admission
        while (busy := admission.active + admission.waiting) and time.monotonic() < due:
            time.sleep(0.01)
        return not busy


@contextmanager
def served_alike(bundle: Path, **settings: Any) -> Iterator[ServedSession]:
    """A server over a real bundle, on loopback, whose replies are sampled from the same numbers each time."""
    with (
        patch("secrets.randbits", lambda bits: 1),
        ServedSession(OmniSession.open(bundle), **settings) as served,
    ):
        yield served.start()


class Served(ServedSession):
    """A service over a bundle made by hand.

    Attributes:
        live: the session and its fake graphs, whose replies can be scripted.
    """

    def __init__(self, root: Path, store: SessionStore | None = None, **settings: Any) -> None:
        self.live = Live(root)
        super().__init__(self.live.session, store, **settings)
