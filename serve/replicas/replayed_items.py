"""Items that another replica has saved become a conversation again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from omniport.runtime import OmniSession

from ..realtime.given_content import Spoken, Written
from ..realtime.input_buffer import InputBuffer
from ..realtime.item_content import read_item, read_picture
from ..realtime.item_list import Item
from ..realtime.responses.reply_maker import Compute
from ..realtime.wire.wire_sound import WireFormat
from ..service import Service


async def replay(
    items: Iterable[Item], session: OmniSession, buffer: InputBuffer, compute: Compute, service: Service
) -> None:
    """Say all of it to the model again; each item gets the id of its message.

    Args:
        session: with an empty conversation. buffer: of it, for what was spoken.

    Raises:
        ApiError, OmniportError: it cannot be.
    """
    for id, alike in groupby(items, lambda item: item.runtime_id):
        if id is None:  # the model had forgotten it
            continue
        same = list(alike)
        given = same[0].given
        if isinstance(given, Spoken):
            id = await _speak(given, buffer, compute, service)
        else:
            message = await _message(same, service)
            id = (await compute(session.items.append, message)).id
        for item in same:
            item.runtime_id = id


async def _speak(given: Spoken, buffer: InputBuffer, compute: Compute, service: Service) -> str:
    samples, at = given.samples, 0
    for image, seconds in given.pictures:  # each before the sound that follows it, as they came
        to = max(at, min(len(samples), round(seconds * given.rate)))
        if to > at:
            buffer.add(samples[at:to], given.rate)
        buffer.show(await read_picture(image, service), seconds, image)
        await compute(buffer.advance)
        at = to
    if at < len(samples):
        buffer.add(samples[at:], given.rate)
    turn = await compute(buffer.take)
    await compute(turn.keep)
    return turn.item_ids[0]


async def _message(items: Sequence[Item], service: Service) -> dict[str, Any]:
    """Of a reply, what it said and the tools that it called are items of their own, and one message."""
    message: dict[str, Any] = {}
    for item in items:
        given = item.given if isinstance(item.given, Written) else Written(item.fields, WireFormat())
        read = await read_item(given.item, given.format, service)
        calls = [*message.get("tool_calls", ()), *read.get("tool_calls", ())]
        message |= {**read, **({"tool_calls": calls} if calls else {})}
    return message
