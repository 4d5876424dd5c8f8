"""What clients ask for: written down, answered, spoken."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omniport.runtime import AudioChunk, Done, Event, TextDelta
from wyoming.asr import Transcript, TranscriptChunk, TranscriptStart, TranscriptStop
from wyoming.audio import AudioChunk as SoundChunk
from wyoming.audio import AudioStart, AudioStop
from wyoming.event import Eventable
from wyoming.handle import Handled, HandledChunk, HandledStart, HandledStop

from ..http.answering import place
from ..http.transcription import instruction, sampling_of
from ..reply_events import ReplyEvents
from ..service import Service
from .history import Histories

Send = Callable[[Eventable], Awaitable[None]]
#: seconds of sound in one event
_PIECE = 0.1


class Replies:
    """Replies of one service, each in its place among all of them.

    Their methods send what they make, as it is made; one that is cancelled stops the reply.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._histories = Histories()

    async def transcribe(
        self, sound: tuple[NDArray[np.float32], int], language: str | None, hint: str | None, send: Send
    ) -> None:
        """Write down what is said."""
        content = [{"type": "audio", "audio": sound}, {"type": "text", "text": instruction(language, hint)}]
        session = self._service.session
        begin: Callable[[], Iterator[Event]] = lambda: session.reply(  # noqa: E731
            [{"role": "user", "content": content}], speak=False, thinker=sampling_of(session)
        )
        text = ""
        async for event in self._events(begin):
            if isinstance(event, TextDelta) and event.text:
                if not text:
                    await send(TranscriptStart(language=language))
                text += event.text
                await send(TranscriptChunk(event.text))
        await send(Transcript(text.strip(), language=language))
        if text:
            await send(TranscriptStop())

    async def handle(self, text: str, context: Mapping[str, Any] | None, send: Send) -> None:
        """Answer in text; a conversation goes on where the context names it."""
        named = (context or {}).get("conversation_id")
        id = named if isinstance(named, str) else None
        messages = self._histories.asked(id, text)
        told = dict(context) if context else None
        said = ""
        await send(HandledStart(context=told))
        async with AsyncExitStack() as held:
            await held.enter_async_context(place(self._service))
            session = held.enter_context(self._service.sessions.borrow(messages, []))

            def begin() -> Iterator[Event]:
                session.items.replace(messages)
                return session.turn(speak=False, seed=secrets.randbits(32)).answer(drop=False)

            async for event in await held.enter_async_context(ReplyEvents(begin, self._service.waiting)):
                self._count(event)
                if isinstance(event, TextDelta) and event.text:
                    said += event.text
                    await send(HandledChunk(event.text))
        self._histories.answered(id, messages, said)
        await send(Handled(said.strip(), context=told))
        await send(HandledStop())

    async def speak(self, texts: AsyncIterator[str], voice: str | None, send: Send) -> None:
        """Speak texts one after the other, each word for word."""
        session = self._service.session
        vocoder = session.manifest.vocoder
        rate = 24000 if vocoder is None else vocoder.sample_rate
        format = {"rate": rate, "width": 2, "channels": 1}
        begun = False
        async for text in texts:
            begin: Callable[[], Iterator[Event]] = lambda text=text: session.reply(  # type: ignore[misc]  # noqa: E731
                [], say=text, voice=self._service.voice(voice), seed=secrets.randbits(32)
            )
            async for event in self._events(begin):
                if not isinstance(event, AudioChunk):
                    continue
                if not begun:
                    begun = True
                    await send(AudioStart(**format))
                data = (np.clip(event.samples, -1, 1) * 32767).astype("<i2").tobytes()
                size = 2 * round(_PIECE * rate)
                for start in range(0, len(data), size):
                    await send(SoundChunk(**format, audio=data[start : start + size]))
        if not begun:  # nothing that can be said is silence
            await send(AudioStart(**format))
        await send(AudioStop())

    async def _events(self, begin: Callable[[], Iterator[Event]]) -> AsyncIterator[Event]:
        async with place(self._service), ReplyEvents(begin, self._service.waiting) as events:
            async for event in events:
                self._count(event)
                yield event

    def _count(self, event: Event) -> None:
        if isinstance(event, Done):
            self._service.measurements.reply(event)
