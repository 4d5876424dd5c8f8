"""Tool calls and stop strings in replies over fake graphs: what is shown, spoken, kept, and given to the next turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omniport.runtime import (
    AudioChunk,
    Done,
    Event,
    PromptError,
    SamplingConfig,
    TextDelta,
    ToolCall,
    ToolCallDelta,
    UsageError,
)
from support.bundles import make_bundle, make_manifest, tokenizer, write_manifest
from support.live_turns import Gate, Live, assert_fed_alike, sort, start
from tokenizers import AddedToken

LONG = SamplingConfig(max_new_tokens=400)
CODES = [k % 48 for k in range(120)]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
HELLO = [{"role": "user", "content": "hello"}]
pytestmark = pytest.mark.usefixtures("no_thread_is_left")


def ready(root: Path, text: str, codes: list[int] | None = None, tools: bool = True, room: int | None = None) -> Live:
    live = Live(root, room)
    live.script(text, [*(CODES if codes is None else codes), 52])
    live.session.reset(tools=TOOLS if tools else ())
    return live


def texts(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def answer(live: Live, question: str = "hello", **options: Any) -> tuple[list[Event], Done]:
    events: list[Event] = list(live.ask(question, talker=LONG, thinker=LONG, **options).commit())
    done = events.pop()
    assert isinstance(done, Done)
    return events, done


def spoken_rows(live: Live) -> int:
    """Tokens of the reply that the talker was given, before the one that says that the text has ended."""
    text = live.bundle.manifest.text_tokens
    codec = live.bundle.manifest.codec
    assert text is not None
    assert codec is not None
    thinker, talker = live.bundle.embedding("thinker"), live.bundle.embedding("talker")
    ends = thinker.rows([text.eos])[0]
    rows = [embeds for embeds, _ in live.fed("talker")]
    prompt = next(k for k, row in enumerate(rows) if _is(row, thinker.rows([274])[0] + talker.rows([codec.pad])[0]))
    return next(k for k, row in enumerate(rows[prompt + 2 :]) if _is(row - talker.rows([CODES[k]])[0], ends)) + 1


def _is(row: Any, wanted: Any) -> bool:
    return bool(np.allclose(row, wanted, atol=1e-5))


# --- tool calls ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [None, 1])
@pytest.mark.parametrize("threads", [True, False])
def test_a_call_alone_is_silent(root: Path, room: int | None, threads: bool, slow: None) -> None:
    live = ready(root, f"\n{CALL}\n", room=room)
    events, done = answer(live, threads=threads)
    (call,) = done.tool_calls
    assert events[-1] == call
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Köln"})
    deltas = [event for event in events if isinstance(event, ToolCallDelta)]
    assert events[:-1] == deltas
    assert len(deltas) > 5
    assert "".join(delta.arguments for delta in deltas) == call.arguments
    assert {(delta.id, delta.name) for delta in deltas} == {(call.id, "weather")}
    assert (done.text, done.codec_ids, done.finish_reason, done.speech_finish_reason) == ("", [], "tool_calls", "stop")
    assert done.token_ids == live.encode(f"\n{CALL}\n")
    assert done.stats.time_to_first_token is not None


@pytest.mark.parametrize("room", [None, 1])
def test_text_before_a_call_is_spoken_and_the_call_is_not(root: Path, room: int | None, slow: None) -> None:
    said = "I will look that up for you at once."
    live = ready(root, f"{said}\n{CALL}", room=room)
    events, done = answer(live)
    assert (done.text, texts(events)) == (said, said)
    assert done.codec_ids == CODES
    assert any(isinstance(event, AudioChunk) for event in events)
    assert spoken_rows(live) == len(said)
    assert done.finish_reason == "tool_calls"
    # And the talker hears the same of it as in a reply that ends there.
    alone = ready(root, said)
    answer(alone)
    assert_fed_alike_talker(live, alone)


def assert_fed_alike_talker(got: Live, wanted: Live) -> None:
    for one, other in zip(got.fed("talker"), wanted.fed("talker"), strict=True):
        np.testing.assert_allclose(one[0], other[0], atol=1e-5)


def test_speech_ends_while_the_call_is_still_written(root: Path) -> None:
    live = ready(root, f"Wait.\n{CALL}", CODES[:10])
    gate = Gate(live.backend.graphs["thinker"], at=40)  # within the call
    live.backend.graphs["thinker"] = gate
    events = live.ask("hello", talker=LONG, thinker=LONG).commit()
    heard = start(lambda: next(event for event in events if isinstance(event, AudioChunk)))
    assert len(heard.result(20).samples) == 10 * 480
    assert gate.reached.wait(20)
    gate.go.set()
    assert len(sort_done(events).tool_calls) == 1


def test_without_tools_a_call_is_text_like_any_other(root: Path) -> None:
    live = ready(root, f"\n{CALL}", tools=False)
    events, done = answer(live)
    assert texts(events) == done.text == f"\n{CALL}"
    assert (done.tool_calls, done.finish_reason) == ([], "stop")
    assert spoken_rows(live) == len(live.encode(done.text))
    assert all(isinstance(event, (TextDelta, AudioChunk)) for event in events)


def test_malformed_json_is_shown_and_not_spoken(root: Path) -> None:
    live = ready(root, "Hm. <tool_call>{nothing}</tool_call>")
    events, done = answer(live)
    assert texts(events) == done.text == "Hm. <tool_call>{nothing}</tool_call>"
    assert (done.tool_calls, done.finish_reason, spoken_rows(live)) == ([], "stop", 3)


def test_a_reply_cut_by_its_length_within_a_call(root: Path) -> None:
    live = ready(root, f"Hm.{CALL}")
    done = list(live.ask("hello", talker=LONG, thinker=SamplingConfig(max_new_tokens=30)).commit())[-1]
    assert isinstance(done, Done)
    assert (done.finish_reason, done.tool_calls) == ("length", [])
    assert done.text == f"Hm.{CALL}"[:30]


def test_calls_of_one_reply_and_their_results_in_the_next_turn(root: Path) -> None:
    live = ready(root, f"One moment.\n{CALL}\n{CALL}")
    _, done = answer(live, "What is it like?")
    assert len(done.tool_calls) == 2
    live.script("Cold.", [*CODES[:20], 52])
    turn = live.session.turn(talker=LONG, thinker=LONG)
    turn.push_tool_result("3 °C")
    turn.push_tool_result("rain")
    last = sort(turn.commit())[2]
    assert last.text == "Cold."
    assert last.stats.reused_tokens > 0

    calls = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}] * 2
    messages = [
        {"role": "user", "content": "What is it like?"},
        {"role": "assistant", "content": "One moment.", "tool_calls": calls},
        {"role": "tool", "content": "3 °C"},
        {"role": "tool", "content": "rain"},
    ]
    oracle = ready(root, "Cold.", CODES[:20])
    whole = list(oracle.session.reply(messages, talker=LONG, thinker=LONG, tools=TOOLS))[-1]
    assert isinstance(whole, Done)
    assert whole.codec_ids == last.codec_ids
    assert whole.stats.prompt_tokens == last.stats.prompt_tokens
    assert_fed_alike(live, oracle)


def test_results_beside_other_content_are_a_message_of_their_own(root: Path) -> None:
    live = ready(root, "ok")
    turn = live.session.turn(speak=False)
    turn.push_text("So: ")
    turn.push_tool_result("1")
    turn.push_text("And")
    turn.push_text(" now?")
    list(turn.commit())
    text = live.session.text_codec.decode(live.conversation.ids.tolist())
    assert "user\nSo: \nuser\n<tool_response>\n1\n</tool_response>\nuser\nAnd now?\nassistant\nok\n" in text
    for bad in (None, "\ud800"):
        with live.session.turn(speak=False) as other, pytest.raises(PromptError):
            other.push_tool_result(bad)  # type: ignore[arg-type]


def test_tools_that_are_none_leave_the_conversation_as_it_is(root: Path) -> None:
    live = ready(root, "ok")
    answer(live)
    before = live.conversation.ids.tolist()
    with pytest.raises(PromptError, match="tools"):
        live.session.reset(tools=[{"name": "weather"}])
    assert live.conversation.ids.tolist() == before


@pytest.mark.parametrize("speak", [True, False])
def test_a_cut_reply_keeps_a_call_that_was_told_of(root: Path, speak: bool) -> None:
    said = "Let me see what the weather is like."
    live = ready(root, f"{said}\n{CALL}\n and more" + "x" * 200)
    turn = live.ask("hello", talker=LONG, thinker=LONG, speak=speak, threads=False)
    events = turn.commit()
    told = next(event for event in events if isinstance(event, ToolCall))
    turn.cancel(heard=0.6 if speak else None)
    done = next(event for event in events if isinstance(event, Done))
    assert done.tool_calls == [told]
    kept = said if not speak else ""
    assert done.text == kept
    assert done.token_ids == live.encode(f"{kept}\n{CALL}")
    next_turn_follows(live, root, f"{kept}\n{CALL}")


def test_a_reply_with_a_call_is_cut_after_its_end(root: Path) -> None:
    said = "Let me see what the weather is."
    live = ready(root, f"{said}\n{CALL}", CODES[: 4 * 31])
    turn = live.ask("hello", talker=LONG, thinker=LONG)
    assert sort_done(turn.commit()).text == said
    turn.cancel(heard=0.02 * 4 * 10)
    next_turn_follows(live, root, f"{said[:10]}\n{CALL}")


def sort_done(events: Any) -> Done:
    done = list(events)[-1]
    assert isinstance(done, Done)
    return done


def next_turn_follows(live: Live, root: Path, said: str) -> None:
    """The session answers as one that was told the whole conversation, in which ``said`` was the last reply."""
    oracle = ready(root, said)
    assert sort_done(oracle.ask("hello", speak=False, thinker=LONG).commit()).token_ids == live.encode(said)
    for setup in (live, oracle):
        setup.script("fine", [*range(14), 52])
    got, wanted = live.say("and now?"), oracle.say("and now?")
    assert live.conversation.ids.tolist() == oracle.conversation.ids.tolist()
    assert_fed_alike(live, oracle)
    assert got[2].codec_ids == wanted[2].codec_ids == list(range(14))


# --- stop strings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [True, False])
@pytest.mark.parametrize("speak", [True, False])
def test_a_stop_string_ends_the_reply(root: Path, speak: bool, threads: bool) -> None:
    live = ready(root, "Yes, E or EN.END and so on" + "x" * 100, tools=False)
    events, done = answer(live, speak=speak, threads=threads, stop=["nope", "END"])
    assert (texts(events), done.text, done.finish_reason) == ("Yes, E or EN.", "Yes, E or EN.", "stop")
    assert done.token_ids == live.encode("Yes, E or EN.")
    if speak:
        assert spoken_rows(live) == len("Yes, E or EN.")
        assert done.codec_ids == CODES
    next_turn_follows_plain(live, root, "Yes, E or EN.")


def next_turn_follows_plain(live: Live, root: Path, said: str) -> None:
    oracle = ready(root, said, tools=False)
    answer(oracle)
    for setup in (live, oracle):
        setup.script("fine", [*range(14), 52])
    assert live.say("and now?")[2].codec_ids == oracle.say("and now?")[2].codec_ids
    assert live.conversation.ids.tolist() == oracle.conversation.ids.tolist()
    assert_fed_alike(live, oracle)


def test_a_stop_string_that_begins_within_a_token(tmp_path: Path) -> None:
    """The text before it is spelled by other tokens, which are consumed in its place."""
    root = make_bundle(tmp_path / "words")
    made = tokenizer()
    made.add_tokens([AddedToken("es.\n\n", normalized=False)])
    made.save(str(root / "tokenizer.json"))
    write_manifest(root, make_manifest())
    live = ready(root, "Yes.\n\nAnd so on", tools=False)
    assert len(live.encode("Yes.\n\n")) == 2
    events, done = answer(live, stop="\n\nAnd")
    assert texts(events) == done.text == "Yes."
    assert done.token_ids == live.encode("Yes.") == live.encode("Y") + live.encode("es.")
    assert spoken_rows(live) == 4
    alone = ready(root, "Yes.", tools=False)
    answer(alone)
    assert_fed_alike_talker(live, alone)
    next_turn_follows_plain(live, root, "Yes.")


def test_a_stop_string_at_once(root: Path) -> None:
    live = ready(root, "###", tools=False)
    events, done = answer(live, stop="#")
    assert (events, done.text, done.token_ids, done.codec_ids) == ([], "", [], [])
    next_turn_follows_plain(live, root, "")


def test_one_that_never_comes_changes_nothing_but_when_text_comes(root: Path) -> None:
    outcomes = []
    for stop in ((), ("END", "the end", "N")):
        live = ready(root, "All is well that EN", tools=False)
        live.decoder("thinker").script[-2] = live.encode("M")[0]
        events, done = answer(live, stop=stop)
        outcomes.append((texts(events), done.token_ids, done.codec_ids, live.fed("talker")[-1][0].tolist()))
    assert outcomes[0] == outcomes[1]


def test_reasons_of_the_end(root: Path) -> None:
    live = ready(root, "abcdefgh", tools=False)
    for options, reason in (
        ({}, "stop"),
        ({"stop": "d"}, "stop"),
        ({"thinker": SamplingConfig(max_new_tokens=3)}, "length"),
        ({"thinker": SamplingConfig(max_new_tokens=4), "stop": "d"}, "stop"),
    ):
        options = {"thinker": LONG, **options}
        done = sort_done(live.session.reply(HELLO, speak=False, **options))
        assert done.finish_reason == reason


BAD_STOPS: list[Any] = ["", [""], ["a"] * 5, [3], 3, ["x" * 257], ["\ud800"], {"a"}]


@pytest.mark.parametrize("stop", BAD_STOPS)
def test_stop_strings_that_are_none(root: Path, stop: Any) -> None:
    with pytest.raises(UsageError, match="stop"):
        Live(root).session.turn(stop=stop)
