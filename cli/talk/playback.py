"""Interfaces of microphone and loudspeaker, and WAV files that stand in for them in real time."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from ..wav import WavWriter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Samples = NDArray[np.float32]

#: seconds of sound that a file's microphone gives at a time, as a device does
BLOCK = 0.032

Clock = Callable[[], float]


class Microphone(Protocol):
    """Gives mono float32 sound."""

    sample_rate: float

    def blocks(self) -> Iterator[Samples]:
        """Sound as it comes, until the end. An empty block says that there is none for the moment."""

    def stop(self) -> None:
        """Let ``blocks`` end; from any thread."""


class Loudspeaker(Protocol):
    """Plays mono float32 sound. All methods may be called from any thread."""

    def start(self) -> None:
        """The microphone listens from now on."""

    def begin(self) -> None:
        """What is played from now on is another reply; what is left of the one before is dropped."""

    def play(self, samples: Samples) -> None:
        """Play after what is being played; nothing after ``stop`` and before the next ``begin``."""

    def stop(self) -> None:
        """Fall silent now."""

    def heard(self) -> float:
        """Seconds of the reply that were played."""

    def drain(self) -> None:
        """Wait until everything is played."""


class Playback:
    """Samples that wait to be played, and how many of the reply were."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[Samples] = deque()
        self._open = False
        self._played = 0

    @property
    def played(self) -> int:
        """Samples of the reply that were taken."""
        with self._lock:
            return self._played

    @property
    def waiting(self) -> int:
        """Samples that were not taken yet."""
        with self._lock:
            return sum(len(samples) for samples in self._waiting)

    def begin(self) -> None:
        with self._lock:
            self._waiting.clear()
            self._open, self._played = True, 0

    def play(self, samples: Samples) -> None:
        with self._lock:
            if self._open and len(samples):
                self._waiting.append(samples)

    def stop(self) -> None:
        with self._lock:
            self._waiting.clear()
            self._open = False

    def take(self, count: int) -> Samples:
        """The next ``count`` samples; silence where there are none."""
        import numpy as np

        out = np.zeros(count, np.float32)
        done = 0
        with self._lock:
            while self._waiting and done < count:
                first = self._waiting[0]
                part = first[: count - done]
                out[done : done + len(part)] = part
                done += len(part)
                if len(part) == len(first):
                    self._waiting.popleft()
                else:
                    self._waiting[0] = first[len(part) :]
            self._played += done
        return out


class WavMicrophone:
    """Plays a recording in real time.

    Args:
        samples: float32 [n]. sample_rate: theirs, Hz.
    """

    def __init__(self, samples: Samples, sample_rate: float, clock: Clock = time.perf_counter) -> None:
        self.sample_rate = sample_rate
        self._samples = samples
        self._clock = clock
        self._stopped = threading.Event()

    def blocks(self) -> Iterator[Samples]:
        """As ``Microphone.blocks``: a block comes when its last sample would have been recorded."""
        begun, size = self._clock(), round(BLOCK * self.sample_rate)
        for start in range(0, len(self._samples), size):
            block = self._samples[start : start + size]
            due = begun + (start + len(block)) / self.sample_rate
            if self._stopped.wait(max(0.0, due - self._clock())):
                return
            yield block

    def stop(self) -> None:
        self._stopped.set()


class WavLoudspeaker:
    """Writes what would have been played, at the moment at which it would have been played; gaps are silence.

    The file's time begins with ``start``; it appears under its name when the ``with`` block ends well.

    Raises:
        UsageError: the file cannot be written.
    """

    def __init__(self, path: Path, sample_rate: int, clock: Clock = time.perf_counter) -> None:
        self._writer = WavWriter(path, sample_rate)
        self._playback = Playback()
        self._clock = clock
        self._lock = threading.Lock()
        self._begun = clock()

    def __enter__(self) -> WavLoudspeaker:
        self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)

    def start(self) -> None:
        self._begun = self._clock()

    def begin(self) -> None:
        self._advance()
        self._playback.begin()

    def play(self, samples: Samples) -> None:
        self._advance()
        self._playback.play(samples)

    def stop(self) -> None:
        self._advance()
        self._playback.stop()

    def heard(self) -> float:
        self._advance()
        return self._playback.played / self._writer.sample_rate

    def drain(self) -> None:
        """As ``Loudspeaker.drain``; nobody listens, so there is nothing to wait for."""
        self._advance()
        with self._lock:
            self._writer.write(self._playback.take(self._playback.waiting))

    def _advance(self) -> None:
        """Play up to this moment."""
        with self._lock:
            due = round((self._clock() - self._begun) * self._writer.sample_rate) - self._writer.samples
            if due > 0:
                self._writer.write(self._playback.take(due))
