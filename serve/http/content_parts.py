"""Parts of a message's content, as OpenAI, vLLM and DashScope name them, to what the runtime takes."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote_to_bytes

from ..media.medium import Kind, Medium, raw_rate
from .api_errors import invalid
from .media_reader import MediaReader

Part = dict[str, Any]
_TEXTS = ("text", "input_text", "output_text", "refusal")
#: type -> (key that holds it, what it is)
_URLS: Mapping[str, tuple[str, Kind]] = {
    "image_url": ("image_url", "image"),
    "audio_url": ("audio_url", "audio"),
    "video_url": ("video_url", "video"),
}


def text_of(content: object, where: str) -> str:
    """Content that is text alone.

    Raises:
        ApiError: it is not.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(f"{where} is no text", where)
    return "".join(_text(part, f"{where}[{i}]") for i, part in enumerate(content))


def _text(part: object, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or kind not in _TEXTS:
        raise invalid(f"{where} is no text; media are taken in messages of a user only", where)
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        raise invalid(f"{where}.text is no string", where)
    return text


async def read_parts(content: object, where: str, reader: MediaReader, hear_videos: bool) -> str | list[Part]:
    """Content of a user's message, its media read.

    Raises:
        ApiError: malformed, unreadable or beyond a limit.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(f"{where} is neither text nor a list of parts", where)
    return [await _read(part, f"{where}[{i}]", reader, hear_videos) for i, part in enumerate(content)]


async def _read(part: object, where: str, reader: MediaReader, hear_videos: bool) -> Part:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict):
        raise invalid(f"{where} is no object", where)
    if kind in _TEXTS:
        return {"type": "text", "text": _text(part, where)}
    if kind == "video":
        return await _frames(part, where, reader)
    if kind == "file":
        held = _object(part, "file", where)
        return await _file(held, f"{where}.file", reader, hear_videos)
    if kind == "input_audio":
        held, where = _object(part, "input_audio", where), f"{where}.input_audio"
        data = await _bytes(_string(held, "data", where), where, reader, bare=True)
        rate = raw_rate(held.get("format"), _whole(held, "sample_rate", where))
        return await reader.read(Medium(kind="audio", data=data, raw_rate=rate), where)
    if isinstance(kind, str) and kind in _URLS:
        key, medium = _URLS[kind]
        held = {"url": part[key]} if isinstance(part.get(key), str) else _object(part, key, where)
        where = f"{where}.{key}"
        data = await _bytes(_string(held, "url", where), where, reader)
        detail = held.get("detail") or "auto"
        if detail not in ("auto", "low", "high", "original"):
            raise invalid(f"{where}.detail is {detail!r:.100}; auto, low, high or original was expected", where)
        return await reader.read(Medium(kind=medium, data=data, detail=detail, use_audio=hear_videos), where)
    known = ", ".join((*_TEXTS[:1], "input_audio", *_URLS, "video", "file"))
    raise invalid(f"{where}.type is {kind!r:.100}; one of {known} was expected", f"{where}.type")


async def _frames(part: Mapping[str, Any], where: str, reader: MediaReader) -> Part:
    """DashScope's video: a list of pictures."""
    urls, made = part.get("video"), []
    if isinstance(urls, str):
        data = await _bytes(urls, where, reader)
        return await reader.read(Medium(kind="video", data=data), where)
    if not isinstance(urls, list):
        raise invalid(f"{where}.video is no list of pictures", f"{where}.video")
    for i, url in enumerate(urls):
        place = f"{where}.video[{i}]"
        if not isinstance(url, str):
            raise invalid(f"{place} is no URL", place)
        data = await _bytes(url, place, reader)
        made.append((await reader.read(Medium(kind="image", data=data), place))["image"])
    fps = part.get("fps")
    return {"type": "video", "video": made, **({} if fps is None else {"fps": fps})}


async def _file(held: Mapping[str, Any], where: str, reader: MediaReader, hear_videos: bool) -> Part:
    if held.get("file_id") is not None:
        raise invalid(f"{where}.file_id: this server stores no files; send file_data", f"{where}.file_id")
    url = _string(held, "file_data", where)
    kind = url.partition(";")[0].removeprefix("data:").partition("/")[0].lower()
    data = await _bytes(url, where, reader)
    if kind == "text":
        try:
            return {"type": "text", "text": data.decode()}
        except UnicodeDecodeError as error:
            raise invalid(f"{where} is no text in UTF-8", where) from error
    for known in ("audio", "image", "video"):
        if kind == known:
            return await reader.read(Medium(kind=known, data=data, use_audio=hear_videos), where)
    raise invalid(f"{where} is {kind!r:.100}; data:audio/..., image, video or text was expected", where)


async def _bytes(text: str, where: str, reader: MediaReader, bare: bool = False) -> bytes:
    """What a URL holds; ``bare``: base64 without one is taken, too."""
    head, comma, data = text[:200].partition(",")
    if head.lower().startswith("data:") and comma:
        data = text[len(head) + 1 :]
        if not head.lower().endswith(";base64"):
            return unquote_to_bytes(data)
    elif bare and not text[:8].lower().startswith(("http://", "https://")):
        data = text
    else:
        return await reader.fetch(text, where)
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(f"{where} is no base64: {error}", where) from error


def _object(part: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    held = part.get(key)
    if not isinstance(held, dict):
        raise invalid(f"{where}.{key} is no object", f"{where}.{key}")
    return held


def _string(held: Mapping[str, Any], key: str, where: str) -> str:
    value = held.get(key)
    if not isinstance(value, str) or not value:
        raise invalid(f"{where}.{key} is no string", f"{where}.{key}")
    return value


def _whole(held: Mapping[str, Any], key: str, where: str) -> int | None:
    value = held.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise invalid(f"{where}.{key} is no whole number", f"{where}.{key}")
    return value
