"""What users said, written down by the thinker while nothing else is to be done."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omniport.runtime import Done, OmniSession

from ..http.answering import place
from ..http.transcription import instruction, sampling_of
from ..http.usage import token_usage
from ..reply_events import ReplyEvents
from ..service import Service
from .item_list import Item
from .wire.outbox import Outbox

_LOG = logging.getLogger(__name__)
Sound = tuple[NDArray[np.float32], int]
#: that wait at most; seconds of quiet before one begins
_MOST, _QUIET = 8, 0.3


class Transcripts:
    """Transcribes one item after another. A response goes before: the transcript begins again after it."""

    def __init__(self, service: Service, session: OmniSession, outbox: Outbox) -> None:
        self._service, self._session, self._outbox = service, session, outbox
        self._waiting: deque[tuple[Item, Sound, dict[str, Any]]] = deque(maxlen=_MOST)
        self._task: asyncio.Task[None] | None = None

    def add(self, item: Item, sound: Sound, asked: dict[str, Any]) -> None:
        """Transcribe this sound when there is time; ``asked``: OpenAI's ``transcription`` of the session."""
        self._waiting.append((item, sound, asked))

    def resume(self) -> None:
        """There may be time now."""
        if self._waiting and (self._task is None or self._task.done()):
            self._task = asyncio.ensure_future(self._run())

    async def pause(self) -> None:
        """A response begins."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        await asyncio.sleep(_QUIET)
        while self._waiting:
            item, sound, asked = self._waiting[0]
            try:
                done = await self._written(sound, asked)
            except Exception:  # noqa: BLE001 - the conversation goes on without it
                _LOG.exception("a transcript failed")
                self._failed(item)
            else:
                self._completed(item, done)
            self._waiting.popleft()

    async def _written(self, sound: Sound, asked: dict[str, Any]) -> Done:
        text = instruction(_text(asked, "language"), _text(asked, "prompt"))
        content = [{"type": "audio", "audio": sound}, {"type": "text", "text": text}]
        done = None

        def begin() -> Any:
            messages = [{"role": "user", "content": content}]
            return self._session.reply(messages, speak=False, thinker=sampling_of(self._session))

        async with place(self._service), ReplyEvents(begin, self._service.waiting) as events:
            async for event in events:
                done = event
        assert isinstance(done, Done), "a reply ends with Done"
        return done

    def _completed(self, item: Item, done: Done) -> None:
        text, usage = done.text.strip(), token_usage(done.stats)
        item.fields["content"][0]["transcript"] = text
        where: dict[str, Any] = {"item_id": item.id, "content_index": 0}
        kind = "conversation.item.input_audio_transcription"
        self._outbox.put(f"{kind}.delta", **where, delta=text)
        self._outbox.put(f"{kind}.completed", **where, transcript=text, usage=usage)

    def _failed(self, item: Item) -> None:
        error = {"type": "server_error", "code": "internal_error", "message": "the sound could not be transcribed"}
        kind = "conversation.item.input_audio_transcription.failed"
        self._outbox.put(kind, item_id=item.id, content_index=0, error=error)


def _text(asked: dict[str, Any], name: str) -> str | None:
    value = asked.get(name)
    return value if isinstance(value, str) else None
