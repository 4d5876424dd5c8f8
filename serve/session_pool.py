"""Sessions whose KV caches are kept, so that a chat that goes on is prefilled from where it differs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
from omniport.runtime import OmniSession


class _Kept:
    def __init__(self, session: OmniSession) -> None:
        self.session = session
        self.asked: list[bytes] = []

    def common(self, asked: Sequence[bytes]) -> int:
        """How many messages at the beginning are those that it was asked before."""
        same = 0
        for ours, theirs in zip(self.asked, asked, strict=False):
            if ours != theirs:
                break
            same += 1
        return same

    def goes_on(self, asked: Sequence[bytes]) -> bool:
        """Whether most of what it was asked before is asked again."""
        return 2 * self.common(asked) > len(self.asked)


class SessionPool:
    """Forks of a session, made when they are needed. Belongs to one thread.

    Args:
        size: sessions at most; at least as many as are borrowed at once.

    Attributes:
        kept: all of them.
    """

    def __init__(self, session: OmniSession, size: int) -> None:
        self.kept: list[OmniSession] = []
        self._first, self._size = session, size
        self._idle: list[_Kept] = []  # the one that was used last is the last

    @contextmanager
    def borrow(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> Iterator[OmniSession]:
        """The session that has answered the beginning of these messages; else a new one, or the one not used longest.

        What it holds is of value only together with ``items.replace``.
        """
        asked = [_digest(value) for value in (list(tools), *messages)]
        kept = self._take(asked)
        kept.asked = asked
        try:
            yield kept.session
        finally:
            self._idle.append(kept)

    def close(self) -> None:
        """Close all of them."""
        for session in self.kept:
            session.close()

    def _take(self, asked: Sequence[bytes]) -> _Kept:
        best = max(self._idle, key=lambda kept: kept.common(asked), default=None)
        if best is None or not best.goes_on(asked):
            if len(self.kept) < self._size:
                self.kept.append(self._first.fork())
                return _Kept(self.kept[-1])
            best = self._idle[0]
        self._idle.remove(best)
        return best


def _digest(value: object) -> bytes:
    return hashlib.blake2b(msgspec.json.encode(value), digest_size=16).digest()
