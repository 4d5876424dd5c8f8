"""What replies with sound said, for clients that name them by the id of their sound."""

from __future__ import annotations

import secrets
import time


class SpokenReplies:
    """Texts by id.

    Args:
        seconds: that one is kept. most: how many are.
    """

    def __init__(self, seconds: float = 3600.0, most: int = 256) -> None:
        self._seconds, self._most = seconds, most
        self._kept: dict[str, tuple[str, float]] = {}

    def new(self) -> tuple[str, int]:
        """(id, when it expires) of a reply that begins."""
        return f"audio_{secrets.token_hex(12)}", int(time.time() + self._seconds)

    def keep(self, id: str, text: str) -> None:
        """A reply has said this."""
        self._kept[id] = text, time.time() + self._seconds
        while len(self._kept) > self._most:
            del self._kept[next(iter(self._kept))]

    def find(self, id: str) -> str | None:
        """What it said; None if nobody knows, or no more."""
        text, expires = self._kept.get(id, (None, 0.0))
        return text if expires >= time.time() else None
