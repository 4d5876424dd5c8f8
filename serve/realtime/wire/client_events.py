"""What a client may send, one record an event."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from ...http.answering import check_values
from ...http.api_errors import ApiError, invalid

T = TypeVar("T")


class ClientEvent(Struct, kw_only=True, tag_field="type"):
    """Of any kind. ``event_id`` is the client's, and comes back in an error about the event."""

    event_id: str | None = None


class SessionUpdate(ClientEvent, tag="session.update"):
    session: dict[str, Any]


class AudioAppend(ClientEvent, tag="input_audio_buffer.append"):
    audio: str


class AudioCommit(ClientEvent, tag="input_audio_buffer.commit"):
    pass


class AudioClear(ClientEvent, tag="input_audio_buffer.clear"):
    pass


class ImageAppend(ClientEvent, tag="input_image_buffer.append"):
    """A picture beside the sound, as base64 or a ``data:`` URL; ``time_ms`` on the clock of the buffer's sound."""

    image: str
    time_ms: float | None = None


class SessionFinish(ClientEvent, tag="session.finish"):
    """DashScope's: told when the last response has ended."""


class Playback(ClientEvent, tag="omniport.playback"):
    """How much of a reply the client has played so far."""

    item_id: str
    played_ms: float


class ItemCreate(ClientEvent, tag="conversation.item.create"):
    item: dict[str, Any]
    previous_item_id: str | None = None


class ItemRetrieve(ClientEvent, tag="conversation.item.retrieve"):
    item_id: str


class ItemDelete(ClientEvent, tag="conversation.item.delete"):
    item_id: str


class ItemTruncate(ClientEvent, tag="conversation.item.truncate"):
    item_id: str
    audio_end_ms: float
    content_index: int = 0


class ResponseCreate(ClientEvent, tag="response.create"):
    response: dict[str, Any] | None = None


class ResponseCancel(ClientEvent, tag="response.cancel"):
    response_id: str | None = None


class OutputClear(ClientEvent, tag="output_audio_buffer.clear"):
    """Means something over WebRTC only."""


Known = (
    SessionUpdate
    | AudioAppend
    | AudioCommit
    | AudioClear
    | ItemCreate
    | ItemRetrieve
    | ItemDelete
    | ItemTruncate
    | ResponseCreate
    | ResponseCancel
    | OutputClear
    | ImageAppend
    | Playback
    | SessionFinish
)
_decoder: msgspec.json.Decoder[Known] = msgspec.json.Decoder(Known)


class NotUnderstood(Exception):
    """What came is no event.

    Attributes:
        told: what the client is told. event_id: the client's, if there is one.
    """

    def __init__(self, told: ApiError, event_id: str | None) -> None:
        super().__init__(str(told))
        self.told, self.event_id = told, event_id


def read_event(text: str) -> Known:
    """An event from its JSON.

    Raises:
        NotUnderstood: it is none.
    """
    try:
        check_values(text)
        return _decoder.decode(text)
    except ApiError as error:
        raise NotUnderstood(error, None) from error
    except msgspec.ValidationError as error:
        raise NotUnderstood(_told(error), _event_id(text)) from error
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise NotUnderstood(invalid(f"the message is no JSON: {error}"), None) from error


def convert(value: object, kind: type[T], where: str) -> T:
    """A part of an event as a record.

    Raises:
        ApiError: 400, which names the field.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _told(error, where) from error


def _told(error: Exception, where: str = "") -> ApiError:
    problem, _, path = str(error).partition(" - at `$")
    field = (where + path.rstrip("`")).lstrip(".")
    return invalid(f"{field or 'the event'}: {problem}", field or None)


def _event_id(text: str) -> str | None:
    try:
        loose = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    found = loose.get("event_id") if isinstance(loose, dict) else None
    return found if isinstance(found, str) else None
