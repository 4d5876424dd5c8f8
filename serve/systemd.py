"""What systemd wants to know of its service: that it is ready, that it lives, that it stops."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Mapping

from .service import State

_LOG = logging.getLogger(__name__)


class Supervisor:
    """The process that started this one, told over its notification socket; without a socket, nobody is told.

    Args:
        environment: what systemd set: ``NOTIFY_SOCKET`` names the socket, in the file system or, after ``@``, in the
            abstract namespace; ``WATCHDOG_USEC`` are the microseconds after which a process that keeps silent is
            killed, if ``WATCHDOG_PID`` is this one or not set.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        for_us = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        period = environment.get("WATCHDOG_USEC", "") if for_us else ""
        self._every = int(period) / 2e6 if period.isdecimal() else 0.0
        self._told: State | None = None
        self._alive = 0.0

    def turn(self, state: State) -> None:
        """The event loop has turned once more; to be called by nothing that goes on where the loop is stuck."""
        if state != self._told:
            self._told = state
            self._tell(f"STATUS={state}", *(["READY=1"] if state == "ready" else []))
        now = time.monotonic()
        if self._every and now - self._alive >= self._every:
            self._alive = now
            self._tell("WATCHDOG=1")

    def stopping(self) -> None:
        """The server ends what is under way; the watchdog waits no more."""
        self._tell("STOPPING=1")

    def _tell(self, *lines: str) -> None:
        if not self._address or sys.platform == "win32":
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.setblocking(False)
                sender.sendto("\n".join(lines).encode(), address)
        except OSError as error:  # a supervisor that has left is no reason to stop serving
            _LOG.warning("%s was not told: %s", self._address, error)
