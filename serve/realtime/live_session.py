"""One session: what its client sends is done in order, and answered.

The protocol's state belongs to the event loop. What computes runs in the session's own thread; replies are taken from
the runtime's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

import msgspec
from omniport.runtime import OmniSession, Turn
from omniport.runtime.errors import OmniportError, UsageError

from ..http.api_errors import ApiError, from_runtime
from ..service import Service
from . import client_events as sent
from .dialect import as_ga, is_beta
from .input_buffer import InputBuffer
from .item_content import read_input, read_picture
from .item_list import Item, ItemList, new_id
from .item_requests import ItemRequests
from .outbox import Outbox
from .reply_maker import ReplyMaker
from .response import Question, Reason, Response
from .session_settings import Asked, TurnDetection, cannot_update_voice, initial
from .transcripts import Transcripts
from .voice_activity import LONGEST_TURN, VoiceActivity, can_detect
from .wire_sound import WireFormat

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
Work = Callable[[], Awaitable[None]]
#: seconds of a session
LIFETIME = 3600
#: seconds after an interruption in which clients tell how much was heard; a reply whose sound was played but for
#: so many was heard to its end
_TRUNCATES, _REST = 0.25, 0.05
#: seconds of sound that a client must have sent before it commits
_LEAST_SOUND = 0.1


class RealtimeSession:
    """A conversation with one client.

    Args:
        dashscope: the client is DashScope's: what it calls pcm16 has 16 kHz.
        later: lets work be done in order with what the client's events ask for.
    """

    def __init__(
        self, service: Service, outbox: Outbox, later: Callable[[Work], None], dashscope: bool = False
    ) -> None:
        self.id = new_id("sess")
        self._service, self._outbox, self._later = service, outbox, later
        self._expires = int(time.time()) + LIFETIME
        self._conversation = new_id("conv")
        self._session = service.session.fork()
        self._thread = ThreadPoolExecutor(1, "omniport-realtime")
        self.settings = initial(service, TurnDetection() if can_detect() else None)
        self._heard_rate = 16000 if dashscope else 24000
        if dashscope:
            self.settings = msgspec.structs.replace(self.settings, input_format=WireFormat(rate=self._heard_rate))
        self._items = ItemList()
        self._response: Response | None = None
        self._maker = ReplyMaker(service, self._session, outbox, self._items, self._compute)
        self._requests = ItemRequests(service, self._session, outbox, self._items, self._compute)
        self._last: Response | None = None
        self._unheard: tuple[Item, float] | None = None  # a reply that was cut off, and how much of it was heard
        self._wants_reply = False  # after the response under way
        self._transcripts = Transcripts(service, self._session, outbox)
        self._new_buffer()
        self._activity: VoiceActivity | None = None
        self._utterance: str | None = None  # id of the item that is being said
        self._milliseconds = 0.0
        vocoder = service.session.manifest.vocoder
        self._rate = 24000 if vocoder is None else vocoder.sample_rate
        self._handlers: dict[type, Callable[[Any], Any]] = {
            sent.SessionUpdate: self._update,
            sent.AudioAppend: self._append,
            sent.AudioCommit: self._commit_asked,
            sent.AudioClear: self._clear,
            sent.ItemCreate: self._create_item,
            sent.ItemRetrieve: self._requests.retrieve,
            sent.ItemDelete: self._requests.delete,
            sent.ItemTruncate: self._truncate_item,
            sent.ImageAppend: self._show,
            sent.SessionFinish: self._finish,
            sent.Playback: self._played,
            sent.ResponseCreate: self._create_response,
            sent.ResponseCancel: self._cancel_response,
        }

    def begin(self) -> None:
        """Greet the client."""
        self._outbox.put("session.created", session=self.described())

    def described(self) -> dict[str, Any]:
        """The session object, whole."""
        return {
            "type": "realtime",
            "object": "realtime.session",
            "id": self.id,
            "model": self._service.model,
            "expires_at": self._expires,
            **self.settings.described(),
        }

    async def handle(self, event: sent.Known) -> None:
        """Do what a client's event asks for."""
        try:
            handler = self._handlers.get(type(event))
            if handler is not None:
                await handler(event)
        except ApiError as error:
            self._outbox.error(error, event.event_id)
        except OmniportError as error:
            self._outbox.error(from_runtime(error) or _internal(error), event.event_id)
        except Exception as error:  # noqa: BLE001 - whatever it is, the session goes on
            self._outbox.error(_internal(error), event.event_id)

    async def close(self) -> None:
        """End what is under way, and free the session."""
        await self._transcripts.pause()
        response = self._response
        if response is not None:
            await self._stop(response, "client_cancelled")
        await self._compute(self._session.close)
        self._thread.shutdown(wait=False)

    async def _compute(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run work in the session's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    # -- settings

    async def _update(self, event: sent.SessionUpdate) -> None:
        await self.configure(event.session)
        self._outbox.put("session.updated", session=self.described())

    async def configure(self, fields: dict[str, Any]) -> None:
        """Have other settings.

        Raises:
            ApiError: a value that cannot be; nothing has changed.
        """
        if is_beta(fields):  # or DashScope's
            self._outbox.dialect = "beta"
        asked = sent.convert(as_ga(fields, self._heard_rate), Asked, "session")
        before, after = self.settings, self.settings.updated(asked, self._service)
        if after.voice != before.voice and self._maker.spoke:
            raise cannot_update_voice()
        if (after.instructions, after.runtime_tools()) != (before.instructions, before.runtime_tools()):
            await self._instruct(after)
        if after.turn_detection != before.turn_detection:
            self._activity = None
        self.settings = after

    async def _finish(self, event: sent.SessionFinish) -> None:
        if self._response is not None and self._response.task is not None:
            await asyncio.wait({self._response.task})
            await self._response_ended()
        self._outbox.put("session.finished")

    async def _instruct(self, settings: Any) -> None:
        await self._compute(self._session.items.instruct, settings.instructions or None, settings.runtime_tools())

    # -- sound

    def _new_turn(self) -> Turn:
        return self._session.turn(**self.settings.reply_options(self._service))

    def _new_buffer(self) -> None:
        self._buffer = InputBuffer(self._new_turn, self._service.settings.limits.audio_seconds)

    async def _append(self, event: sent.AudioAppend) -> None:
        format = self.settings.input_format
        samples = format.decode(event.audio, "audio")
        if self.settings.turn_detection is not None:
            await self._listen(self.settings.turn_detection, samples, format.rate)
        elif len(samples):
            self._milliseconds += len(samples) / format.rate * 1000
            self._buffer.add(samples, format.rate)
        if self._response is None:
            await self._compute(self._buffer.advance)

    async def _listen(self, detection: TurnDetection, samples: Any, rate: int) -> None:
        if self._activity is None:
            self._activity = await self._compute(VoiceActivity, detection, self._milliseconds)
        for chunk, edge, end in await self._compute(self._activity.listen, samples, rate):
            self._milliseconds = end
            if edge == "start":
                await self._speech_started(detection, end - len(chunk) / 16)
            if self._utterance is not None:
                self._buffer.add(chunk, 16000)
                if edge == "end" or self._buffer.seconds >= LONGEST_TURN:
                    await self._speech_stopped(detection)

    async def _speech_started(self, detection: TurnDetection, milliseconds: float) -> None:
        self._utterance = new_id("item")
        self._outbox.put(
            "input_audio_buffer.speech_started",
            audio_start_ms=max(0, round(milliseconds)),
            item_id=self._utterance,
        )
        if detection.interrupt_response:
            await self._interrupt()

    async def _interrupt(self) -> None:
        """Somebody speaks: what of the last reply was not heard is not said, though the client may know better."""
        response = self._last
        if response is None:
            return
        heard = response.playback.heard
        if self._response is response:
            await self._stop(response, "turn_detected")
            self._service.measurements.interrupted("turn_detected")
        if response.message is not None and heard + _REST < response.playback.sent:
            self._unheard = response.message, heard
            asyncio.get_running_loop().call_later(_TRUNCATES, self._later, self._forget_unheard)

    async def _forget_unheard(self) -> None:
        unheard, self._unheard = self._unheard, None
        if unheard is not None:
            await self._cut(*unheard)

    async def _speech_stopped(self, detection: TurnDetection) -> None:
        assert self._utterance is not None
        id, self._utterance = self._utterance, None
        self._outbox.put("input_audio_buffer.speech_stopped", audio_end_ms=round(self._milliseconds), item_id=id)
        await self._commit(id, answer=detection.create_response)

    async def _commit_asked(self, event: sent.AudioCommit) -> None:
        if self._buffer.seconds < _LEAST_SOUND:
            message = f"the buffer holds {self._buffer.seconds * 1000:.0f} ms of sound; at least 100 ms were expected"
            raise ApiError(400, "input_audio_buffer_commit_empty", message)
        id, self._utterance = self._utterance or new_id("item"), None
        if self._activity is not None:
            await self._compute(self._activity.reset)
        await self._commit(id, answer=False)

    async def _commit(self, id: str, answer: bool) -> None:
        """The sound of the buffer becomes an item."""
        item = Item(id, {"type": "message", "role": "user", "content": [{"type": "input_audio", "transcript": None}]})
        turn, sound = None, self._buffer.sound
        await self._forget_unheard()
        if self._response is None:
            turn = await self._compute(self._buffer.take)
            item.runtime_id = turn.item_ids[0]
            if not answer:
                await self._compute(turn.keep)
        else:
            content = [{"type": "audio", "audio": sound}]
            self._buffer.clear()
            message = {"role": "user", "content": content}
            item.runtime_id = (await self._compute(self._session.items.append, message)).id
            self._wants_reply = self._wants_reply or answer
        previous = self._items.insert(item, None)
        self._outbox.put("input_audio_buffer.committed", item_id=id, previous_item_id=previous)
        self._requests.tell(item, previous)
        if self.settings.transcription is not None:
            self._transcripts.add(item, sound, self.settings.transcription)
        if answer and turn is not None:
            response = self._new_response()
            response.question = Question(item, sound, turn)
            await self._start(response)
        elif self._response is None:
            self._transcripts.resume()

    async def _clear(self, event: sent.AudioClear) -> None:
        await self._compute(self._buffer.clear)
        self._utterance = None
        if self._activity is not None:
            await self._compute(self._activity.reset)
        self._outbox.put("input_audio_buffer.cleared")

    async def _show(self, event: sent.ImageAppend) -> None:
        shown = await read_picture(event.image, self._service)
        self._buffer.show(shown, None if event.time_ms is None else event.time_ms / 1000)
        if self._response is None:
            await self._compute(self._buffer.advance)

    async def _played(self, event: sent.Playback) -> None:
        response = self._last
        if response is not None and response.message is not None and response.message.id == event.item_id:
            response.playback.played(max(0.0, event.played_ms / 1000))

    # -- items

    async def _create_item(self, event: sent.ItemCreate) -> None:
        await self._requests.create(event, self.settings.input_format)

    async def _truncate_item(self, event: sent.ItemTruncate) -> None:
        item = self._items.find(event.item_id, "item_truncate_invalid_item_id")
        if item.fields.get("role") != "assistant":
            raise ApiError(400, "invalid_value", f"{item.id} is no message of the assistant", param="item_id")
        if self._unheard is not None and self._unheard[0] is item:
            self._unheard = None
        await self._cut(item, max(0.0, event.audio_end_ms / 1000))
        self._outbox.put(
            "conversation.item.truncated",
            item_id=item.id,
            content_index=event.content_index,
            audio_end_ms=round(event.audio_end_ms),
        )

    async def _cut(self, item: Item, heard: float) -> None:
        """Forget what of a reply was not heard."""
        response = self._response
        if response is not None and response.message is item:
            await self._stop(response, "client_cancelled")
        if item.runtime_id is None:
            return
        if await self._compute(_truncate, self._session, item.runtime_id, heard):
            text = "".join(
                part.get("text", "") for part in self._session.items[item.runtime_id].content if part["type"] == "text"
            )
            item.fields["content"] = [{"type": "output_audio", "transcript": text}]

    # -- responses

    def _new_response(self, asked: dict[str, Any] | None = None) -> Response:
        asked = as_ga(asked or {})
        settings = self.settings.updated(sent.convert(asked, Asked, "response"), self._service, "response")
        apart = asked.get("conversation") == "none"
        return Response(
            self._outbox,
            self._items,
            settings,
            conversation=None if apart else self._conversation,
            metadata=asked.get("metadata"),
            rate=self._rate,
        )

    async def _create_response(self, event: sent.ResponseCreate) -> None:
        if self._response is not None:
            message = f"response {self._response.id} is under way; cancel it, or wait for response.done"
            raise ApiError(400, "conversation_already_has_active_response", message)
        response = self._new_response(event.response)
        given = (event.response or {}).get("input")
        if given is not None:
            own = response.settings.instructions
            response.messages = [{"role": "developer", "content": own}] if own else []
            format = self.settings.input_format
            response.messages += await read_input(given, self._items, format, self._service)
        await self._compute(self._buffer.suspend)
        if response.settings != self.settings:
            await self._instruct(response.settings)
        await self._start(response)

    async def _cancel_response(self, event: sent.ResponseCancel) -> None:
        response = self._response
        if response is None or event.response_id not in (None, response.id):
            raise ApiError(400, "response_cancel_not_active", "Cancellation failed: no active response found")
        await self._stop(response, "client_cancelled")

    async def _start(self, response: Response) -> None:
        await self._transcripts.pause()
        self._response = self._last = response
        response.begin()
        response.task = asyncio.ensure_future(self._maker.make(response))
        response.task.add_done_callback(lambda _: self._later(self._response_ended))

    async def _stop(self, response: Response, reason: Reason) -> None:
        """End a response now."""
        await self._maker.stop(response, reason)
        await self._response_ended()

    async def _response_ended(self) -> None:
        """The response under way has ended, if it has: tell so, and go on."""
        response = self._response
        if response is None or response.task is None or not response.task.done():
            return
        self._response = None
        if response.done is not None:
            self._service.measurements.reply(response.done)
        try:
            await self._maker.settle(response)
            if response.settings != self.settings:
                await self._instruct(self.settings)
        except Exception as error:  # noqa: BLE001 - told in the response; the session goes on
            response.error = error
        response.finish()
        wanted, self._wants_reply = self._wants_reply, False
        if wanted:
            await self._start(self._new_response())
        else:
            await self._compute(self._buffer.advance)
            self._transcripts.resume()


def _truncate(session: OmniSession, id: str, heard: float) -> bool:
    """Whether that made the item shorter; what was not spoken by this model cannot be cut, and stays."""
    with suppress(UsageError):
        return session.items.truncate(id, heard=heard)
    return False


def _internal(error: Exception) -> ApiError:
    _LOG.error("a client's event failed", exc_info=error)
    return ApiError(500, "internal_error", "internal error; the server's log tells more", kind="server_error")
