"""Speech in the formats that clients ask for, all at once or as it is made. wav and pcm16 need no other package."""

from __future__ import annotations

import io
import struct
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from omniport.runtime.media.source import require

#: format -> (media type, FFmpeg's container and codec, bits a second)
_ENCODED = {
    "flac": ("audio/flac", "flac", "flac", None),
    "mp3": ("audio/mpeg", "mp3", "libmp3lame", 64_000),
    "opus": ("audio/ogg", "ogg", "libopus", 32_000),
    "aac": ("audio/aac", "adts", "aac", 64_000),
}
_PLAIN = {"wav": "audio/wav", "pcm16": "audio/pcm", "pcm": "audio/pcm"}
FORMATS = (*_PLAIN, *_ENCODED)
#: lengths of a stream's header, which nobody knows
_UNKNOWN = 0xFFFFFFFF


class Encoder(Protocol):
    """Makes one stream of sound."""

    def add(self, samples: NDArray[np.float32]) -> bytes:
        """What float32 [n] samples give; may be empty, for an encoder looks ahead."""

    def finish(self) -> bytes:
        """There are no more samples: the rest."""


def media_type(format: str) -> str:
    """What HTTP calls a format."""
    return _PLAIN[format] if format in _PLAIN else _ENCODED[format][0]


def encoder(format: str, rate: int, *, header: bool = True) -> Encoder:
    """For a stream of sound.

    Args:
        format: one of ``FORMATS``. rate: Hz.
        header: False: wav without one, as DashScope streams it.

    Raises:
        MediaError: the format needs PyAV, which is not installed.
    """
    if format in _PLAIN:
        return _Plain(_wav_header(rate, _UNKNOWN) if format == "wav" and header else b"")
    _, container, codec, bits = _ENCODED[format]
    return _Encoded(container, codec, bits, rate)


def encode(format: str, samples: NDArray[np.float32], rate: int) -> bytes:
    """A whole file; a wav file says how long it is."""
    if format == "wav":
        data = _pcm(samples)
        return _wav_header(rate, len(data)) + data
    made = encoder(format, rate)
    return made.add(samples) + made.finish()


class _Plain:
    def __init__(self, header: bytes) -> None:
        self._header = header

    def add(self, samples: NDArray[np.float32]) -> bytes:
        header, self._header = self._header, b""
        return header + _pcm(samples)

    def finish(self) -> bytes:
        header, self._header = self._header, b""
        return header


class _Encoded:
    """One stream by FFmpeg."""

    def __init__(self, container: str, codec: str, bits: int | None, rate: int) -> None:
        self._av: Any = require("av")
        self._output, self._rate, self._time = _Taken(), rate, 0
        self._container = self._av.open(self._output, "w", format=container)
        self._stream = self._container.add_stream(codec, rate=rate, layout="mono")
        if bits is not None:
            self._stream.bit_rate = bits

    def add(self, samples: NDArray[np.float32]) -> bytes:
        if len(samples):
            frame = self._av.AudioFrame.from_ndarray(_integers(samples)[None], format="s16", layout="mono")
            frame.sample_rate, frame.pts = self._rate, self._time
            self._time += len(samples)
            self._container.mux(self._stream.encode(frame))
        return self._output.take()

    def finish(self) -> bytes:
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._output.take()


class _Taken(io.RawIOBase):
    """A file that is written to and never looked back at, as a stream is."""

    def __init__(self) -> None:
        self._written = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._written += data
        return len(data)

    def take(self) -> bytes:
        """What was written since the last time."""
        written = bytes(self._written)
        self._written.clear()
        return written


def _integers(samples: NDArray[np.float32]) -> NDArray[np.int16]:
    return np.round(np.clip(samples, -1.0, 1.0) * 32767.0).astype("<i2")


def _pcm(samples: NDArray[np.float32]) -> bytes:
    return _integers(samples).tobytes()


def _wav_header(rate: int, size: int) -> bytes:
    """RIFF with 16-bit mono samples that take ``size`` bytes."""
    whole = size if size == _UNKNOWN else size + 36
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, rate * 2, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", whole, b"WAVE") + form + struct.pack("<4sI", b"data", size)
