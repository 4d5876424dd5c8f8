"""A Realtime session as it is saved."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from ..realtime.given_content import Given
from ..realtime.item_list import Item
from ..realtime.session_settings import SessionSettings
from ..realtime.wire.dialect import Dialect


class Head(Struct, kw_only=True):
    """All but the items.

    Attributes:
        conversation: its id. expires: seconds since 1970.
        dialect: that the client speaks. heard_rate: of what it calls pcm16, Hz.
        spoke: sound was sent. response: id of the one under way.
    """

    id: str
    conversation: str
    expires: int
    dialect: Dialect
    heard_rate: int
    settings: SessionSettings
    spoke: bool
    response: str | None


class _SavedItem(Struct):
    id: str
    fields: dict[str, Any]
    status: str
    runtime_id: str | None


_heads = msgspec.json.Decoder(Head)
_items = msgspec.json.Decoder(_SavedItem)
_given: msgspec.msgpack.Decoder[Given] = msgspec.msgpack.Decoder(Given)


def encode_item(item: Item) -> bytes:
    """Without what was given."""
    return msgspec.json.encode(_SavedItem(item.id, item.fields, item.status, item.runtime_id))


def decode_item(data: bytes, given: bytes | None) -> Item:
    """An item, with what was given."""
    saved = _items.decode(data)
    item = Item(saved.id, saved.fields, saved.status, saved.runtime_id)
    item.given = None if given is None else _given.decode(given)
    return item


def decode_head(data: bytes) -> Head:
    """What ``msgspec.json`` has encoded."""
    return _heads.decode(data)
