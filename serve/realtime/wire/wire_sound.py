"""Sound as it travels: 16-bit samples, or the telephone's 8 bits, at several rates."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from omniport.runtime.media.audio import ResampleStream

from ...http.api_errors import invalid

Floats = NDArray[np.float32]
_RATES = (8000, 16000, 24000, 48000)
#: seconds of sound in one event
_PIECE = 0.1


class WireFormat(Struct, frozen=True, kw_only=True):
    """OpenAI's ``format`` of a session's sound. PCM is little-endian and mono; ``rate`` other than 24000 is ours."""

    type: Literal["audio/pcm", "audio/pcmu", "audio/pcma"] = "audio/pcm"
    rate: int = 24000

    def checked(self, where: str) -> WireFormat:
        """The same, the rate of telephones put right.

        Raises:
            ApiError: a rate that is not taken.
        """
        if self.type != "audio/pcm":
            return WireFormat(type=self.type, rate=8000)
        if self.rate not in _RATES:
            raise invalid(f"{where}.rate is {self.rate}; one of {_RATES} was expected", f"{where}.rate")
        return self

    def described(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        return {"type": self.type, "rate": self.rate} if self.type == "audio/pcm" else {"type": self.type}

    @property
    def bytes_per_second(self) -> int:
        """Of what travels, before base64."""
        return self.rate * (2 if self.type == "audio/pcm" else 1)

    def decode(self, text: str, where: str) -> Floats:
        """Samples [n] in -1..1 of base64.

        Raises:
            ApiError: no base64, or half a sample.
        """
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise invalid(f"{where} is no base64: {error}", where) from error
        if self.type != "audio/pcm":
            return _expand(self.type)[np.frombuffer(data, np.uint8)]
        if len(data) % 2:
            raise invalid(f"{where} has {len(data)} bytes, and 16-bit samples take two each", where)
        return np.frombuffer(data, "<i2").astype(np.float32) * np.float32(1 / 32768)

    def encode(self, samples: Floats) -> str:
        """Base64 of samples [n] in -1..1."""
        values = np.round(np.clip(samples, -1.0, 1.0) * 32767).astype("<i2")
        data = values.tobytes() if self.type == "audio/pcm" else _compress(self.type)[values.view(np.uint16)].tobytes()
        return base64.b64encode(data).decode()


class OutgoingSound:
    """A reply's speech, in pieces for events.

    Args:
        rate: Hz of what comes.
    """

    def __init__(self, format: WireFormat, rate: int) -> None:
        self.format = format
        self._stream = ResampleStream(rate, format.rate)

    def push(self, samples: Floats) -> Iterator[tuple[str, float]]:
        """(base64, seconds) of each piece that these samples [n] give."""
        return self._cut(self._stream.push(samples))

    def finish(self) -> Iterator[tuple[str, float]]:
        """What is left."""
        return self._cut(self._stream.finish())

    def _cut(self, samples: Floats) -> Iterator[tuple[str, float]]:
        step = round(self.format.rate * _PIECE)
        for start in range(0, len(samples), step):
            piece = samples[start : start + step]
            yield self.format.encode(piece), len(piece) / self.format.rate


@cache
def _expand(type: str) -> Floats:
    """Samples [256] of G.711's codes."""
    codes = np.arange(256)
    if type == "audio/pcmu":
        codes = ~codes & 0xFF
        magnitude = (((codes & 15) << 3) + 0x84 << ((codes >> 4) & 7)) - 0x84
        values = np.where(codes & 0x80, -magnitude, magnitude)
    else:
        codes ^= 0x55
        exponent, mantissa = (codes >> 4) & 7, (codes & 15) << 4
        magnitude = np.where(exponent, mantissa + 0x108 << np.maximum(exponent - 1, 0), mantissa + 8)
        values = np.where(codes & 0x80, magnitude, -magnitude)
    return (values / 32768).astype(np.float32)


@cache
def _compress(type: str) -> NDArray[np.uint8]:
    """Codes [65536] of 16-bit samples: the nearest one's, by value."""
    levels = np.round(_expand(type) * 32768).astype(np.int32)
    order = np.argsort(levels, kind="stable")
    ordered = levels[order]
    samples = np.arange(65536, dtype=np.uint16).view(np.int16).astype(np.int32)
    nearest = np.searchsorted((ordered[1:] + ordered[:-1]) / 2, samples, side="right")
    return order[nearest].astype(np.uint8)
