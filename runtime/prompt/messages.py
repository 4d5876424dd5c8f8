"""Check chat messages, before any medium is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from ..errors import PromptError
from ..media.limits import VisionLimits
from . import chat_template

#: what Qwen's qwen-omni-utils takes on a picture or video, and on a video alone; see ``VisionLimits``
_SIZE = ("min_pixels", "max_pixels", "resized_height", "resized_width")
_FRAMES = ("total_pixels", "fps", "nframes", "min_frames", "max_frames", "video_start", "video_end")
#: those that are seconds, or a rate; the others are whole numbers
_REAL = ("fps", "video_start", "video_end")
#: part type -> its keys
_PARTS: Mapping[str, frozenset[str]] = {
    "text": frozenset({"type", "text"}),
    "audio": frozenset({"type", "audio"}),
    "image": frozenset({"type", "image", *_SIZE}),
    "video": frozenset({"type", "video", "use_audio", *_SIZE, *_FRAMES}),
}
_PART_HELP = (
    '{"type": "text", "text": T}, {"type": "audio", "audio": X}, {"type": "image", "image": X} or '
    '{"type": "video", "video": X, "use_audio": true}'
)

_NO_LIMITS = VisionLimits()


@dataclass(frozen=True)
class Part:
    """One checked piece of content. ``where`` names it in messages to the user."""

    kind: str
    value: Any
    where: str
    use_audio: bool = False
    limits: VisionLimits = _NO_LIMITS


@dataclass(frozen=True)
class Message:
    """One checked message.

    Attributes:
        calls: what it gives as ``tool_calls``, not checked.
    """

    role: str
    parts: list[Part]
    where: str
    calls: Any = None


def check_messages(messages: object, asked: bool = True) -> list[Message]:
    """Role and parts of every message.

    Args:
        asked: one of them must hold something to reply to.

    Raises:
        PromptError: they are malformed.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise PromptError(
            f"messages are a {type(messages).__name__}; a list of messages was expected, such as "
            '[{"role": "user", "content": "Hello"}]'
        )
    if not messages and asked:
        raise PromptError('there are no messages; at least [{"role": "user", "content": "..."}] was expected')
    checked = [check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    content = (part for message in checked if message.role == "user" for part in message.parts)
    if asked and not any(part.kind != "text" or part.value.strip() for part in content):
        raise PromptError(
            "no message with role 'user' has any content, so there is nothing to reply to; "
            "add text, audio, an image or a video"
        )
    return checked


def open_conversation(messages: Sequence[Message], own: str, always: bool = False) -> list[Message]:
    """Messages that begin with a system message, of which none has the role ``developer``.

    ``developer`` is another name for ``system``. But a first message of that role stands beside the bundle's own system
    prompt, in one system message: speech needs the prompt, and a model is trained with one system message.

    Args:
        own: the bundle's system prompt; may be empty.
        always: begin with a system message even where there is nothing to say in it.
    """
    where, first, rest = "the bundle's system prompt", messages[0] if messages else None, messages[1:]
    if first is not None and first.role == "developer" and own:
        first = replace(first, role="system", parts=[Part("text", own + chat_template.BESIDE, where), *first.parts])
    elif (first is None or first.role not in ("system", "developer")) and (own or always):
        first, rest = Message("system", [Part("text", own, where)], where), messages
    listed = [*([] if first is None else [first]), *rest]
    return [replace(message, role="system") if message.role == "developer" else message for message in listed]


def check_message(message: object, where: str) -> Message:
    """One message; PromptError, which calls it ``where``, if malformed."""
    if not isinstance(message, Mapping):
        raise PromptError(f'{where} is a {type(message).__name__}; {{"role": ..., "content": ...}} was expected')
    role, calls = message.get("role"), message.get("tool_calls")
    known, needed = {"role", "content"}, {"role", "content"}
    if role == "assistant":
        known |= {"tool_calls"}
    if role == "tool":
        known |= {"tool_call_id"}  # results are told apart by their order alone
    if calls:
        needed -= {"content"}
    check_keys(message, frozenset(known), frozenset(needed), where)
    if role not in chat_template.ROLES:
        raise PromptError(f"{where} has role {role!r}; one of {', '.join(chat_template.ROLES)} was expected")
    content = message.get("content")
    if content is None and calls:
        content = []
    if isinstance(content, str):
        return Message(role, [Part("text", content, where)], where, calls)
    return Message(role, check_content(content, f"{where}.content"), where, calls)


def check_content(content: object, where: str) -> list[Part]:
    """The parts of one message's content; PromptError, which calls it ``where``, if malformed."""
    if isinstance(content, str):
        return [Part("text", content, where)]
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise PromptError(f"{where} is a {type(content).__name__}; a string or a list of parts was expected")
    return [_check_part(part, f"{where}[{i}]") for i, part in enumerate(content)]


def _check_part(part: object, where: str) -> Part:
    if not isinstance(part, Mapping):
        raise PromptError(f"{where} is a {type(part).__name__}; {_PART_HELP} was expected")
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _PARTS:
        problem = f"has type {kind!r}" if "type" in part else "has no type"
        raise PromptError(f"{where} {problem}; {_PART_HELP} was expected")
    check_keys(part, _PARTS[kind], frozenset({"type", kind}), where)
    value, use_audio = part[kind], part.get("use_audio", False)
    if kind == "text" and not isinstance(value, str):
        raise PromptError(f"{where}.text is a {type(value).__name__}; a string was expected")
    if value is None:
        raise PromptError(f"{where}.{kind} is None; a path, bytes or an array was expected")
    if not isinstance(use_audio, bool):
        raise PromptError(f"{where}.use_audio is {use_audio!r}; true or false was expected")
    return Part(kind, value, f"{where}.{kind}", use_audio, vision_limits(part, where))


def vision_limits(part: Mapping[str, Any], where: str) -> VisionLimits:
    """What a part of a message asks of its pixels and frames.

    Raises:
        PromptError: it cannot be; ``where`` names the part.
    """
    given = {name: part[name] for name in (*_SIZE, *_FRAMES) if part.get(name) is not None}
    for name, value in given.items():
        least = 0.0 if name.startswith("video_") else 1e-3 if name in _REAL else 1.0
        known = isinstance(value, Real if name in _REAL else int) and not isinstance(value, bool)
        if not known or not least <= value < 1e12:
            wanted = "a finite number" if name in _REAL else "a whole number"
            raise PromptError(f"{where}.{name} is {value!r}; {wanted} of {least:g} or more was expected")
    for one, other in (("resized_height", "resized_width"), ("resized_width", "resized_height")):
        if one in given and other not in given:
            raise PromptError(f"{where} has {one} without {other}; give both or neither")
    for low, high in (("min_pixels", "max_pixels"), ("min_frames", "max_frames"), ("video_start", "video_end")):
        if low in given and high in given and given[low] > given[high]:
            raise PromptError(f"{where} has {low} {given[low]} above {high} {given[high]}; swap or correct them")
    if "fps" in given and "nframes" in given:
        raise PromptError(f"{where} has both fps and nframes; give one of them")
    return VisionLimits(**given)


def check_keys(given: Mapping[Any, Any], known: frozenset[str], needed: frozenset[str], where: str) -> None:
    """PromptError if the object that is called ``where`` has other keys, or lacks some."""
    unknown = [repr(key) for key in given if key not in known]
    missing = [repr(key) for key in sorted(needed) if key not in given]
    if unknown or missing:
        problems = [f"{word} {', '.join(keys)}" for word, keys in (("unknown", unknown), ("missing", missing)) if keys]
        raise PromptError(
            f"{where} has the wrong keys ({'; '.join(problems)}); {', '.join(sorted(known))} were expected"
        )
