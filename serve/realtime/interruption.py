"""What of a reply was not heard is forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from omniport.runtime import OmniSession
from omniport.runtime.errors import UsageError

from .item_list import Item
from .responses.reply_maker import Compute
from .responses.response import Response
from .wire.inbox import Work
from .wire.outbox import Outbox

#: seconds after an interruption in which clients tell how much was heard; a reply whose sound was played but for
#: so many was heard to its end
_TRUNCATES, _REST = 0.25, 0.05


class Interruption:
    """Cuts replies in one session.

    Args:
        later: lets work be done in order with what the client's events ask for.
    """

    def __init__(self, session: OmniSession, outbox: Outbox, compute: Compute, later: Callable[[Work], None]) -> None:
        self._session, self._outbox, self._compute, self._later = session, outbox, compute, later
        self._unheard: tuple[Item, float] | None = None  # a reply that was cut off, and how much of it was heard

    def estimate(self, response: Response, heard: float) -> bool:
        """So many seconds were heard of a reply that somebody spoke into, unless the client soon knows better.

        Whether there was more of it.
        """
        if response.message is None or heard + _REST >= response.playback.sent:
            return False
        response.playback.played(heard)
        self._unheard = response.message, heard
        asyncio.get_running_loop().call_later(_TRUNCATES, self._later, self.apply)
        return True

    async def apply(self) -> None:
        """The estimate stands."""
        unheard, self._unheard = self._unheard, None
        if unheard is not None:
            item, heard = unheard
            await self.cut(item, heard)

    async def truncate(self, item: Item, heard: float) -> None:
        """The client says how much was heard."""
        if self._unheard is not None and self._unheard[0] is item:
            self._unheard = None
        await self.cut(item, heard)

    async def cut(self, item: Item, heard: float) -> None:
        """Forget what was not heard of a reply that ended. One that was stopped may have less than its item says."""
        if item.runtime_id is None:
            return
        await self._compute(_truncate, self._session, item.runtime_id, heard)
        content = self._session.items[item.runtime_id].content
        text = "".join(part.get("text", "") for part in content if part["type"] == "text")
        (said,) = item.fields["content"]
        key = "transcript" if said["type"] == "output_audio" else "text"
        if len(text) >= len(said[key]):
            return
        item.fields["content"] = [{**said, key: text}]
        self._outbox.extra("omniport.reply_cut", item_id=item.id, heard_ms=round(heard * 1000), transcript=text)


def _truncate(session: OmniSession, id: str, heard: float) -> None:
    """What was not spoken by this model cannot be cut, and stays."""
    with suppress(UsageError):
        session.items.truncate(id, heard=heard)
