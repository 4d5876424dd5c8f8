"""Tools in a prompt: their signatures, the calls of earlier replies and what they gave, as text in messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import Manifest
from ..errors import PromptError
from . import chat_template
from .messages import Message, Part
from .positions import Layout
from .tokenizer import TextCodec

_TOOL_HELP = '{"type": "function", "function": {"name": NAME, "description": TEXT, "parameters": JSON_SCHEMA}}'
_CALL_HELP = '{"type": "function", "function": {"name": NAME, "arguments": {...}}}'

RoleParts = tuple[str, list[Part]]


def check_tools(tools: object) -> tuple[str, ...]:
    """The tools as JSON.

    Args:
        tools: ``{"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}`` each.

    Raises:
        PromptError: they are not like that, or no JSON.
    """
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise PromptError(f"tools are a {type(tools).__name__}; a list of {_TOOL_HELP} was expected")
    return tuple(_check_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools))


def lay_out(messages: Sequence[Message], tools: Sequence[str] = (), tooled: bool = False) -> list[RoleParts]:
    """Role and parts of each message as the template lays it out.

    Without tools and calls every message is as it is. With them, tools stand at the end of the first message, calls at
    the end of the assistant's, and results that follow one another in one message of the user.

    Args:
        tooled: there are some in messages before these.

    Raises:
        PromptError: malformed ``tool_calls``.
    """
    if not tools and not tooled and not any(message.calls for message in messages):
        return [(message.role, message.parts) for message in messages]
    laid: list[RoleParts] = []
    for i, message in enumerate(messages):
        parts = list(message.parts)
        if message.calls:
            calls = [_check_call(c, f"{message.where}.tool_calls[{k}]") for k, c in enumerate(_listed(message))]
            content = any(part.kind != "text" or part.value for part in parts)
            parts.append(_text("\n" * content + "\n".join(calls), message))
        if message.role == "tool":
            follows = i > 0 and messages[i - 1].role == "tool"
            begin, end = chat_template.TOOL_RESPONSE
            parts = [_text("\n" * follows + begin, message), *parts, _text(end, message)]
            if follows:
                laid[-1][1].extend(parts)
                continue
        laid.append(("user" if message.role == "tool" else message.role, parts))
    if tools:
        laid[0][1].append(_text(chat_template.tool_signatures(tools), messages[0]))
    return laid


def result_text(message: Message) -> str | None:
    """What a tool call gave, as text; None if the message is something else, or holds a medium."""
    if message.role != "tool" or any(part.kind != "text" for part in message.parts):
        return None
    return "".join(part.value for part in message.parts)


def joined_results(results: Sequence[str], manifest: Manifest, codec: TextCodec) -> list[NDArray[np.int64]]:
    """Ids of the one message that holds results which follow one another: for each result the piece that it ends."""

    def ids(count: int) -> NDArray[np.int64]:
        layout = Layout(manifest, codec)
        chat_template.begin_message(layout, "user")
        for k, result in enumerate(results[:count]):
            chat_template.tool_result(layout, result, follows=k > 0)
        if count == len(results):
            chat_template.end_message(layout)
        layout.flush()
        return layout.segment().ids

    return np.split(ids(len(results)), [len(ids(count)) for count in range(1, len(results))])


def _text(text: str, message: Message) -> Part:
    return Part("text", text, message.where)


def _check_tool(tool: object, where: str) -> str:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise PromptError(f"{where} is {tool!r:.200}; {_TOOL_HELP} was expected")
    return _json(tool, where)


def _listed(message: Message) -> Sequence[Any]:
    calls = message.calls
    if isinstance(calls, (str, bytes, Mapping)) or not isinstance(calls, Sequence):
        raise PromptError(
            f"{message.where}.tool_calls is a {type(calls).__name__}; a list of {_CALL_HELP} was expected"
        )
    return calls


def _check_call(call: object, where: str) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name, arguments = (function.get(key) for key in ("name", "arguments")) if isinstance(function, Mapping) else (0, 0)
    if isinstance(arguments, str):  # as OpenAI's clients give it
        try:
            arguments = msgspec.json.decode(arguments)
        except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
            raise PromptError(f"{where} has arguments {arguments!r:.200}; a JSON object was expected") from None
    if not isinstance(name, str) or not name or not isinstance(arguments, Mapping):
        raise PromptError(f"{where} is {call!r:.200}; {_CALL_HELP} was expected")
    return chat_template.tool_call(name, _json(arguments, f"{where}.arguments"))


def _json(value: object, where: str) -> str:
    """As transformers' templates write it."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"{where} cannot be written as JSON ({error}); plain values were expected") from None
