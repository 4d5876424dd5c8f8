"""Listen, say where, and stop as asked: requests under way are ended first."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from omniport.runtime import OmniSession
from omniport.runtime.errors import UsageError
from starlette.applications import Starlette

from .app import make_app
from .log_lines import log_failure
from .service import Service
from .settings import Settings
from .slow_clients import protocols
from .systemd import Supervisor
from .tls import fingerprint

if TYPE_CHECKING:
    from .wyoming.listener import WyomingListener

#: seconds between pings of a WebSocket, and until one that does not answer is lost
_PING = 20.0


class Server(uvicorn.Server):
    """Listens for a service. Stopping, it ends WebSockets when their replies have ended, so that clients go elsewhere.

    Args:
        app: of the service.

    Attributes:
        wyoming: listens beside it, if it shall.
    """

    def __init__(self, service: Service, app: Starlette) -> None:
        self._service, self._supervisor = service, Supervisor()
        self.wyoming = _listen_to_wyoming(service)
        self._drain_seconds = service.settings.limits.drain_seconds
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                ssl_certfile=service.settings.certificate,
                ssl_keyfile=service.settings.certificate_key,
                **protocols(service.settings.limits),
                ws_per_message_deflate=False,  # most of what goes either way is sound, which hardly gets smaller
                ws_ping_interval=_PING,
                ws_ping_timeout=_PING,
                timeout_graceful_shutdown=round(self._drain_seconds),
            )
        )

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(log_failure)
        await super().serve(sockets)

    async def on_tick(self, counter: int) -> bool:
        self._supervisor.turn(self._service.state)
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.wyoming is not None:
            await self.wyoming.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.drain()
        due = time.monotonic() + self._drain_seconds
        while self._busy and not self.force_exit and time.monotonic() < due:
            self._supervisor.turn(self._service.state)
            await asyncio.sleep(0.05)
        if self.wyoming is not None:
            await self.wyoming.stop()
        await super().shutdown(sockets)

    @property
    def _busy(self) -> bool:
        """Clients that stay connected wait for something."""
        return bool(self._service.realtime.open) or (self.wyoming is not None and self.wyoming.busy)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.drain()
        self._supervisor.stopping()
        if sig == signal.SIGTERM and not self.should_exit:
            self.should_exit = True  # uvicorn would raise it again at the end: stopping as asked is no failure
        else:
            super().handle_exit(sig, frame)


def serve(session: OmniSession, settings: Settings, listening: Callable[[str], None]) -> None:
    """Serve until a signal comes; the session is closed then.

    Args:
        listening: called with the URL once connections are taken, while the graphs are loaded; then with a line about
            the certificate, if there is one.

    Raises:
        UsageError: the address cannot be listened on, or the settings do not go with the bundle.
        OmniportError: the graphs cannot be loaded or run.
    """
    service = Service(session, settings)
    try:
        with listen(settings.host, settings.port) as bound:
            server = Server(service, make_app(service))
            service.start(failed=lambda: setattr(server, "should_exit", True))
            listening(_url(settings, bound))
            if settings.certificate is not None:
                listening(f"certificate: SHA-256 {fingerprint(settings.certificate)}")
            server.run([bound])
    finally:
        service.close()
    if service.failure is not None:
        raise service.failure


def listen(host: str, port: int, options: str = "--host or --port") -> socket.socket:
    """A socket that takes connections; ``options`` are those that choose another address.

    It is of the protocol TCP by name: for others asyncio leaves Nagle's algorithm on, which holds a stream's next piece
    back until the client has acknowledged the last, by 40 ms.

    Raises:
        UsageError: the address cannot be listened on.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            if os.name == "posix":  # elsewhere it lets two programs have one port
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            bound.listen(128)
        except BaseException:
            bound.close()
            raise
        return bound
    except (OSError, OverflowError, UnicodeError) as error:
        raise UsageError(f"cannot listen on {host} port {port}: {error}; choose another {options}") from error


def _listen_to_wyoming(service: Service) -> WyomingListener | None:
    if service.settings.wyoming is None:
        return None
    from .wyoming.listener import WyomingListener  # wants a package of its own

    return WyomingListener(service, listen(*service.settings.wyoming, options="--wyoming"))


def _url(settings: Settings, bound: socket.socket) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    scheme = "http" if settings.certificate is None else "https"
    return f"{scheme}://{host}:{bound.getsockname()[1]}"
