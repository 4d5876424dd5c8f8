"""What a session and its forks share beside the backend: their process, places for replies, and who is the last."""

from __future__ import annotations

import threading

from .owner import Owner
from .places import Places
from .timing import Pace


class Shared:
    """Of the sessions over one backend.

    Attributes:
        owner: the process that they work in.
        pace: of their replies.
    """

    def __init__(self, places: Places) -> None:
        self.owner, self.places = Owner(), places
        self.pace = Pace()
        self._lock = threading.Lock()
        self._count = 1

    def join(self) -> None:
        """One more."""
        with self._lock:
            self._count += 1

    def leave(self) -> bool:
        """One less; True for the last one."""
        with self._lock:
            self._count -= 1
            return not self._count
