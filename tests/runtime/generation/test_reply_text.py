"""What of a reply's tokens is text, a tool call or a stop string, wherever tokens begin and end."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

import pytest
from omniport.runtime.events import TextDelta, TextEvent, ToolCall, ToolCallDelta
from omniport.runtime.generation.reply_text import ReplyText
from omniport.runtime.generation.thinker import ThinkerStep

STOP = -1


class Pieces:
    """In the place of a TextCodec: any piece of text is a token."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def id_of(self, part: bytes) -> int:
        self.parts.append(part)
        return len(self.parts) - 1

    def token_bytes(self, token_id: int) -> bytes:
        return self.parts[token_id]

    def encode(self, text: str) -> list[int]:
        return [self.id_of(character.encode()) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.parts[i] for i in ids).decode("utf-8", "replace")

    def stream(self) -> Any:
        from omniport.runtime.prompt.tokenizer import TextStream

        return TextStream(self)  # type: ignore[arg-type]


class Written:
    """A reply of these pieces, and what was known after each of them."""

    def __init__(self, parts: Sequence[bytes | str], stop: Sequence[str] = (), tools: bool = False, end: bool = True):
        codec = Pieces()
        self.text = ReplyText(codec, stop, tools)  # type: ignore[arg-type]
        self.told: list[list[TextEvent]] = []
        self.given: list[int] = []
        for index, part in enumerate(parts):
            token_id = codec.id_of(part.encode() if isinstance(part, str) else part)
            self.given.append(token_id)
            last = not end and index == len(parts) - 1
            self.told.append(self.text.take(ThinkerStep(token_id, stop=False, last=last), 0.0))
            if self.text.cut is not None:
                return
        if end:
            self.told.append(self.text.take(ThinkerStep(STOP, stop=True, last=True), 0.0))

    @property
    def events(self) -> list[TextEvent]:
        return [event for events in self.told for event in events]

    @property
    def shown(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, TextDelta))

    @property
    def steps(self) -> list[str]:
        """Text that came with each piece."""
        return ["".join(e.text for e in events if isinstance(e, TextDelta)) for events in self.told]

    @property
    def calls(self) -> list[tuple[str, str]]:
        return [(event.name, event.arguments) for event in self.events if isinstance(event, ToolCall)]


def pieces(text: str, rng: random.Random) -> list[bytes]:
    """Cut anywhere, in characters too."""
    data = text.encode()
    cuts = sorted(rng.choices(range(len(data) + 1), k=rng.randrange(len(data) + 2)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True) if a < b]


def call(name: str = "f", arguments: str = '{"a": 1}') -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


# --- nothing is looked for ----------------------------------------------------------------------------------------


def test_without_tools_and_stop_strings_everything_is_text_at_once() -> None:
    parts = [" ", "<tool", "_call>", "\n", "", "Grü"]
    written = Written(parts)
    assert written.steps == [*parts, ""]
    assert written.text.spoken == len(parts)
    assert not written.text.silent
    assert written.text.said().text == "".join(parts)


def test_a_character_that_is_not_finished_is_replaced_at_the_end() -> None:
    for end in (True, False):
        written = Written(["a", "é".encode()[:1]], end=end)
        assert written.shown == "a\ufffd"
        assert len([e for e in written.events if isinstance(e, TextDelta) and e.token_id != STOP]) == 2


# --- stop strings -------------------------------------------------------------------------------------------------


def test_text_is_held_back_only_as_far_as_a_stop_string_could_begin() -> None:
    written = Written(["Hello ", "E", "N", "ough", " EN", "D", " never"], stop=["END"])
    assert written.steps == ["Hello ", "", "", "ENough", "", " "]
    assert written.text.cut == 4
    assert written.text.said().text == written.shown == "Hello ENough "


def test_a_token_that_the_stop_string_begins_in_is_spelled_anew() -> None:
    written = Written(["Yes", ".\n\nUser"], stop=["\n\n"])
    assert written.text.cut == 1
    assert written.text.token_ids[:1] == written.given[:1]
    assert written.text.token_ids[1] not in written.given
    assert (written.shown, written.text.spoken) == ("Yes.", 2)


def test_a_stop_string_at_the_very_beginning() -> None:
    written = Written(["#", " title"], stop=["#"])
    assert (written.shown, written.text.token_ids, written.text.cut) == ("", [], 0)


def test_what_only_looked_like_a_stop_string_comes_out_at_the_end() -> None:
    for end in (True, False):
        written = Written(["a", "<", "EN"], stop=["<END>"], end=end)
        assert written.shown == written.text.said().text == "a<EN"
        assert written.text.spoken == 3


@pytest.mark.parametrize("seed", range(40))
def test_any_text_is_cut_where_the_first_stop_string_is_complete(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(30):
        text = "".join(rng.choices("abé日\n", k=rng.randrange(1, 25)))
        stop = ["".join(rng.choices("abé日\n", k=rng.randrange(1, 5))) for _ in range(rng.randrange(1, 5))]
        written = Written(pieces(text, rng), stop=stop)
        ends = [(at + len(s), at) for s in stop if (at := text.find(s)) >= 0]
        if not ends:
            assert written.shown == written.text.said().text == text
            assert written.text.cut is None
            continue
        assert written.text.cut is not None
        assert written.text.said().text == written.shown
        # One token may complete several: the one that begins first counts.
        assert written.shown in {text[:at] for _, at in ends}
        assert not any(s in written.shown for s in stop)
        assert written.text.spoken == len(written.text.token_ids)


# --- tool calls ---------------------------------------------------------------------------------------------------


def test_speech_starts_once_the_text_can_no_longer_become_a_call() -> None:
    written = Written(["<", "tool", "_", "box"], tools=True)
    assert written.steps[:4] == ["", "", "", "<tool_box"]
    assert written.text.spoken == 4
    assert Written(["The", " answer", " "], tools=True).steps == ["The", " answer", "", " "]


def test_a_call_is_neither_shown_nor_spoken() -> None:
    written = Written(
        ["\n", "<tool_call>", '\n{"name": "f", ', '"arguments": {"a"', ": 1}}\n", "</tool_call>"], tools=True
    )
    assert (written.shown, written.text.spoken, written.text.silent) == ("", 0, True)
    deltas = [event for event in written.events if isinstance(event, ToolCallDelta)]
    assert [delta.arguments for delta in deltas] == ["", '{"a"', ": 1}"] or deltas[0].arguments == '{"a"'
    assert "".join(delta.arguments for delta in deltas) == '{"a": 1}'
    assert written.calls == [("f", '{"a": 1}')]
    said = written.text.said()
    assert (said.ids, said.text, len(said.calls)) == (written.given, "", 1)


def test_text_before_a_call_is_spoken_and_text_after_it_only_shown() -> None:
    written = Written(
        ["Let me", " look.", "\n", "<tool_call>", call()[11:-12], "</tool_call>", "\n", "Done", "."], tools=True
    )
    assert (written.shown, written.text.spoken) == ("Let me look.\nDone.", 2)
    assert len(written.calls) == 1
    assert written.text.said().text == "Let me look.\nDone."


def test_several_calls() -> None:
    text = "\n" + call("f") + "\n" + call("g", "{}") + "\n" + call("f", '{"b": "</tool"}') + "\n"
    for seed in range(50):
        written = Written(pieces(text, random.Random(seed)), tools=True)
        assert written.calls == [("f", '{"a": 1}'), ("g", "{}"), ("f", '{"b": "</tool"}')]
        assert len({event.id for event in written.events if isinstance(event, ToolCall)}) == 3
        assert (written.shown.strip(), written.text.spoken) == ("", 0)
        assert written.text.said().ids == written.given


@pytest.mark.parametrize("body", ["nonsense", '{"name": "f", "arguments": {"a": }}', "", '{"name": "f"'])
def test_malformed_json_is_text_and_not_spoken(body: str) -> None:
    text = f"Well <tool_call>{body}</tool_call> then {call()}"
    for seed in range(20):
        written = Written(pieces(text, random.Random(seed)), tools=True)
        assert re.sub(r"\s", "", written.shown) == re.sub(r"\s", "", f"Well <tool_call>{body}</tool_call> then")
        assert len(written.calls) == 1
        assert written.text.said().text == written.shown


@pytest.mark.parametrize("end", [True, False])
def test_a_reply_that_ends_within_a_call(end: bool) -> None:
    written = Written(["Hm", call()[:-20]], tools=True, end=end)
    assert written.calls == []
    assert written.shown == written.text.said().text == "Hm" + call()[:-20]
    written = Written(["Hm", "\n", call()[: -len("\n</tool_call>")]], tools=True, end=end)
    assert (written.shown, written.calls) == ("Hm", [("f", '{"a": 1}')])


def test_a_stop_string_does_not_cut_a_call() -> None:
    text = f"Look.\n{call()} and END of it"
    for seed in range(20):
        written = Written(pieces(text, random.Random(seed)), stop=["END", '"a"'], tools=True)
        assert len(written.calls) == 1
        assert (written.shown.split(), written.text.said().text) == (["Look.", "and"], written.shown)
        assert written.text.said().ids == written.text.token_ids


# --- what counts as said ------------------------------------------------------------------------------------------


def test_a_cut_reply_keeps_the_calls_that_were_told_of() -> None:
    parts = ["a", "b", "c", call("f"), "\n", call("g")]
    text = Written(parts, tools=True).text
    ids = text.token_ids
    for texts, calls, kept, first in (
        (9, 2, ids, 6),
        (2, 2, [*ids[:2], *ids[3:]], 2),
        (2, 1, [*ids[:2], ids[3]], 2),
        (3, 1, ids[:4], 4),
        (0, 0, [], 0),
        (3, 0, ids[:3], 3),
    ):
        said = text.said(texts, calls)
        assert (said.ids, said.first, len(said.calls), said.text) == (kept, first, calls, "abc"[:texts])
