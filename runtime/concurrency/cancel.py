"""Cancellation of a reply: a token that every graph run checks, and that wakes waiting threads."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Cancelled(Exception):
    """Unwinds a worker or a push whose turn was cancelled. It never reaches the user."""


class CancelToken:
    """Set once, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wakers: list[Callable[[], None]] = []
        self.cancelled = False

    def cancel(self) -> None:
        """Ask everything that looks at the token to stop. Asking twice does nothing."""
        with self._lock:
            self.cancelled = True
            wakers, self._wakers = self._wakers, []
        for wake in wakers:
            wake()

    def check(self) -> None:
        """Raise Cancelled if asked to stop."""
        if self.cancelled:
            raise Cancelled

    def subscribe(self, wake: Callable[[], None]) -> None:
        """Call ``wake`` when the token is set, at once if it is."""
        with self._lock:
            if not self.cancelled:
                self._wakers.append(wake)
                return
        wake()
