"""Sound that comes in chunks."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray
from omniport.runtime.media.audio import ResampleStream

from ..http.api_errors import invalid
from ..media.medium import RATE

Floats = NDArray[np.float32]
#: bytes of a sample -> its type, and what it is at zero and at the loudest
_TYPES = {1: ("u1", 128, 128), 2: ("<i2", 0, 1 << 15), 4: ("<i4", 0, 1 << 31)}


class SoundFormat(msgspec.Struct, frozen=True):
    """As events name it."""

    rate: Annotated[int, Meta(ge=8000, le=48000)]
    width: int
    channels: Annotated[int, Meta(ge=1, le=2)]


class Recording:
    """What a client records, at 16 kHz.

    Args:
        seconds: at most.
    """

    def __init__(self, seconds: float) -> None:
        self._most = seconds
        self._pieces: list[Floats] = []
        self._seconds = 0.0
        self._resampler: ResampleStream | None = None

    def add(self, data: dict[str, Any], payload: bytes) -> None:
        """A chunk.

        Raises:
            ApiError: a format that is not taken, or too much.
        """
        try:
            format = msgspec.convert({name: data.get(name) for name in ("rate", "width", "channels")}, SoundFormat)
        except msgspec.ValidationError as error:
            raise invalid(f"the format of the sound: {error}") from error
        if format.width not in _TYPES:
            raise invalid(f"the sound has {format.width} bytes a sample; 1, 2 or 4 were expected")
        kind, zero, loudest = _TYPES[format.width]
        if len(payload) % (format.width * format.channels):
            raise invalid("the sound ends in the middle of a sample")
        values = np.frombuffer(payload, kind).reshape(-1, format.channels).astype(np.float32)
        self._seconds += len(values) / format.rate
        if self._seconds > self._most:
            raise invalid(f"the recording is longer than {self._most:g} s")
        if self._resampler is None or self._resampler.rate != format.rate:
            self._end()
            self._resampler = ResampleStream(format.rate, RATE)
        self._pieces.append(self._resampler.push((values.mean(1) - zero) / np.float32(loudest)))

    def take(self) -> tuple[Floats, int]:
        """All of it, and its rate."""
        self._end()
        return np.concatenate([*self._pieces, np.zeros(0, np.float32)]), RATE

    def _end(self) -> None:
        if self._resampler is not None:
            self._pieces.append(self._resampler.finish())
            self._resampler = None
