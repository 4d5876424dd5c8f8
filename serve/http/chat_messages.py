"""Messages of a chat, to what the runtime takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..service import Service
from .api_errors import ApiError, invalid
from .content_parts import read_parts, text_of
from .media_reader import MediaReader

Message = dict[str, Any]


async def read_messages(messages: Sequence[Message], service: Service, hear_videos: bool = False) -> list[Message]:
    """Messages for ``OmniSession.items.replace``, with their media read.

    Raises:
        ApiError: malformed, unreadable or beyond a limit.
    """
    reader = MediaReader(service)
    read = [await _read(message, f"messages[{i}]", service, reader, hear_videos) for i, message in enumerate(messages)]
    if not any(message["role"] in ("user", "tool") for message in read):
        raise invalid("no message is a user's, so there is nothing to reply to", "messages")
    return read


async def _read(message: Message, where: str, service: Service, reader: MediaReader, hear_videos: bool) -> Message:
    role, content = message.get("role"), message.get("content")
    if role in ("system", "developer"):  # beside the prompt that speech needs, which it does not replace
        return {"role": "developer", "content": text_of(content, f"{where}.content")}
    if role == "user":
        return {"role": role, "content": await read_parts(content, f"{where}.content", reader, hear_videos)}
    if role == "assistant":
        return _assistant(message, where, service)
    if role == "tool":
        return {"role": role, "content": text_of(content, f"{where}.content")}
    problem = f"{where}.role is {role!r:.100}; system, developer, user, assistant or tool was expected"
    raise invalid(problem, f"{where}.role")


def _assistant(message: Message, where: str, service: Service) -> Message:
    content, audio, calls = message.get("content"), message.get("audio"), message.get("tool_calls")
    if content is None and audio is not None:
        content = _said_before(audio, f"{where}.audio.id", service)
    made: Message = {"role": "assistant"}
    if content is not None or not calls:
        made["content"] = text_of("" if content is None else content, f"{where}.content")
    if calls:
        made["tool_calls"] = calls
    return made


def _said_before(audio: object, where: str, service: Service) -> str:
    id = audio.get("id") if isinstance(audio, dict) else None
    text = service.spoken.find(id) if isinstance(id, str) else None
    if text is None:
        message = f"there is no sound {id!r:.100}, or no more: it is kept for an hour; send the message's content"
        raise ApiError(400, "audio_not_found", message, param=where)
    return text
