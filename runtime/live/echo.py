"""Echo cancellation: takes what a loudspeaker plays out of what the microphone hears.

The canceller is WebRTC's AEC3, as PyPI's ``pywebrtc-audio`` ships it (the extra ``live``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..media.audio import ResampleStream, check_level, pcm
from .vad import require_live

Samples = NDArray[np.float32]

#: Hz that AEC3 works at here and its sound has: what the detector and the model hear
RATE = 16_000
#: AEC3's frame, 10 ms
FRAME = RATE // 100
#: samples of the loudspeaker that may wait longer than they have to before they are skipped in silence, and at all
_SLACK, _MOST = RATE // 50, RATE
#: frames after which it is looked at how long the loudspeaker's samples have waited at least: 5 s
_WATCHED = 500
#: power of a sample (-70 dBFS) below which a loudspeaker's frame is silent, and frames for which its room rings on
_SILENT, _RINGING = 1e-7, 60
#: what AEC3 leaves of an echo lies this far below what the microphone heard, as a ratio of powers (-15 dB)
_RESIDUE = 10**-1.5
#: share of a frame in the running power that is compared with it: 50 ms
_SMOOTH = 0.2


class EchoCanceller:
    """Cleans a microphone that hears a loudspeaker.

    ``clean`` is called with what was recorded and what was given to the loudspeaker meanwhile. The loudspeaker's
    device may ask for its samples in pieces of any size and keep them for a while: how long they take to the
    microphone, up to about half a second, is found by the canceller. Both devices' samples are to be complete, silence
    included, so that their counts keep the time.

    What is left of an echo is silenced while the loudspeaker plays, and 0.6 s longer: frames of which less than a
    thirtieth of the power remains.

    All calls belong to one thread.

    Args:
        recorded_rate: of the microphone, Hz. played_rate: of the loudspeaker, Hz.
        delay_ms: from a sample that is given to the loudspeaker to the call that hands over its echo, where it is
            known: the latencies that both devices report. The canceller begins its search there.

    Raises:
        UsageError: ``pywebrtc-audio`` is not installed, or the delay makes no sense. MediaError: a rate that cannot be.
    """

    def __init__(self, recorded_rate: float, played_rate: float = 24_000, *, delay_ms: float = 0) -> None:
        if not 0 <= delay_ms <= 10_000:
            raise UsageError(f"delay_ms is {delay_ms!r}; a number from 0 to 10000 was expected")
        self._canceller = require_live("pywebrtc_audio", "echo cancellation").AudioProcessor(
            sample_rate=RATE, echo_cancellation=True, stream_delay_ms=round(delay_ms)
        )
        self._recorded = _Line("recorded", recorded_rate)
        self._played = _Line("played", played_rate)
        self._watched, self._least = 0, _MOST
        self._heard = self._left = 0.0
        self._rings = 0

    def clean(self, recorded: NDArray[Any], played: NDArray[Any]) -> Samples:
        """The next samples of the microphone, without the loudspeaker's.

        Args:
            recorded: any number of them, as ``HandsFree.feed`` takes them. played: what the loudspeaker was given since
                the last call; none if it is off.

        Returns:
            float32 [n] at 16 kHz, n a multiple of 160: whole frames of 10 ms; what is left waits for the next call.

        Raises:
            MediaError: samples that cannot be used; nothing was taken.
        """
        self._recorded.check(recorded)
        self._played.check(played)
        self._recorded.push(recorded)
        self._played.push(played)
        count = len(self._recorded.waiting) // FRAME * FRAME
        far = self._played.take(min(count, len(self._played.waiting)))
        if len(far) < count:  # it is late by as much from now on, and still before its echo
            far = np.pad(far, (0, count - len(far)))
            if self._rings:  # a slow clock: one gap in a minute or two, and not one in every second
                self._played.waiting = np.zeros(FRAME, np.float32)
        near = self._recorded.take(count)
        self._keep_time(count)
        return self._silence(near, self._canceller.process(near, far), far) if count else near

    def _keep_time(self, count: int) -> None:
        """Devices' clocks differ. Samples that wait for no reason would come after their echo one day: skip them."""
        waiting = self._played.waiting
        self._watched += count // FRAME
        self._least = min(self._least, len(waiting))
        if len(waiting) > _MOST:
            self._played.take(len(waiting) - _MOST)
        elif self._watched >= _WATCHED and self._least > _SLACK and not np.square(waiting).max() > _SILENT:
            self._played.take(self._least)
        elif self._watched < _WATCHED:
            return
        self._watched, self._least = 0, _MOST

    def _silence(self, near: Samples, cleaned: Samples, far: Samples) -> Samples:
        """Zero in the frames that hold but what is left of an echo."""
        frames = cleaned.reshape(-1, FRAME)
        powers = [np.square(sound.reshape(-1, FRAME)).mean(axis=1).tolist() for sound in (near, frames, far)]
        for frame, heard, left, played in zip(frames, *powers, strict=True):
            self._rings = _RINGING if played > _SILENT else max(0, self._rings - 1)
            self._heard += _SMOOTH * (heard - self._heard)
            self._left += _SMOOTH * (left - self._left)
            if self._rings and self._left < _RESIDUE * self._heard:
                frame[:] = 0
        return cleaned


class _Line:
    """One device's samples at 16 kHz, until they are used."""

    def __init__(self, name: str, rate: float) -> None:
        self.waiting = np.zeros(0, np.float32)
        self._name, self._rate = name, rate
        self.check(self.waiting)
        self._resampler = ResampleStream(rate, RATE)

    def check(self, samples: NDArray[Any]) -> None:
        values, rate = pcm((samples, self._rate))
        check_level(values, rate, f"sound that was {self._name}")

    def push(self, samples: NDArray[Any]) -> None:
        self.waiting = np.concatenate([self.waiting, self._resampler.push(pcm((samples, self._rate))[0])])

    def take(self, count: int) -> Samples:
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        return taken
