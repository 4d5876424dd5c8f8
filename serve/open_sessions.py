"""Realtime sessions: those with a client, and those whose client was lost and may come back."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import Protocol

from omniport.runtime import OmniSession


class Held(Protocol):
    """A session that outlives its connection."""

    @property
    def token(self) -> str:
        """By which its client takes it up."""

    @property
    def conversation(self) -> OmniSession:
        """The runtime's session."""

    async def end(self) -> None:
        """Free it."""

    def abandon(self) -> None:
        """Free it, without an event loop."""

    async def forget(self) -> None:
        """Nobody shall go on with it."""


class OpenSessions:
    """At most so many. Belongs to one event loop.

    A session without a client counts, for its KV caches are there; but it gives way to a new client.

    Args:
        most: sessions. seconds: that one without a client is kept.

    Attributes:
        open: sessions with a client, and clients whose session begins.
    """

    def __init__(self, most: int, seconds: float) -> None:
        self.most, self.seconds, self.open = most, seconds, 0
        self._all: dict[bytes, Held] = {}
        self._kept: dict[bytes, asyncio.TimerHandle] = {}  # the one that was lost first is the first

    @property
    def kept(self) -> int:
        """Sessions without a client."""
        return len(self._kept)

    @property
    def free(self) -> int:
        """New clients that are taken."""
        return max(0, self.most - self.open)

    def sessions(self) -> list[OmniSession]:
        """Of all, with and without a client, in the order in which they began."""
        return [held.conversation for held in self._all.values()]

    async def make_room(self) -> bool:
        """For one more client, who is counted by ``open`` then; False if there is none."""
        if not self.free:
            return False
        self.open += 1
        if self.open + self.kept > self.most:
            await self._forget(next(iter(self._kept)))
        return True

    def add(self, held: Held) -> None:
        """A session has begun, with a client."""
        self._all[_digest(held.token)] = held

    def take(self, token: str) -> Held | None:
        """The session of a client that comes back, who is counted by ``open`` then."""
        key = _digest(token)
        held = self._all.get(key)
        timer = self._kept.pop(key, None)
        if timer is not None:
            timer.cancel()
        if held is not None:
            self.open += 1
        return held

    def leave(self) -> None:
        """A client is gone."""
        self.open -= 1

    def keep(self, held: Held) -> None:
        """It has no client. Keeping it twice does nothing."""
        key = _digest(held.token)
        if key in self._kept:
            return
        forget: Callable[[], object] = lambda: asyncio.ensure_future(self._forget(key))  # noqa: E731
        self._kept[key] = asyncio.get_running_loop().call_later(self.seconds, forget)

    async def remove(self, held: Held) -> None:
        """It has ended, or shall."""
        self._all.pop(_digest(held.token), None)
        await held.end()

    def close(self) -> None:
        """Free those that are left, when there is no event loop any more."""
        for held in self._all.values():
            held.abandon()
        self._all.clear()
        self._kept.clear()

    async def _forget(self, key: bytes) -> None:
        timer, held = self._kept.pop(key, None), self._all.get(key)
        if timer is not None:
            timer.cancel()
            if held is not None:
                await self.remove(held)
                await held.forget()


def _digest(token: str) -> bytes:
    """A look-up by it tells nothing of a token by the time that it takes."""
    return hashlib.sha256(token.encode(errors="replace")).digest()
