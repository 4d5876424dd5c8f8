"""Where replicas of a server keep what is needed to go on with each other's Realtime sessions."""

from __future__ import annotations

import time
from typing import Literal, Protocol

from msgspec import Struct, field

#: characters of events that are kept of a session, as its outbox keeps them
_EVENTS = 1 << 20
#: seconds after which a replica that says nothing is taken for lost, and its sessions are kept as if by it
_SILENCE = 15.0
Saving = Literal["saved", "unknown", "taken"]


class SessionState(Struct):
    """A session, or what has changed of it. The store does not look into it.

    Attributes:
        head: its settings and so on.
        order: ids of all its items. items: id -> its JSON. given: id -> what the model was given, where the JSON does
            not tell that; empty if the model has forgotten it.
        events: (id, text) of those that its client was told.
        whole: this is all of it.
        seconds: that it is kept for when its client, or its replica, is lost.
    """

    head: bytes = b""
    order: list[str] = field(default_factory=list)
    items: dict[str, bytes] = field(default_factory=dict)
    given: dict[str, bytes] = field(default_factory=dict)
    events: list[tuple[str, str]] = field(default_factory=list)
    whole: bool = True
    seconds: float = 0.0

    def update(self, changes: SessionState) -> None:
        """With what has changed."""
        self.head, self.order, self.seconds = changes.head, changes.order, changes.seconds
        for mine, theirs in ((self.items, changes.items), (self.given, changes.given)):
            mine.update(theirs)
            for id in mine.keys() - set(self.order):
                del mine[id]
        self.given = {id: given for id, given in self.given.items() if given}
        self.events = self.events + changes.events
        size = sum(len(text) for _, text in self.events)
        while size > _EVENTS:
            size -= len(self.events.pop(0)[1])

    @property
    def size(self) -> int:
        """Bytes, about."""
        held = sum(map(len, self.items.values())) + sum(map(len, self.given.values()))
        return len(self.head) + held + sum(len(text) for _, text in self.events)


class SessionStore(Protocol):
    """What all replicas reach. A session belongs to one of them, its owner, and no other may save it.

    Any method may raise whatever the way to it raises.
    """

    async def save(self, key: str, owner: str, changes: SessionState) -> Saving:
        """Keep a session; ``unknown``: nothing is known that this has changed of; ``taken``: it is another's."""

    async def owner(self, key: str) -> str | None:
        """Whose a session is; None if there is none."""

    async def take(self, key: str, owner: str) -> SessionState | None:
        """Make a session this owner's: all that is known of it."""

    async def forget(self, key: str, owner: str) -> None:
        """A session of this owner is over."""

    async def renew(self, owner: str) -> None:
        """The owner lives. It says so every few seconds."""


class _Kept:
    def __init__(self, owner: str) -> None:
        self.owner, self.state, self.saved = owner, SessionState(), time.monotonic()


class SessionTable:
    """A store in memory.

    Args:
        most: bytes of all sessions; the one that was not saved for longest goes first.
    """

    def __init__(self, most: int = 1 << 30) -> None:
        self._most = most
        self._kept: dict[str, _Kept] = {}  # the one that was saved last is the last
        self._seen: dict[str, float] = {}

    async def save(self, key: str, owner: str, changes: SessionState) -> Saving:
        """See ``SessionStore``."""
        self._seen[owner] = time.monotonic()
        kept = self._find(key)
        if kept is not None and kept.owner != owner:
            return "taken"
        if changes.whole:
            kept = _Kept(owner)
        elif kept is None:
            return "unknown"
        kept.state.update(changes)
        kept.saved = time.monotonic()
        self._kept.pop(key, None)
        self._kept[key] = kept
        size = sum(other.state.size for other in self._kept.values())
        while size > self._most and len(self._kept) > 1:
            size -= self._kept.pop(next(iter(self._kept))).state.size
        return "saved"

    async def owner(self, key: str) -> str | None:
        """See ``SessionStore``."""
        kept = self._find(key)
        return None if kept is None else kept.owner

    async def take(self, key: str, owner: str) -> SessionState | None:
        """See ``SessionStore``."""
        kept = self._find(key)
        if kept is None:
            return None
        kept.owner, kept.saved = owner, time.monotonic()
        return kept.state

    async def forget(self, key: str, owner: str) -> None:
        """See ``SessionStore``."""
        kept = self._find(key)
        if kept is not None and kept.owner == owner:
            del self._kept[key]

    async def renew(self, owner: str) -> None:
        """See ``SessionStore``."""
        now = self._seen[owner] = time.monotonic()
        for key in [*self._kept]:
            self._find(key)
        owners = {kept.owner for kept in self._kept.values()}
        self._seen = {name: seen for name, seen in self._seen.items() if name in owners or now - seen < _SILENCE}

    def _find(self, key: str) -> _Kept | None:
        """A session, unless its owner is lost and its time is over."""
        kept = self._kept.get(key)
        if kept is None:
            return None
        alive = max(kept.saved, self._seen.get(kept.owner, 0.0))
        if time.monotonic() - alive > kept.state.seconds + _SILENCE:
            del self._kept[key]
            return None
        return kept
