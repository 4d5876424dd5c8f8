"""One session: what its client sends is done in order, and answered.

The protocol's state belongs to the event loop. What computes runs in the session's own thread; replies are taken from
the runtime's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec
from omniport.runtime import OmniSession, Turn
from omniport.runtime.errors import OmniportError

from ..http.api_errors import ApiError, from_runtime
from ..replicas.replayed_items import replay
from ..replicas.saved_session import Head
from ..service import Service
from .given_content import Spoken
from .input_buffer import InputBuffer
from .interruption import Interruption
from .item_content import read_input
from .item_list import Item, ItemList, new_id
from .item_requests import ItemRequests
from .responses.reply_maker import ReplyMaker
from .responses.response import Question, Reason, Response
from .session_settings import Asked, TurnDetection, cannot_update_voice, initial
from .spoken_input import SpokenInput
from .transcripts import Sound, Transcripts
from .voice_activity import can_detect
from .wire import client_events as sent
from .wire.dialect import as_ga, is_beta
from .wire.inbox import Work
from .wire.outbox import Outbox
from .wire.wire_sound import WireFormat

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
#: seconds of a session
LIFETIME = 3600


class RealtimeSession:
    """A conversation with one client.

    Args:
        later: lets work be done in order with what the client's events ask for.
        dashscope: the client is DashScope's: what it calls pcm16 has 16 kHz.

    Attributes:
        resumable: told to the client, if the session may be taken up. items: of the conversation.
    """

    def __init__(
        self, service: Service, outbox: Outbox, later: Callable[[Work], None], dashscope: bool = False
    ) -> None:
        self.id = new_id("sess")
        self.resumable: dict[str, Any] = {}
        self._service, self._outbox, self._later = service, outbox, later
        self._expires = int(time.time()) + LIFETIME
        self._conversation = new_id("conv")
        self._session = service.session.fork()
        self._thread = ThreadPoolExecutor(1, "omniport-realtime")
        self.settings = initial(service, TurnDetection() if can_detect() else None)
        self._heard_rate = 16000 if dashscope else 24000
        if dashscope:
            self.settings = msgspec.structs.replace(self.settings, input_format=WireFormat(rate=self._heard_rate))
        self.items = self._items = ItemList()
        self._response: Response | None = None
        self._maker = ReplyMaker(service, self._session, outbox, self._items, self._compute)
        self._requests = ItemRequests(service, self._session, outbox, self._items, self._compute)
        self._last: Response | None = None
        self._wants_reply = False  # after the response under way
        self._transcripts = Transcripts(service, self._session, outbox)
        self._buffer = InputBuffer(self._new_turn, service.settings.limits.audio_seconds)
        self._input = SpokenInput(service, outbox, self._buffer, self._compute, self)
        self._interruption = Interruption(self._session, outbox, self._compute, later)
        vocoder = service.session.manifest.vocoder
        self._rate = 24000 if vocoder is None else vocoder.sample_rate
        self._handlers: dict[type, Callable[[Any], Any]] = {
            sent.SessionUpdate: self._update,
            sent.AudioAppend: self._input.append,
            sent.AudioCommit: self._input.commit,
            sent.AudioClear: self._input.clear,
            sent.ItemCreate: self._create_item,
            sent.ItemRetrieve: self._requests.retrieve,
            sent.ItemDelete: self._requests.delete,
            sent.ItemTruncate: self._truncate_item,
            sent.ImageAppend: self._input.show,
            sent.SessionFinish: self._finish,
            sent.Playback: self._played,
            sent.ResponseCreate: self._create_response,
            sent.ResponseCancel: self._cancel_response,
        }

    @property
    def conversation(self) -> OmniSession:
        """The runtime's session."""
        return self._session

    @property
    def has_items(self) -> bool:
        """Something was said."""
        return self._items.last_id is not None

    def begin(self, resumed: bool = False) -> None:
        """Greet the client."""
        session = self.described()
        session["omniport"] |= {**self.resumable, "resumed": resumed} if self.resumable else {}
        self._outbox.put("session.created", session=session)

    @property
    def head(self) -> Head:
        """What is saved of it beside its items."""
        return Head(
            id=self.id,
            conversation=self._conversation,
            expires=self._expires,
            dialect=self._outbox.dialect,
            heard_rate=self._heard_rate,
            settings=self.settings,
            spoke=self._maker.spoke,
            response=None if self._response is None else self._response.id,
        )

    async def restore(self, head: Head, items: list[Item]) -> list[Item]:
        """Be the session that was saved; the items that were not complete, which are lost.

        Raises:
            ApiError, OmniportError: that cannot be.
        """
        self.id, self._conversation, self._expires = head.id, head.conversation, head.expires
        self.settings, self._heard_rate, self._maker.spoke = head.settings, head.heard_rate, head.spoke
        self._outbox.dialect, self._outbox.extras = head.dialect, head.settings.extras
        await self._instruct(self.settings)
        complete = [item for item in items if item.status != "in_progress"]
        await replay(complete, self._session, self._buffer, self._compute, self._service)
        for item in complete:
            self._items.insert(item, None)
            if isinstance(item.given, Spoken) and item.fields["content"][0]["transcript"] is None:
                self._transcribe(item, (item.given.samples, item.given.rate))
        return [item for item in items if item.status == "in_progress"]

    def tell_lost(self, response: str | None, items: list[Item]) -> None:
        """This response and its items were lost with another replica."""
        for item in items:
            self._outbox.put("conversation.item.deleted", item_id=item.id)
        if response is not None:
            lost = self._new_response()
            lost.id = response
            message = "what made the response was lost; ask again"
            lost.error = ApiError(503, "replica_lost", message, kind="server_error")
            lost.finish()
        self._transcripts.resume()

    def described(self) -> dict[str, Any]:
        """The session object, whole."""
        return {
            "type": "realtime",
            "object": "realtime.session",
            "id": self.id,
            "model": self._service.model,
            "expires_at": self._expires,
            **self.settings.described(),
            "omniport": {"events": self.settings.extras},
        }

    async def handle(self, event: sent.Known, waited: float = 0.0) -> None:
        """Do what a client's event asks for, which has waited so many seconds."""
        if isinstance(event, sent.AudioAppend):
            self._input.lag = waited
            self._service.measurements.lagged(waited)
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
            self._service.measurements.interrupted("client_left")
        self._measure_last()
        await self._compute(self._session.close)
        self._thread.shutdown(wait=False)

    def abandon(self) -> None:
        """Free the session when there is no event loop any more."""
        self._session.close()
        self._thread.shutdown(wait=False)

    async def client_lost(self) -> None:
        """Nobody listens: the reply under way stops, and what was not heard of the last one is not said."""
        response = self._last
        if response is None:
            return
        heard = response.playback.heard
        if self._response is response:
            await self._stop(response, "client_cancelled")
            self._service.measurements.interrupted("client_lost")
        item = response.message
        if item is not None and self._interruption.estimate(response, heard):
            await self._interruption.apply()
            self._tell_truncated(item, 0, heard * 1000)

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
            self._input.detect_anew()
        self.settings, self._outbox.extras = after, after.extras

    async def _finish(self, event: sent.SessionFinish) -> None:
        if self._response is not None and self._response.task is not None:
            await asyncio.wait({self._response.task})
            await self._response_ended()
        self._outbox.put("session.finished")

    async def _instruct(self, settings: Any) -> None:
        await self._compute(self._session.items.instruct, settings.instructions or None, settings.runtime_tools())

    # -- what the user says

    def _new_turn(self) -> Turn:
        return self._session.turn(**self.settings.reply_options(self._service))

    @property
    def replying(self) -> bool:
        """A response is made."""
        return self._response is not None

    @property
    def awaits_speech(self) -> bool:
        """A response was played to its end."""
        return self._response is None and self._last is not None and self._last.playback.over

    async def speech_started(self) -> None:
        """Somebody speaks: what of the last reply was not heard is not said, though the client may know better."""
        detection, response = self.settings.turn_detection, self._last
        if detection is None or not detection.interrupt_response or response is None:
            return
        heard = response.playback.heard
        stopped = self._response is response
        if stopped:
            await self._stop(response, "turn_detected")
        if self._interruption.estimate(response, heard) or stopped:
            self._service.measurements.interrupted("turn_detected")

    async def complete(self, id: str, *, answer: bool) -> None:
        """The sound of the buffer becomes an item."""
        item = Item(id, {"type": "message", "role": "user", "content": [{"type": "input_audio", "transcript": None}]})
        turn, sound = None, self._buffer.sound
        if self._service.store is not None:
            item.given = Spoken.of(*sound, self._buffer.pictures)
        await self._interruption.apply()
        if self._response is None:
            turn = await self._compute(self._buffer.take)
            item.runtime_id = turn.item_ids[0]
            if not answer:
                await self._compute(turn.keep)
        else:
            message = self._buffer.message()
            self._buffer.clear()
            item.runtime_id = (await self._compute(self._session.items.append, message)).id
            self._wants_reply = self._wants_reply or answer
        previous = self._items.insert(item, None)
        self._outbox.put("input_audio_buffer.committed", item_id=id, previous_item_id=previous)
        self._requests.tell(item, previous)
        self._transcribe(item, sound)
        if answer and turn is not None:
            response = self._new_response()
            response.question = Question(item, sound, turn)
            await self._start(response)
        elif self._response is None:
            self._transcripts.resume()

    def _transcribe(self, item: Item, sound: Sound) -> None:
        if self.settings.transcription is not None:
            self._transcripts.add(item, sound, self.settings.transcription)

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
        heard = max(0.0, event.audio_end_ms / 1000)
        response = self._last
        if response is not None and response.message is item:
            response.playback.played(heard)
            if self._response is response:
                await self._stop(response, "client_cancelled")
                self._service.measurements.interrupted("client_cancelled")
        await self._interruption.truncate(item, heard)
        self._tell_truncated(item, event.content_index, event.audio_end_ms)

    def _tell_truncated(self, item: Item, index: int, milliseconds: float) -> None:
        where: dict[str, Any] = {"item_id": item.id, "content_index": index}
        self._outbox.put("conversation.item.truncated", **where, audio_end_ms=round(milliseconds))

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
        self._service.measurements.interrupted("client_cancelled")

    async def _start(self, response: Response) -> None:
        await self._transcripts.pause()
        self._measure_last()
        self._response = self._last = response
        response.begin()
        response.task = asyncio.ensure_future(self._maker.make(response))
        response.task.add_done_callback(lambda _: self._later(self._response_ended))

    def _measure_last(self) -> None:
        """Nobody tells any more how much of the last reply was heard."""
        if self._last is not None and self._last.playback.sent:
            playback, self._last = self._last.playback, None
            self._service.measurements.heard(playback.heard / playback.sent)

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


def _internal(error: Exception) -> ApiError:
    _LOG.error("a client's event failed", exc_info=error)
    return ApiError(500, "internal_error", "internal error; the server's log tells more", kind="server_error")
