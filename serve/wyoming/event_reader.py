"""Events as they come over the wire, no larger than they may be.

The package's own reader takes whatever size a header names.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from wyoming.event import Event

#: bytes of a header, which asyncio's reader holds in its buffer; of an event's data, and of its sound
HEADER, DATA, PAYLOAD = 1 << 16, 1 << 18, 1 << 20


class NoEvent(Exception):
    """What came is none, and nobody can tell where the next one begins."""


class _Header(msgspec.Struct):
    type: str
    data: dict[str, Any] | None = None
    data_length: int | None = None
    payload_length: int | None = None


_header = msgspec.json.Decoder(_Header)
_data = msgspec.json.Decoder(dict[str, Any])


async def read_event(reader: asyncio.StreamReader, seconds: float) -> Event | None:
    """The next event; None when the client has left.

    Args:
        seconds: for the event to arrive, once it has begun.

    Raises:
        NoEvent: malformed, too large, or it does not arrive.
    """
    first = await reader.read(1)
    try:
        return await asyncio.wait_for(_rest(reader, first), seconds) if first else None
    except asyncio.IncompleteReadError:
        return None  # left in the middle of it
    except asyncio.TimeoutError as error:
        raise NoEvent(f"the event did not arrive within {seconds:g} s") from error
    except (asyncio.LimitOverrunError, ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise NoEvent(f"what came is no event: {error}") from error


async def _rest(reader: asyncio.StreamReader, first: bytes) -> Event:
    rest = b"" if first == b"\n" else await reader.readuntil(b"\n")
    header = _header.decode(first + rest)
    data = dict(header.data or {})
    if length := _size(header.data_length, DATA):
        data |= _data.decode(await reader.readexactly(length))
    payload = await reader.readexactly(_size(header.payload_length, PAYLOAD))
    return Event(header.type, data, payload or None)


def _size(length: int | None, most: int) -> int:
    if not 0 <= (length or 0) <= most:
        raise ValueError(f"a part of it has {length} bytes; at most {most} are taken")
    return length or 0
