"""What the server and a decoding child say to each other: a length, a record in MessagePack, and bytes behind it.

The child may have been taken over by what it decodes. Of what it says nothing is believed that is not of these forms,
within these bounds; it can make no object in the server but numbers, a text, and an array of a fixed type.
"""

from __future__ import annotations

import math
import struct
from typing import IO, Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray
from omniport.runtime.media.video import MAX_FRAME_PIXELS, MAX_FRAMES

T = TypeVar("T")
_LENGTH = struct.Struct("<I")
#: bytes of a record; a problem is shorter
MAX_RECORD = 1 << 16
MAX_PROBLEM = 2000
_Count = Annotated[int, Meta(ge=0, le=1 << 40)]


class Sound(Struct, frozen=True, tag="sound"):
    """Decode a recording: float32 [n] at ``rate``, of so many seconds at most."""

    rate: int
    max_seconds: float


class Picture(Struct, frozen=True, tag="picture"):
    """Decode a picture of at most so many pixels: uint8 [H, W, 3]."""

    max_pixels: int


class OpenVideo(Struct, frozen=True, tag="video"):
    """Look at a video of at most so many seconds: ``Opened``."""

    max_seconds: float


class Frames(Struct, frozen=True, tag="frames"):
    """Decode these frames of a video in this size (height, width): uint8 [F, H, W, 3]."""

    indices: list[int]
    size: tuple[int, int]


class Track(Struct, frozen=True, tag="track"):
    """Decode the sound beside a video, see ``runtime.media.video.Video.sound``: float32 [n]; nothing without one."""

    start: float | None
    end: float | None
    max_seconds: float


Asked = Sound | Picture | OpenVideo | Frames | Track


class Request(Struct, frozen=True):
    """``size`` bytes of a file follow. ``seconds``: after which nobody waits for the answer any more."""

    asked: Asked
    size: int
    seconds: float


class Refused(Struct, frozen=True, tag="refused"):
    """It cannot be read."""

    problem: Annotated[str, Meta(max_length=MAX_PROBLEM)]


class Decoded(Struct, frozen=True, tag="decoded"):
    """The array follows."""

    dtype: Literal["|u1", "<f4"]
    shape: Annotated[list[_Count], Meta(min_length=1, max_length=4)]


class Nothing(Struct, frozen=True, tag="nothing"):
    """There is none."""


class Opened(Struct, frozen=True, tag="opened"):
    """Of a video: see ``runtime.media.video.Video``."""

    frames: Annotated[int, Meta(ge=1, le=MAX_FRAMES)]
    height: Annotated[int, Meta(ge=1, le=MAX_FRAME_PIXELS)]
    width: Annotated[int, Meta(ge=1, le=MAX_FRAME_PIXELS)]
    rate: Annotated[float, Meta(gt=0, le=1e6)]


Answer = Refused | Decoded | Nothing | Opened


class NotAnAnswer(Exception):
    """What came is none, or no more comes."""


def send(file: IO[bytes], record: Struct, data: Any = b"") -> None:
    """Write a record, and bytes behind it."""
    encoded = msgspec.msgpack.encode(record)
    file.write(_LENGTH.pack(len(encoded)) + encoded)
    file.write(data)
    file.flush()


def receive(file: IO[bytes], kind: type[T]) -> T:
    """Read a record.

    Raises:
        NotAnAnswer: another one, or none.
    """
    (length,) = _LENGTH.unpack(exactly(file, _LENGTH.size))
    if length > MAX_RECORD:
        raise NotAnAnswer(f"a record of {length} bytes")
    try:
        return msgspec.msgpack.decode(exactly(file, length), type=kind)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise NotAnAnswer(str(error)) from error


def exactly(file: IO[bytes], size: int) -> bytearray:
    """So many bytes.

    Raises:
        NotAnAnswer: there are fewer.
    """
    data = bytearray(size)
    _fill(file, memoryview(data))
    return data


def receive_array(file: IO[bytes], told: Decoded, wanted: Asked, most: int) -> NDArray[Any]:
    """The array behind a record.

    Args:
        most: bytes.

    Raises:
        NotAnAnswer: not of the form that was asked for, or larger.
    """
    kind, shape = np.dtype(told.dtype), tuple(told.shape)
    sound = isinstance(wanted, (Sound, Track))
    fits = len(shape) == 1 if sound else len(shape) == 3 + isinstance(wanted, Frames) and shape[-1] == 3
    if isinstance(wanted, Frames):
        fits = fits and shape[:3] == (len(wanted.indices), *wanted.size)
    if isinstance(wanted, Picture):
        fits = fits and 0 < shape[0] * shape[1] <= wanted.max_pixels
    if not fits or kind.kind != ("f" if sound else "u") or math.prod(shape) * kind.itemsize > most:
        raise NotAnAnswer(f"an array of {told.dtype} {list(shape)}")
    made = np.empty(shape, kind)
    _fill(file, made.reshape(-1).view(np.uint8).data)
    return made


def _fill(file: IO[bytes], view: memoryview) -> None:
    while len(view):
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise NotAnAnswer("the end")
        view = view[count:]
