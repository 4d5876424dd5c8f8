"""One client: its events are taken as they come, what they ask for is done one after the other."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import partial

from wyoming.asr import Transcribe
from wyoming.error import Error
from wyoming.event import Event, Eventable, async_write_event
from wyoming.info import Describe
from wyoming.ping import Ping, Pong
from wyoming.tts import SynthesizeStopped

from ..http.api_errors import ApiError, invalid, not_ready, told_late
from ..service import Service
from .described import described
from .event_reader import NoEvent, read_event
from .replies import Replies
from .sentences import Sentences
from .spoken_request import Recording

_LOG = logging.getLogger(__name__)
#: requests that wait at most
_REQUESTS = 4
#: what the log and the measurements call a request whose client has left
_CLIENT_LEFT = 499


class ClientLeft(Exception):
    """Nothing can be sent any more. No ``OSError``: those that the work itself raises are faults, and are told."""


class Client:
    """A connection.

    Attributes:
        busy: something is done that it has asked for.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, service: Service, replies: Replies
    ) -> None:
        self._reader, self._writer = reader, writer
        self._service, self._replies = service, replies
        self._recording: Recording | None = None
        self._asked = Transcribe()
        self._sentences = Sentences()
        self._texts: asyncio.Queue[str | None] | None = None  # of a text that comes in pieces
        self._requests: list[asyncio.Task[None]] = []
        self._writing = asyncio.Lock()
        self._handlers: dict[str, Callable[[Event], Awaitable[None]]] = {
            Describe().event().type: self._describe,
            "ping": self._ping,
            "transcribe": self._transcribe,
            "audio-start": self._start_recording,
            "audio-chunk": self._record,
            "audio-stop": self._stop_recording,
            "transcript": self._handle,
            "synthesize": self._synthesize,
            "synthesize-start": self._start_text,
            "synthesize-chunk": self._add_text,
            "synthesize-stop": self._stop_text,
        }

    @property
    def busy(self) -> bool:
        return any(not request.done() for request in self._requests)

    async def run(self) -> None:
        """Until the client leaves: then nothing is made for it any more."""
        try:
            while (event := await self._next()) is not None:
                handler = self._handlers.get(event.type)
                if handler is not None:  # others are none of ours
                    await self._guarded(partial(handler, event))
        except NoEvent as error:
            await self._tell(invalid(str(error)))
        finally:
            if self.busy:
                self._service.measurements.interrupted("client_left")
            for request in self._requests:
                request.cancel()
            await asyncio.gather(*self._requests, return_exceptions=True)

    async def _next(self) -> Event | None:
        try:
            return await read_event(self._reader, self._service.settings.limits.upload_seconds)
        except ConnectionError:
            return None  # it has left without a goodbye

    async def send(self, told: Eventable) -> None:
        """Send an event, once there is room.

        Raises:
            ClientLeft: it has left, or takes nothing.
        """
        writing = async_write_event(told.event(), self._writer)
        async with self._writing:
            try:
                await asyncio.wait_for(writing, self._service.settings.limits.unread_seconds)
            except (OSError, asyncio.TimeoutError) as error:
                raise ClientLeft from error

    async def _guarded(self, work: Callable[[], Awaitable[None]]) -> int:
        """An error is told, and the client goes on; an HTTP status."""
        try:
            await work()
        except ClientLeft:
            self._writer.close()
            return _CLIENT_LEFT
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told
            told = error if isinstance(error, ApiError) else told_late(error)
            await self._tell(told)
            return told.status
        return 200

    async def _tell(self, error: ApiError) -> None:
        try:
            await self.send(Error(str(error), error.code))
        except ClientLeft:
            self._writer.close()

    def _begin(self, route: str, work: Callable[[], Awaitable[None]]) -> None:
        """Do this when what was asked for before is done."""
        self._requests = [request for request in self._requests if not request.done()]
        if len(self._requests) >= _REQUESTS:
            raise ApiError(429, "session_limit_reached", "as many requests of this connection wait as may")
        if self._service.state != "ready":
            raise not_ready(self._service.state)
        self._requests.append(asyncio.ensure_future(self._request(route, work, self._requests[-1:])))

    async def _request(self, route: str, work: Callable[[], Awaitable[None]], before: list[asyncio.Task[None]]) -> None:
        status = _CLIENT_LEFT
        try:
            if before:
                await asyncio.wait(before)
            status = await self._guarded(work)
        finally:
            self._service.measurements.request(f"wyoming/{route}", status)
            _LOG.info("Wyoming %s %d", route, status)

    async def _describe(self, event: Event) -> None:
        await self.send(described(self._service))

    async def _ping(self, event: Event) -> None:
        await self.send(Pong(Ping.from_event(event).text))

    # -- hearing

    async def _transcribe(self, event: Event) -> None:
        self._asked = Transcribe.from_event(event)

    async def _start_recording(self, event: Event) -> None:
        self._recording = Recording(self._service.settings.limits.audio_seconds)

    async def _record(self, event: Event) -> None:
        if self._recording is not None:
            try:
                self._recording.add(event.data, event.payload or b"")
            except ApiError:
                self._recording = None  # told once, and what follows of it is ignored
                raise

    async def _stop_recording(self, event: Event) -> None:
        recording, self._recording = self._recording, None
        asked, self._asked = self._asked, Transcribe()
        if recording is not None:
            language = asked.language if isinstance(asked.language, str) else None
            sound = recording.take()
            self._begin("asr", lambda: self._replies.transcribe(sound, language, _hint(asked), self.send))

    # -- answering

    async def _handle(self, event: Event) -> None:
        text, context = event.data.get("text"), event.data.get("context")
        if not isinstance(text, str) or not text.strip():
            raise invalid("there is no text to answer", "text")
        known = context if isinstance(context, dict) else None
        self._begin("handle", lambda: self._replies.handle(text, known, self.send))

    # -- speaking

    async def _synthesize(self, event: Event) -> None:
        if self._texts is not None:
            return  # the whole of a text that came in pieces, for servers that do not take those
        sentences = Sentences()
        parts = sentences.add(event.data.get("text")) + sentences.finish()

        async def texts() -> AsyncIterator[str]:
            for part in parts:
                yield part

        self._begin("tts", lambda: self._speak(texts(), _voice(event)))

    async def _start_text(self, event: Event) -> None:
        await self._stop_text(event)
        queue: asyncio.Queue[str | None] = asyncio.Queue()  # bounded by the length of the text

        async def texts() -> AsyncIterator[str]:
            while (text := await queue.get()) is not None:
                yield text

        async def speak() -> None:
            await self._speak(texts(), _voice(event))
            await self.send(SynthesizeStopped())

        self._begin("tts", speak)
        self._texts, self._sentences = queue, Sentences()

    async def _add_text(self, event: Event) -> None:
        if self._texts is not None:
            for text in self._sentences.add(event.data.get("text")):
                self._texts.put_nowait(text)

    async def _stop_text(self, event: Event) -> None:
        queue, self._texts = self._texts, None
        if queue is not None:
            for text in [*self._sentences.finish(), None]:
                queue.put_nowait(text)

    async def _speak(self, texts: AsyncIterator[str], voice: str | None) -> None:
        async with aclosing(texts):  # type: ignore[type-var]
            await self._replies.speak(texts, voice, self.send)


def _voice(event: Event) -> str | None:
    voice = event.data.get("voice")
    name = voice.get("name") if isinstance(voice, dict) else None
    return name if isinstance(name, str) else None


def _hint(asked: Transcribe) -> str | None:
    """Words that may occur."""
    given = [*(asked.transcript_names or []), *(asked.transcript_terms or [])]
    return ", ".join(word for word in given[:100] if isinstance(word, str)) or None
