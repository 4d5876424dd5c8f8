"""Saves a Realtime session before its client is told of what has changed: what a client knows is not lost."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence

import msgspec

from ..realtime.item_list import Item
from .saved_session import Head, encode_item
from .session_store import SessionState, SessionStore

_LOG = logging.getLogger(__name__)
#: seconds for the store to answer, and without asking one that does not
PATIENCE, _REST = 2.0, 5.0


def key_of(token: str) -> str:
    """By which a session is kept; the store does not learn the token."""
    return hashlib.sha256(token.encode(errors="replace")).hexdigest()


class SessionKeeper:
    """Saves one session. Belongs to one event loop.

    Args:
        owner: this replica. key: of the session. seconds: that it is kept for when it is lost.
        head, items, events: what there is to save: all items, and (id, text) of the events that are remembered.
        taken: called when another replica has taken the session up.
    """

    def __init__(
        self,
        store: SessionStore,
        owner: str,
        key: str,
        seconds: float,
        *,
        head: Callable[[], Head],
        items: Iterable[Item],
        events: Callable[[], Sequence[tuple[str, str]]],
        taken: Callable[[], None],
    ) -> None:
        self._store, self._owner, self._key, self._seconds = store, owner, key, seconds
        self._head, self._items, self._events, self._taken = head, items, events, taken
        self._known: dict[str, bytes] = {}  # id -> item as the store has it
        self._given: set[str] = set()  # ids of those of which it has what was given
        self._last_event: str | None = None
        self._whole, self._rests_until = True, 0.0

    async def save(self) -> None:
        """Bring the store up to date. Where that fails the session goes on all the same."""
        if time.monotonic() < self._rests_until:
            return
        try:
            outcome = await asyncio.wait_for(self._store.save(self._key, self._owner, self._changes()), PATIENCE)
            if outcome == "unknown":
                self._whole = True
                outcome = await asyncio.wait_for(self._store.save(self._key, self._owner, self._changes()), PATIENCE)
        except Exception as error:  # noqa: BLE001 - whatever its way raises
            _LOG.warning("a session cannot be saved: %s", type(error).__name__)
            self._whole, self._rests_until = True, time.monotonic() + _REST
            return
        if outcome == "taken":
            self._taken()

    async def forget(self) -> None:
        """The session is over."""
        try:
            await asyncio.wait_for(self._store.forget(self._key, self._owner), PATIENCE)
        except Exception as error:  # noqa: BLE001 - whatever its way raises; it is forgotten when its time is over
            _LOG.warning("a saved session cannot be forgotten: %s", type(error).__name__)

    def _changes(self) -> SessionState:
        """Since the last time, which must have succeeded."""
        if self._whole:
            self._known, self._given, self._last_event = {}, set(), None
        state = SessionState(msgspec.json.encode(self._head()), whole=self._whole, seconds=self._seconds)
        for item in self._items:
            data = encode_item(item)
            state.order.append(item.id)
            if self._known.get(item.id) == data:
                continue
            state.items[item.id] = data
            if (item.given is not None) != (item.id in self._given):
                state.given[item.id] = b"" if item.given is None else msgspec.msgpack.encode(item.given)
        self._given = {item.id for item in self._items if item.given is not None}
        self._known = {id: state.items.get(id) or self._known[id] for id in state.order}
        for id, text in reversed(self._events()):
            if id == self._last_event:
                break
            state.events.insert(0, (id, text))
        if state.events:
            self._last_event = state.events[-1][0]
        self._whole = False
        return state
