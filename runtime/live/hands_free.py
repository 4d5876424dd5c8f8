"""Hands-free turns: speech begins a turn, silence ends it, and speech during a reply interrupts the reply."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..media.audio import ResampleStream, check_level, pcm
from .dialogue import Dialogue
from .vad import CHUNK, RATE, SileroVad, SpeechGate, SpeechLimits, VoiceDetector, chunks


class HandsFree:
    """Finds turns in a stream of sound.

    Sound is resampled to 16 kHz and looked at in chunks of 32 ms. The sound of a turn is pushed as it comes, from
    ``pre_roll_ms`` before its first word to the silence that ends it; what lies between turns is not.

    ``feed`` belongs to one thread and computes there; ``close`` may be called from any.

    Args:
        dialogue: leads the conversation; it is closed with this object.
        limits: when a turn begins and ends.
        barge_in: speech during a reply cuts it off. False for a loudspeaker that the microphone hears: what comes in
            while a reply is made and, where ``dialogue`` knows, played, is not listened to.
        vad: Silero VAD if None.

    Raises:
        UsageError: no detector is installed.
    """

    def __init__(
        self,
        dialogue: Dialogue,
        *,
        limits: SpeechLimits | None = None,
        barge_in: bool = True,
        vad: VoiceDetector | None = None,
    ) -> None:
        self.dialogue = dialogue
        self.limits = SpeechLimits() if limits is None else limits
        self._vad = SileroVad() if vad is None else vad
        self._barge_in = barge_in
        self._gate = SpeechGate(self.limits)
        self._before: deque[NDArray[np.float32]] = deque(maxlen=chunks(self.limits.pre_roll_ms) + self._gate.begin)
        self._resampler: ResampleStream | None = None
        self._rest = np.zeros(0, np.float32)

    def __enter__(self) -> HandsFree:
        return self

    def __exit__(self, *arguments: object) -> None:
        self.dialogue.__exit__(*arguments)

    def feed(self, samples: NDArray[Any], sample_rate: float) -> None:
        """Take the next samples of the microphone.

        Args:
            samples: any number of them, as ``Turn.push_audio`` takes them.
            sample_rate: Hz, the same for all.

        Raises:
            MediaError: samples that cannot be used; nothing was taken. UsageError: another rate, or closed. Any error
            of a turn or of the last reply: it is over, and listening goes on with the next call.
        """
        self.dialogue.ready()
        self._listen(self._chunks(samples, sample_rate))

    def flush(self) -> None:
        """The sound has ended: answer the open turn, if there is one, without waiting for silence.

        The next ``feed`` begins another stream, which may have another rate.
        """
        self.dialogue.ready()
        if self._resampler is not None:
            self._listen(self._cut(np.append(self._resampler.finish(), np.zeros(CHUNK - 1, np.float32))))
        self._resampler, self._rest = None, np.zeros(0, np.float32)
        self._before.clear()
        self._gate.reset()
        self._vad.reset()
        self.dialogue.commit()

    def wait(self) -> None:
        """Wait for the end of the reply, not of its sound. Raises what ended it."""
        self.dialogue.wait()

    def close(self) -> None:
        """Discard the open turn, interrupt the reply, and wait for its threads. Raises what had ended it before."""
        self.dialogue.close()

    def _chunks(self, samples: NDArray[Any], sample_rate: float) -> list[NDArray[np.float32]]:
        values, rate = pcm((samples, sample_rate))
        check_level(values, rate, "this sound")
        if self._resampler is None:
            self._resampler = ResampleStream(rate, RATE)
        if rate != self._resampler.rate:
            raise UsageError(
                f"sound at {rate:g} Hz follows sound at {self._resampler.rate:g} Hz; one rate was expected: "
                "flush() ends a stream"
            )
        return self._cut(self._resampler.push(values))

    def _cut(self, samples: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Whole chunks; the rest waits for more."""
        joined = np.concatenate([self._rest, samples])
        whole = len(joined) // CHUNK
        self._rest = joined[whole * CHUNK :]
        return list(joined[: whole * CHUNK].reshape(whole, CHUNK))

    def _listen(self, heard: list[NDArray[np.float32]]) -> None:
        try:
            for chunk in heard:
                self._hear(chunk)
        except BaseException:
            self._gate.reset()
            self.dialogue.drop()
            raise

    def _hear(self, chunk: NDArray[np.float32]) -> None:
        dialogue = self.dialogue
        dialogue.time += CHUNK / RATE
        if not self._barge_in and dialogue.state == "replying":
            self._gate.reset()
            self._before.clear()
            return
        edge = self._gate.push(self._vad(chunk))
        if dialogue.turn is not None:
            dialogue.push(chunk, RATE)
            if edge == "end" or dialogue.seconds >= self.limits.max_turn_s:
                dialogue.commit()
            return
        self._before.append(chunk)
        if edge == "start":
            dialogue.begin()
            dialogue.push(np.concatenate(self._before), RATE)
            self._before.clear()
