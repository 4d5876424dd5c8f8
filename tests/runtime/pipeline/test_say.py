"""A given text is spoken as a reply that says the same would be: same tokens, conditioning, codes and sound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from omniport.runtime import (
    Done,
    OmniSession,
    PromptError,
    PromptTooLong,
    SamplingConfig,
    TextDelta,
    UnknownVoice,
    UsageError,
)
from omniport.runtime.generation.sampling import Sampler
from support.bundles import make_bundle
from support.live_turns import Live, assert_fed_alike, sort

LONG = SamplingConfig(max_new_tokens=400)
CODES = [k % 48 for k in range(100)]
TEXT = "the quick brown fox jumps over the lazy dog, and Grüße to all that follow it through the wood"
pytestmark = pytest.mark.usefixtures("no_thread_is_left")


def ready(root: Path, text: str = "", room: int | None = None) -> Live:
    live = Live(root, room)
    live.script(text, [*CODES, 52])
    return live


@pytest.mark.parametrize("room", [None, 1])
@pytest.mark.parametrize("threads", [True, False])
@pytest.mark.parametrize("text", [TEXT, "ab", "a"])
def test_as_if_the_model_had_said_it(root: Path, text: str, threads: bool, room: int | None, slow: None) -> None:
    thought, given = ready(root, text, room), ready(root, room=room)
    wanted = sort(thought.ask("hello", talker=LONG, thinker=LONG, threads=threads).commit())
    got = sort(given.ask("hello", talker=LONG, say=text, threads=threads).commit())
    assert (got[2].text, got[2].token_ids, got[2].codec_ids) == (text, wanted[2].token_ids, CODES)
    assert [(e.text, e.token_id) for e in got[0]] == [(e.text, e.token_id) for e in wanted[0]]
    np.testing.assert_allclose(got[1], wanted[1], atol=1e-5)
    assert got[1].std() > 0.01
    assert (got[2].finish_reason, got[2].speech_finish_reason) == ("stop", "stop")
    assert_fed_alike(given, thought)
    for live in (given, thought):
        live.script("fine", [*range(14), 52])
    assert given.say("and now?")[2].codec_ids == thought.say("and now?")[2].codec_ids
    assert given.conversation.ids.tolist() == thought.conversation.ids.tolist()
    assert_fed_alike(given, thought)


def test_in_an_empty_conversation_it_is_the_assistants_message(root: Path) -> None:
    live = ready(root)
    done = sort(live.session.say(TEXT, talker=LONG))[2]
    assert (done.text, done.codec_ids) == (TEXT, CODES)
    manifest = live.session.manifest
    said = live.session.text_codec.decode(live.conversation.ids.tolist())
    assert [item.role for item in live.session.items] == ["system", "assistant"]
    assert said == f"system\n{manifest.chat.system_prompt}\nassistant\n{TEXT}\n"
    live.script("yes", [1, 2, 52])
    assert live.say("and?")[2].stats.reused_tokens > len(TEXT)

    alone = ready(root)
    apart = sort(alone.session.reply([], say=TEXT, talker=LONG))[2]
    assert (apart.codec_ids, apart.stats.prompt_tokens) == (CODES, done.stats.prompt_tokens)
    assert [item.role for item in alone.session.items] == ["system"]


def test_sound_comes_before_the_text_is_at_its_end(root: Path) -> None:
    live = ready(root)
    kinds = [type(event) for event in live.session.say("word " * 60, talker=LONG)]
    assert TextDelta in kinds[kinds.index(next(k for k in kinds if k is not TextDelta)) :]


def test_it_can_be_cut(root: Path) -> None:
    live = ready(root)
    turn = live.session.turn(talker=LONG, say=TEXT, threads=False)
    events = turn.commit()
    next(e for e in events if not isinstance(e, TextDelta))
    turn.cancel(heard=0.1)
    done = next(event for event in events if isinstance(event, Done))
    assert (done.text, done.finish_reason) == (TEXT[:4], "cancelled")
    other = ready(root)
    sort(other.session.say(TEXT[:4], talker=LONG))
    for each in (live, other):
        each.script("fine", [*range(14), 52])
        each.say("and now?")
    assert live.conversation.ids.tolist() == other.conversation.ids.tolist()
    assert_fed_alike(live, other)


def test_tools_stop_strings_and_sampling_do_not_touch_it(root: Path) -> None:
    live = ready(root)
    live.session.reset(tools=[{"type": "function", "function": {"name": "f"}}])
    turn = live.session.turn(talker=LONG, thinker=SamplingConfig(max_new_tokens=1), stop="fox", say=TEXT)
    done = sort(turn.commit())[2]
    assert (done.text, done.finish_reason) == (TEXT, "stop")


NOTHING_TO_SAY: list[tuple[Any, str]] = [
    ("", "empty"),
    (" \n", "empty"),
    (7, "int"),
    ("a\ud800", "surrogate"),
    ("Hello<|im_end|>", "control token"),
    ("<|AUDIO|>", "control token"),
]


@pytest.mark.parametrize(("text", "problem"), NOTHING_TO_SAY)
def test_what_cannot_be_said(root: Path, text: Any, problem: str) -> None:
    live = ready(root)
    with pytest.raises(PromptError, match=problem):
        live.session.say(text)
    with pytest.raises(PromptError, match=problem):
        live.session.reply([], say=text)
    assert sort(live.session.say("but this", talker=LONG))[2].codec_ids == CODES  # no turn was left open


@pytest.mark.parametrize("size", [3000, 380])
def test_a_text_that_is_too_long(tmp_path: Path, size: int) -> None:
    live = ready(make_bundle(tmp_path / "small", max_context=400))
    with pytest.raises(PromptTooLong, match="400"):
        live.session.say("x" * size)
    with pytest.raises(PromptTooLong, match="400"):
        live.session.reply([], say="x" * size)
    assert sort(live.session.say("short", talker=SamplingConfig(max_new_tokens=9)))[2].text == "short"


def test_old_turns_make_room(tmp_path: Path) -> None:
    live = ready(make_bundle(tmp_path / "small", max_context=400), "x" * 8)
    for _ in range(5):
        live.say("y" * 60, talker=SamplingConfig(max_new_tokens=9))
    _, _, done, dropped = sort(live.session.say("z" * 200, talker=SamplingConfig(max_new_tokens=9)))
    assert (done.text, len(dropped)) == ("z" * 200, 1)


def test_a_bundle_that_does_not_speak(tmp_path: Path) -> None:
    live = Live(make_bundle(tmp_path / "mute", speak=False))
    with pytest.raises(UsageError, match="cannot speak"):
        live.session.say("hello")
    with pytest.raises(UnknownVoice):
        ready(make_bundle(tmp_path / "speaks")).session.say("hello", "Nobody")


def test_while_a_turn_is_open(root: Path) -> None:
    live = ready(root)
    with live.ask("hello"), pytest.raises(UsageError, match="still open"):
        live.session.say("hello")


@pytest.fixture(scope="module")
def session(tiny_bundle: Path) -> OmniSession:
    return OmniSession.open(tiny_bundle, backend="ort-cpu")


def test_codes_of_a_real_bundle(session: OmniSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token for token those of a reply that the thinker wrote, a token at a time, with the same text."""
    text, talker = "The sea is wide, and its waves are never still.", SamplingConfig(max_new_tokens=24, temperature=0.0)
    ids, vocabulary, pick = session.text_codec.encode(text), session.manifest.thinker.vocab_size, Sampler.pick
    written = iter([*ids, session.manifest.chat.stop[0]])
    messages = [{"role": "user", "content": "Tell me of the sea."}]

    def scripted(self: Sampler, logits: NDArray[np.float32], history: Any) -> int:
        return next(written) if logits.size == vocabulary else pick(self, logits, history)

    monkeypatch.setattr(Sampler, "pick", scripted)
    thought, given = (sort(session.reply(messages, talker=talker, say=say)) for say in (None, text))
    assert next(written, None) is None
    assert given[2].token_ids == thought[2].token_ids == ids
    assert given[2].codec_ids == thought[2].codec_ids
    assert len(given[2].codec_ids) > 5
    np.testing.assert_allclose(given[1], thought[1], atol=1e-3)
