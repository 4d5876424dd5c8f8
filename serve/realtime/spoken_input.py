"""What a client says and shows: cut into turns by silence, or by hand."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..http.api_errors import ApiError
from ..service import Service
from .input_buffer import InputBuffer
from .item_content import read_picture
from .item_list import new_id
from .responses.reply_maker import Compute
from .session_settings import SessionSettings, TurnDetection
from .voice_activity import LONGEST_TURN, VoiceActivity
from .wire import client_events as sent
from .wire.outbox import Outbox
from .wire.wire_sound import WireFormat

Floats = NDArray[np.float32]
#: seconds of sound that a client must have sent before it commits
_LEAST_SOUND = 0.1
#: seconds of sound that go into the turn at once: a change of threads costs more than a client's 20 to 40 ms
_BLOCK = 0.2


class Listener(Protocol):
    """Whom it is told that somebody speaks."""

    @property
    def settings(self) -> SessionSettings:
        """The session's."""

    @property
    def replying(self) -> bool:
        """A response is made."""

    @property
    def awaits_speech(self) -> bool:
        """A response was played to its end, and nobody has spoken since."""

    async def speech_started(self) -> None:
        """Somebody speaks, and may interrupt."""

    async def complete(self, id: str, *, answer: bool) -> None:
        """The buffer holds a turn, which shall be the item of that id."""


class SpokenInput:
    """Sound and frames of one session.

    Args:
        buffer: that they go into.
        listener: told of turns.

    Attributes:
        lag: seconds that the last sound waited before it was looked at.
    """

    def __init__(
        self, service: Service, outbox: Outbox, buffer: InputBuffer, compute: Compute, listener: Listener
    ) -> None:
        self._service, self._outbox, self._buffer = service, outbox, buffer
        self._compute, self._listener = compute, listener
        self.lag = 0.0
        self._activity: VoiceActivity | None = None
        self._utterance: str | None = None  # id of the item that is being said
        self._milliseconds = 0.0
        self._silence: list[Floats] = []  # since the last response was played

    def detect_anew(self) -> None:
        """The settings of turn detection are others."""
        self._activity, self._silence = None, []

    async def append(self, event: sent.AudioAppend) -> None:
        """The next piece of sound."""
        settings = self._listener.settings
        format = settings.input_format
        samples = format.decode(event.audio, "audio")
        if settings.turn_detection is not None:
            await self._listen(settings.turn_detection, samples, format)
        elif len(samples):
            self._milliseconds += len(samples) / format.rate * 1000
            self._buffer.add(samples, format.rate)
        if self._buffer.waiting >= _BLOCK:
            await self._advance()

    async def commit(self, event: sent.AudioCommit) -> None:
        """A turn ends here, by hand."""
        if self._buffer.seconds < _LEAST_SOUND:
            message = f"the buffer holds {self._buffer.seconds * 1000:.0f} ms of sound; at least 100 ms were expected"
            raise ApiError(400, "input_audio_buffer_commit_empty", message)
        id, self._utterance = self._utterance or new_id("item"), None
        await self._forget_sound()
        await self._listener.complete(id, answer=False)

    async def clear(self, event: sent.AudioClear) -> None:
        """Forget what is not committed."""
        await self._compute(self._buffer.clear)
        self._utterance = None
        await self._forget_sound()
        self._outbox.put("input_audio_buffer.cleared")

    async def show(self, event: sent.ImageAppend) -> None:
        """A picture beside the sound."""
        shown = await read_picture(event.image, self._service)
        self._buffer.show(shown, None if event.time_ms is None else event.time_ms / 1000, event.image)
        await self._advance()

    async def _advance(self) -> None:
        if not self._listener.replying:
            await self._compute(self._buffer.advance)

    async def _forget_sound(self) -> None:
        self._silence = []
        if self._activity is not None:
            await self._compute(self._activity.reset)

    async def _listen(self, detection: TurnDetection, samples: Floats, format: WireFormat) -> None:
        if self._activity is None:
            self._activity = await self._compute(VoiceActivity, detection, self._milliseconds)
        for chunk, edge, end in await self._compute(self._activity.listen, samples, format.rate):
            self._milliseconds = end
            if edge == "start":
                await self._speech_started(end - len(chunk) / 16)
            if self._utterance is not None:
                self._buffer.add(chunk, 16000)
                if edge == "end" or self._buffer.seconds >= LONGEST_TURN:
                    await self._speech_stopped(detection)
            elif detection.idle_timeout_ms is not None:
                await self._wait(chunk, detection.idle_timeout_ms)

    async def _speech_started(self, milliseconds: float) -> None:
        self._utterance, self._silence = new_id("item"), []
        self._tell("speech_started", self._utterance, audio_start_ms=max(0, round(milliseconds)))
        await self._listener.speech_started()

    async def _speech_stopped(self, detection: TurnDetection) -> None:
        assert self._utterance is not None
        id, self._utterance = self._utterance, None
        self._service.measurements.speech_ended(detection.silence_ms / 1000 + self.lag)
        self._tell("speech_stopped", id, audio_end_ms=round(self._milliseconds))
        await self._listener.complete(id, answer=detection.create_response)

    async def _wait(self, chunk: Floats, timeout: float) -> None:
        """Nobody speaks. After a time of that, which is measured by the sound, the model does.

        What came meanwhile is a turn: the model may hear in it what was taken for silence.
        """
        if not self._listener.awaits_speech:
            self._silence = []
            return
        self._silence.append(chunk)
        waited = sum(map(len, self._silence)) / 16
        if waited < timeout:
            return
        silence, id = self._silence, new_id("item")
        await self._forget_sound()
        start = max(0, round(self._milliseconds - waited))
        self._tell("timeout_triggered", id, audio_start_ms=start, audio_end_ms=round(self._milliseconds))
        self._buffer.add(np.concatenate(silence), 16000)
        await self._listener.complete(id, answer=True)

    def _tell(self, what: str, id: str, **times: Any) -> None:
        self._outbox.put(f"input_audio_buffer.{what}", **times, item_id=id)
