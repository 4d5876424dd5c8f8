"""Listens for Wyoming clients beside HTTP, in the same event loop."""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import suppress

from wyoming.error import Error

from ..service import Service
from .client import Client, ClientLeft
from .event_reader import HEADER
from .replies import Replies

_LOG = logging.getLogger(__name__)
#: connections at once: a recording takes up to 20 MB
_MOST = 32
#: seconds for what was sent to leave
_FAREWELL = 5.0
#: in which connections that were taken while the server stops get as far as ``_connected``, which ends them
_ACCEPTING = 0.01


class WyomingListener:
    """Takes connections from ``start`` to ``stop``."""

    def __init__(self, service: Service, bound: socket.socket) -> None:
        self._service, self._bound = service, bound
        self._replies = Replies(service)
        self._clients: dict[Client, asyncio.Task[None]] = {}
        self._server: asyncio.Server | None = None
        self._stopping = False

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, port = self._bound.getsockname()[:2]
        return host, port

    @property
    def busy(self) -> bool:
        """A client waits for something."""
        return any(client.busy for client in self._clients)

    async def start(self) -> None:
        """Take connections."""
        _LOG.info("Wyoming on %s port %d", *self.address)
        self._server = await asyncio.start_server(self._connected, sock=self._bound, limit=HEADER)

    async def stop(self) -> None:
        """Take none, and end those that there are."""
        self._stopping = True
        if self._server is None:
            self._bound.close()
        else:
            self._server.close()
            await asyncio.sleep(_ACCEPTING)
        tasks = [*self._clients.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # finds those that vanish
        client = Client(reader, writer, self._service, self._replies)
        task = asyncio.current_task()
        if self._stopping:
            writer.transport.abort()
            return
        if len(self._clients) >= _MOST or task is None:
            with suppress(ClientLeft):
                await client.send(Error("as many clients are connected as may", "session_limit_reached"))
            await _close(writer)
            return
        self._clients[client] = task
        try:
            await client.run()
        except asyncio.CancelledError:
            pass  # by `stop`, which waits for this task; asyncio would log a task that ends so as a fault
        except Exception:  # noqa: BLE001 - the next client is served
            _LOG.exception("a Wyoming client failed")
        finally:
            await _close(writer)
            del self._clients[client]


async def _close(writer: asyncio.StreamWriter) -> None:
    """With what was sent last, if the client takes it."""
    writer.close()
    try:
        await asyncio.wait_for(writer.wait_closed(), _FAREWELL)
    except (OSError, asyncio.TimeoutError, asyncio.CancelledError):
        writer.transport.abort()
