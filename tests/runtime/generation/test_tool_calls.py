"""A tool call that is read while it is written, cut anywhere."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from omniport.runtime import ToolCall, ToolCallDelta
from omniport.runtime.generation.tool_calls import CallReader


def read(data: bytes, cuts: list[int]) -> tuple[list[ToolCallDelta], ToolCall | None]:
    reader = CallReader()
    deltas = []
    for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        deltas += reader.feed(data[start:end], 0.0)
    return deltas, reader.call(0.0)


def cuts_of(data: bytes, rng: random.Random) -> list[int]:
    return sorted(rng.choices(range(len(data) + 1), k=rng.randrange(len(data) + 2)))


ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"city": "Köln 日本"},
    {"text": '"}{][,:\\ </tool_call> "name": "x"'},
    {"name": "inner", "arguments": {"name": [1, {"arguments": {}}]}},
    {"a": [1, 2.5, None, True, {"b": []}]},
]
ORDERS = ['{{"name": {n}, "arguments": {a}}}', '\n {{ "arguments" : {a} , "name" : {n} }} \n']
ORDERS += ['{{"id": [{{"name": "no"}}, 3], "name": {n}, "arguments": {a}, "more": {{"arguments": 1}}}}']


@pytest.mark.parametrize("form", ORDERS)
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_pieces_join_to_the_arguments(arguments: dict[str, Any], form: str) -> None:
    rng = random.Random(str(arguments) + form)
    for name in ("weather", 'a "b" \\ é'):
        for indent in (None, 1):
            text = json.dumps(arguments, ensure_ascii=rng.random() < 0.5, indent=indent)
            data = form.format(n=json.dumps(name), a=text).encode()
            for cuts in ([], list(range(1, len(data))), *(cuts_of(data, rng) for _ in range(20))):
                deltas, call = read(data, cuts)
                assert call is not None, data
                assert (call.name, call.arguments, json.loads(call.arguments)) == (name, text, arguments)
                assert "".join(delta.arguments for delta in deltas) == text
                assert {(delta.id, delta.name) for delta in deltas} == {(call.id, name)}
                assert all(delta.arguments for delta in deltas[1:])


def test_arguments_come_as_they_are_written() -> None:
    reader = CallReader()
    told = [
        reader.feed(part, 0.0) for part in (b'{"name": "f', b'"', b', "arguments": ', b'{"a"', b": 1}", b"}", b"\n")
    ]
    assert [[delta.arguments for delta in deltas] for deltas in told] == [[], [""], [], ['{"a"'], [": 1}"], [], []]


def test_a_call_without_arguments() -> None:
    deltas, call = read(b'{"name": "now"}', [])
    assert call is not None
    assert (call.arguments, [delta.arguments for delta in deltas]) == ("{}", [""])


def test_each_has_an_id_of_its_own() -> None:
    assert len({CallReader()._id for _ in range(50)}) == 50


MALFORMED = [
    "",
    "weather(city)",
    "{",
    '{"name": "f", "arguments": {"a": 1}',
    '{"name": "f", "arguments": {"a": 1}}}',
    '{"name": "f", "arguments": {"a": }}',
    '{"name": "f", "arguments": [1]}',
    '{"name": "f", "arguments": "{}"}',
    '{"name": "", "arguments": {}}',
    '{"name": 3, "arguments": {}}',
    '{"arguments": {}}',
    '[{"name": "f", "arguments": {}}]',
    '{"name": "f", "name": "g", "arguments": {}}',
    '{"name": "f", "arguments": {"a": 1}, "arguments": {"a": 2}}',
    '{"name": "f\\x", "arguments": {}}',
    '{"name": "f", "arguments": ' + '{"a":' * 5000,
    '{"name": "f", "arguments": {"a": ' + "[" * 5000 + "]" * 5000 + "}}",
    "}}}]]]" + '{"name": "f"',
    "\\\"'",
]


@pytest.mark.parametrize("text", MALFORMED)
def test_what_is_malformed_is_no_call(text: str) -> None:
    rng = random.Random(text)
    for cuts in ([], cuts_of(text.encode(), rng)):
        assert read(text.encode(), cuts)[1] is None


def test_bytes_that_are_no_text() -> None:
    assert read(b'{"name": "f", "arguments": {"a": "\xff\xc3"}}', [35])[1] is not None
    assert read(b"\xff\xfe{", [1])[1] is None
