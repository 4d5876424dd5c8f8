"""Makes responses by the runtime, and sets the conversation right when they end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Protocol, TypeVar

from omniport.runtime import AudioChunk, Done, Event, OmniSession, TextDelta, TurnsDropped

from ...http.answering import place
from ...reply_events import ReplyEvents
from ...service import Service
from ..item_list import ItemList
from ..wire.outbox import Outbox
from .response import Reason, Response

T = TypeVar("T")


class Compute(Protocol):
    """Runs work in the session's thread."""

    def __call__(self, work: Callable[..., T], *arguments: Any) -> Awaitable[T]: ...


class ReplyMaker:
    """Makes the responses of one session, one at a time.

    Attributes:
        spoke: sound was sent.
    """

    def __init__(
        self, service: Service, session: OmniSession, outbox: Outbox, items: ItemList, compute: Compute
    ) -> None:
        self.spoke = False
        self._service, self._session, self._outbox, self._items = service, session, outbox, items
        self._compute = compute

    async def make(self, response: Response) -> None:
        """Make a response; what fails is told in it."""
        asked = response.question
        try:
            async with (
                place(self._service),
                ReplyEvents(lambda: self._begin(response), self._service.waiting) as events,
            ):
                async for event in events:
                    await self._outbox.room(response.stopped)
                    self._take(response, event)
        except asyncio.CancelledError:
            if not response.stopped():  # nobody asked for that: the server's loop or its threads have ended
                response.error = RuntimeError("the response was abandoned")
                raise
        except Exception as error:  # noqa: BLE001 - told in the response
            response.error = None if response.stopped() else error
        if response.turn is None and asked is not None:
            await self._compute(asked.turn.keep)  # it was not answered, but was said

    async def stop(self, response: Response, reason: Reason) -> None:
        """End a response now."""
        response.reason = reason
        self._outbox.wake()
        assert response.task is not None
        if response.turn is not None:
            await self._compute(response.turn.cancel)
        else:
            response.task.cancel()
        await asyncio.wait({response.task})

    async def settle(self, response: Response) -> None:
        """Once it has ended: which message of the runtime's it is; one that stands apart leaves none."""
        there = {item.id for item in self._session.items}
        question, items = response.question, self._session.items
        if question is not None and question.item.runtime_id not in there:
            # stopped while the last of it was encoded, or too long to be answered
            message = {"role": "user", "content": [{"type": "audio", "audio": question.sound}]}
            question.item.runtime_id = None
            question.item.runtime_id = (await self._compute(items.append, message)).id
        ids = response.turn.item_ids if response.turn is not None else []
        id = ids[-1] if ids and ids[-1] in there else None
        if response.conversation is None and id is not None:
            await self._compute(items.delete, id)
        elif response.messages is not None and response.conversation is not None and response.done is not None:
            said = {"role": "assistant", "content": response.done.text}
            id = (await self._compute(items.append, said)).id
        response.runtime_id = id

    def _begin(self, response: Response) -> Iterator[Event]:
        options = response.settings.reply_options(self._service)
        if response.messages is not None:
            return self._session.reply(response.messages, tools=response.settings.runtime_tools(), **options)
        question = response.question
        turn = response.turn = self._session.turn(**options) if question is None else question.turn
        return turn.answer() if question is None else turn.commit()

    def _take(self, response: Response, event: Event) -> None:
        if isinstance(event, Done):
            response.done = event
        elif isinstance(event, TurnsDropped):
            forgotten = self._items.forget(event.items)
            self._service.measurements.dropped(event.turns)
            self._outbox.extra("omniport.turns_dropped", turns=event.turns, item_ids=forgotten)
        elif isinstance(event, (TextDelta, AudioChunk)) and not response.stopped():
            self.spoke = self.spoke or isinstance(event, AudioChunk)
            response.take(event)
