"""Items that a client writes: as messages for the runtime, and as they are read back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..http.api_errors import invalid
from ..http.content_parts import read_parts, text_of
from ..http.media_reader import MediaReader
from ..service import Service
from .item_list import ItemList
from .wire.wire_sound import WireFormat

#: characters of a URL that is read back with its item; a picture is not
_URL = 1024


async def read_item(item: Mapping[str, Any], format: WireFormat, service: Service) -> dict[str, Any]:
    """The message that an item is.

    Args:
        format: of sound in it.

    Raises:
        ApiError: malformed, or media that cannot be read.
    """
    kind = item.get("type")
    if kind == "message":
        return await _message(item, format, service)
    if kind == "function_call":
        named = {name: _string(item, name) for name in ("name", "arguments")}
        call = {"id": item.get("call_id") or "call", "type": "function", "function": named}
        return {"role": "assistant", "tool_calls": [call]}
    if kind == "function_call_output":
        return {"role": "tool", "content": _string(item, "output")}
    known = "message, function_call or function_call_output"
    raise invalid(f"item.type is {kind!r:.100}; {known} was expected", "item.type")


async def read_input(given: object, items: ItemList, format: WireFormat, service: Service) -> list[dict[str, Any]]:
    """The messages of a response's own ``input``: items, and references to those of the conversation.

    Of what was said and shown in the conversation nobody keeps the sound and the pictures: of those, the transcripts
    are taken.

    Raises:
        ApiError: malformed, an item that there is not, or nothing that can be answered.
    """
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        raise invalid("response.input is no list of items", "response.input")
    messages = []
    for item in given:
        if item.get("type") == "item_reference":
            item = _in_words(items.find(str(item.get("id")), "item_reference_invalid_item_id").fields)
        messages.append(await read_item(item, format, service))
    return messages


def _in_words(fields: Mapping[str, Any]) -> dict[str, Any]:
    if fields["type"] != "message":
        return dict(fields)
    texts = [part.get("text") or part.get("transcript") or "" for part in fields["content"]]
    return {**fields, "content": " ".join(filter(None, texts)) or "..."}


async def read_picture(image: str, service: Service) -> Any:
    """The picture of base64 or a ``data:`` URL, as ``Turn.push_frame`` takes it.

    Raises:
        ApiError: it cannot be read.
    """
    url = image if image.startswith("data:") else f"data:image/jpeg;base64,{image}"
    read = await read_parts([{"type": "image_url", "image_url": {"url": url}}], "image", MediaReader(service), False)
    assert isinstance(read, list)
    return read[0]["image"]


def fields_of(item: Mapping[str, Any]) -> dict[str, Any]:
    """What is read back: without sound and pictures, which nobody keeps."""
    kind = item["type"]
    if kind == "message":
        content = item["content"]
        if isinstance(content, str):
            content = [{"type": "output_text" if item["role"] == "assistant" else "input_text", "text": content}]
        return {"type": kind, "role": item["role"], "content": [_shown(part) for part in content]}
    names = ("call_id", "name", "arguments") if kind == "function_call" else ("call_id", "output")
    return {"type": kind, **{name: item.get(name) for name in names}}


async def _message(item: Mapping[str, Any], format: WireFormat, service: Service) -> dict[str, Any]:
    role, content = item.get("role"), item.get("content")
    if role == "user":
        if not isinstance(content, (str, list)) or not content:
            raise invalid("item.content is empty, or no list of parts", "item.content")
        if isinstance(content, str):
            return {"role": role, "content": content}
        reader = MediaReader(service)
        parts = [await _part(part, f"item.content[{i}]", format, service, reader) for i, part in enumerate(content)]
        return {"role": role, "content": parts}
    if role == "assistant" and isinstance(content, list):
        content = [_written(part) for part in content]
    if role in ("assistant", "system", "developer"):
        return {"role": role, "content": text_of(content, "item.content")}
    raise invalid(f"item.role is {role!r:.100}; user, assistant or system was expected", "item.role")


async def _part(part: object, where: str, format: WireFormat, service: Service, reader: MediaReader) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind == "input_audio":
        audio = part.get("audio")
        if not isinstance(audio, str):
            raise invalid(f"{where}.audio is no string", f"{where}.audio")
        samples = format.decode(audio, f"{where}.audio")
        if len(samples) > service.settings.limits.audio_seconds * format.rate:
            raise invalid(f"{where}.audio is too long", f"{where}.audio")
        return {"type": "audio", "audio": (np.asarray(samples), format.rate)}
    if isinstance(part, dict) and kind == "input_image":
        url = {"url": part.get("image_url"), "detail": part.get("detail")}
        part = {"type": "image_url", "image_url": url}
    read = await read_parts([part], where, reader, False)
    assert isinstance(read, list)
    return read[0]


def _written(part: object) -> object:
    """An assistant's part as text: of its sound the transcript."""
    if isinstance(part, dict) and part.get("type") in ("output_audio", "audio"):
        return {"type": "output_text", "text": part.get("transcript") or ""}
    return part


def _shown(part: Mapping[str, Any]) -> dict[str, Any]:
    shown = {name: value for name, value in part.items() if name != "audio"}
    if shown["type"] == "input_audio":
        shown.setdefault("transcript", None)
    if len(str(shown.get("image_url", ""))) > _URL:
        del shown["image_url"]
    return shown


def _string(item: Mapping[str, Any], name: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise invalid(f"item.{name} is no string", f"item.{name}")
    return value
