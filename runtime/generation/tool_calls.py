"""Read a tool call while the model writes it: its name, its arguments as they come, and whether it is one at all."""

from __future__ import annotations

import codecs
import secrets
from typing import Any

import msgspec

from ..events import ToolCall, ToolCallDelta


class _Written(msgspec.Struct):
    name: str
    arguments: dict[str, Any] = {}


class CallReader:
    """One call: a JSON object with a name and arguments, between its tags.

    The arguments are passed on as the text that they are, so that their pieces join to what the call holds. Whether the
    object is valid JSON is known at its end.
    """

    def __init__(self) -> None:
        self._id = f"call_{secrets.token_hex(12)}"
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""
        self._name: str | None = None
        self._arguments: slice | None = None  # in the text; open until their closing brace
        self._told: int | None = None  # characters up to here were passed on
        # Of the scan: how deep in braces and brackets, the string that is open, and the outermost object's key.
        self._depth = 0
        self._quote: int | None = None
        self._escaped = False
        self._word = ""
        self._key: str | None = None

    def feed(self, data: bytes, time: float) -> list[ToolCallDelta]:
        """Take more of what stands between the tags; gives the piece of the call that this adds, if it does."""
        start = len(self._text)
        self._text += self._utf8.decode(data)
        for index in range(start, len(self._text)):
            self._scan(index)
        if self._name is None:
            return []
        piece = ""
        if self._arguments is not None:
            first = self._arguments.start if self._told is None else max(self._told, self._arguments.start)
            piece = self._text[first : self._arguments.stop]
        elif self._told is not None:
            return []
        if self._told is not None and not piece:
            return []
        self._told = len(self._text)
        return [ToolCallDelta(self._id, self._name, piece, time)]

    def call(self, time: float) -> ToolCall | None:
        """The call, if what was taken is one."""
        try:
            written = msgspec.json.decode(self._text, type=_Written)
            arguments = "{}" if self._arguments is None else self._text[self._arguments]
            same = msgspec.json.decode(arguments) == written.arguments and self._name == written.name
        except (msgspec.DecodeError, RecursionError):
            return None
        return ToolCall(self._id, written.name, arguments, time) if same and written.name else None

    def _scan(self, index: int) -> None:
        character = self._text[index]
        if self._quote is not None:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                if self._depth == 1:
                    self._end_string(self._text[self._quote : index + 1])
                self._quote = None
        elif character == '"':
            self._quote = index
        elif character in "{[":
            self._depth += 1
            if self._depth == 2 and self._key == "arguments" and self._arguments is None:
                self._arguments = slice(index, None)
        elif character in "}]":
            self._depth -= 1
            if self._depth == 1 and self._arguments is not None and self._arguments.stop is None:
                self._arguments = slice(self._arguments.start, index + 1)
        elif self._depth == 1 and character in ":,":
            self._key = self._word if character == ":" else None

    def _end_string(self, quoted: str) -> None:
        """A string of the outermost object: a key, or a value."""
        try:
            self._word = msgspec.json.decode(quoted, type=str)
        except msgspec.DecodeError:
            self._word = ""
        if self._key == "name" and self._name is None:
            self._name = self._word
