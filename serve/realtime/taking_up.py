"""A client comes back: to the session that is here, or to what another replica has saved of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from ..http.api_errors import ApiError, busy
from ..replicas.session_keeper import PATIENCE, key_of
from ..replicas.session_store import SessionState
from ..service import Service
from .held_session import HeldSession

_LOG = logging.getLogger(__name__)
T = TypeVar("T")


async def take_up(service: Service, token: str) -> HeldSession | SessionState:
    """The session of a client that comes back, who is counted as one that is open then.

    Raises:
        ApiError: there is none, or no room for one that was saved.
    """
    taken = service.realtime.take(token)
    held = taken if isinstance(taken, HeldSession) else None
    if service.store is None:
        return _there(held)
    key = key_of(token)
    owner = await _answer(service.store.owner(key))
    if owner is None or (owner == service.id and held is not None):
        return _there(held)
    if held is not None:  # it has gone on elsewhere since
        await _give_up(service, held)
    elif not await service.realtime.make_room():
        raise busy(1.0)
    state = await _answer(service.store.take(key, service.id))
    if state is None:
        service.realtime.leave()
        return _there(None)
    return state


async def _answer(asked: Coroutine[Any, Any, T | None]) -> T | None:
    """The store's; None if it has none, or cannot be reached."""
    try:
        return await asyncio.wait_for(asked, PATIENCE)
    except Exception as error:  # noqa: BLE001 - whatever the way to the store raises
        _LOG.warning("no saved session can be looked for: %s", type(error).__name__)
        return None


def _there(held: HeldSession | None) -> HeldSession:
    if held is None:
        message = "there is no such session, or it was kept for as long as it may; begin another"
        raise ApiError(404, "session_not_found", message, param="resume")
    return held


async def _give_up(service: Service, held: HeldSession) -> None:
    if held.unconnected.is_set():
        await service.realtime.remove(held)
    else:
        held.give_up()
        await held.unconnected.wait()
