"""Conversations that are changed, over fake graphs: each answers as a fresh session that is given the result."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omniport.runtime import (
    AudioChunk,
    Done,
    MediaError,
    PromptError,
    PromptTooLong,
    SamplingConfig,
    TokenCounts,
    Turn,
    TurnEnded,
    UsageError,
)
from support.bundles import edit, make_bundle
from support.fake_backend import FakeEncoder
from support.live_turns import Gate, Live, assert_fed_alike, sort, start, voice

LONG = SamplingConfig(max_new_tokens=400)
CODES = [k % 48 for k in range(200)]
PICTURE = np.random.default_rng(1).integers(0, 255, (56, 84, 3), np.uint8)
pytestmark = pytest.mark.usefixtures("no_thread_is_left")


def said(live: Live, question: str, answer: str, **options: Any) -> Turn:
    """A turn that was answered so, with 4 codes for each token."""
    live.script(answer, [*CODES[: 4 * len(live.encode(answer))], 52])
    turn = live.ask(question, talker=LONG, thinker=LONG, **options)
    done = sort(turn.commit())[2]
    assert done.text == answer
    return turn


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def answers_as(live: Live, root: Path, messages: list[dict[str, Any]], turn: Turn | None = None) -> Done:
    """The session, which is asked nothing more, answers as a fresh one that is given these messages at once."""
    fresh = Live(root)
    for setup in (live, fresh):
        setup.script("", [*range(14), 52])
        setup.decoder("thinker").script = []
    short = SamplingConfig(max_new_tokens=12)
    got = sort(live.session.turn(thinker=short, talker=LONG).answer() if turn is None else turn.commit())
    prompt = fresh.prompt(messages)
    wanted = sort(fresh.session.reply(messages, thinker=short, talker=LONG))
    count = len(prompt.token_ids)
    assert list(live.conversation.ids[:count]) == list(prompt.token_ids)
    assert got[2].stats.prompt_tokens == count
    assert_fed_alike(live, fresh)
    assert (got[2].token_ids, got[2].codec_ids) == (wanted[2].token_ids, wanted[2].codec_ids)
    assert len(wanted[2].token_ids) >= 3
    np.testing.assert_allclose(got[1], wanted[1], atol=1e-5)
    assert got[2].stats.usage.prompt == wanted[2].stats.usage.prompt
    return got[2]


def ids(live: Live) -> list[str]:
    return [item.id for item in live.session.items]


def texts(live: Live) -> list[tuple[str, str]]:
    return [(i.role, "".join(p["text"] for p in i.content if p["type"] == "text")) for i in live.session.items]


# --- instructions -------------------------------------------------------------------------------------------------


def test_instructions_stand_beside_the_speech_prompt(live: Live, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = live.session.manifest.chat.system_prompt
    live.session.reset(instructions="Be brief.")
    assert texts(live) == [("system", f"{own}\n\nBe brief.")]
    turn = live.ask("hello", thinker=SamplingConfig(max_new_tokens=12), talker=LONG)
    asked = [user("hello")]
    answers_as(live, root, [{"role": "system", "content": f"{own}\n\nBe brief."}, *asked], turn)
    assert not caplog.records, "the talker is given the prompt that it was trained with"
    given = [{"role": "developer", "content": "Be brief."}, *asked]
    wanted = [{"role": "system", "content": f"{own}\n\nBe brief."}, *asked]
    np.testing.assert_array_equal(live.prompt(given).token_ids, live.prompt(wanted).token_ids)
    live.session.reset("Other.", instructions="Be brief.")
    assert texts(live) == [("system", "Other.\n\nBe brief.")]
    for bad in ({"instructions": 3}, {"system": b"x"}):
        with pytest.raises(UsageError, match="a string was expected"):
            live.session.reset(**bad)  # type: ignore[arg-type]
    assert texts(live) == [("system", "Other.\n\nBe brief.")]


def test_a_bundle_without_a_system_prompt(root: Path) -> None:
    edit(root, lambda m: m["chat"].update(system_prompt=""))
    live = Live(root)
    assert ids(live) == []
    live.session.reset(instructions="Be brief.")
    assert texts(live) == [("system", "Be brief.")]


def test_instructions_change_under_way(live: Live, root: Path) -> None:
    own = live.session.manifest.chat.system_prompt
    said(live, "hello", "fine")
    live.session.items.instruct("Be brief.")
    history = [user("hello"), assistant("fine"), user("well?")]
    turn = live.ask("well?", thinker=SamplingConfig(max_new_tokens=12), talker=LONG)
    done = answers_as(live, root, [{"role": "system", "content": f"{own}\n\nBe brief."}, *history], turn)
    assert 0 < done.stats.reused_tokens < len(live.encode(own)) + 10
    live.session.items.instruct(None)
    assert texts(live)[0] == ("system", own)


def test_system_messages_in_the_middle(live: Live, root: Path) -> None:
    said(live, "hello", "fine")
    for role in ("system", "developer"):
        item = live.session.items.append({"role": role, "content": f"From now on, {role}."})
        assert item.role == "system"
    history = [user("hello"), assistant("fine")]
    history += [{"role": role, "content": f"From now on, {role}."} for role in ("system", "developer")]
    answers_as(live, root, history)


# --- messages without an answer -----------------------------------------------------------------------------------


def test_messages_are_appended_and_prefilled_at_once(live: Live, root: Path) -> None:
    sound = (voice(2.3), 16000)
    content = [{"type": "image", "image": PICTURE}, {"type": "audio", "audio": sound}, {"type": "text", "text": "so"}]
    added = [user("one"), assistant("two"), user(content)]
    for message in added:
        item = live.session.items.append(message)
        assert item.cached == item.tokens > 0
    assert sum(call["inputs_embeds"].shape[1] for call in live.decoder("thinker").calls) == len(live.conversation.ids)
    assert not live.decoder("talker").calls, "nobody has spoken yet"
    done = answers_as(live, root, added)
    assert done.stats.late_tokens < 20
    usage = done.stats.usage
    assert usage.cached == TokenCounts(**{**vars(usage.prompt), "text": usage.cached.text})
    assert (usage.prompt.audio, usage.prompt.image) == (57, 6)
    *_, before, reply = live.session.items
    assert [part.get("tokens") for part in before.content] == [6, 57, None]
    assert [part["type"] for part in before.content] == ["image", "audio", "text"]
    assert (reply.role, reply.start, reply.cached) == ("assistant", before.start + before.tokens, reply.tokens - 3)
    live.session.items.append(user("more"))
    assert len(live.decoder("talker").calls[-1]["inputs_embeds"][0]) > 5, "the talker reads along once it has spoken"


def test_a_video_with_sound_is_one_part(live: Live, root: Path, tmp_path: Path) -> None:
    from support.live_turns import film

    path = film(tmp_path / "film.mkv", 4, 4)
    part = {"type": "video", "video": path, "use_audio": True}
    item = live.session.items.append(user([part, {"type": "text", "text": "Well?"}]))
    video, text = item.content
    assert (video["type"], text) == ("video", {"type": "text", "text": "Well?"})
    assert video["audio_tokens"] == 100
    done = answers_as(live, root, [user([part, {"type": "text", "text": "Well?"}])])
    assert (done.stats.usage.prompt.video, done.stats.usage.prompt.audio) == (video["tokens"], 100)


def test_refused_messages_are_not_there(tmp_path: Path) -> None:
    live = Live(make_bundle(tmp_path / "bundle", max_context=200))
    before = ids(live)
    for bad, error in (
        ({"role": "nobody", "content": "x"}, PromptError),
        (user([{"type": "text"}]), PromptError),
        (user([{"type": "image", "image": "nowhere.png"}]), MediaError),
        (user("x" * 400), PromptTooLong),
        (user([{"type": "audio", "audio": (voice(12), 16000)}]), PromptTooLong),
    ):
        with pytest.raises(error):
            live.session.items.append(bad)
        assert ids(live) == before
    with pytest.raises(UsageError, match="no complete item 'item_99'"):
        live.session.items.append(user("x"), before="item_99")
    live.session.items.append(user("x" * 60))
    with pytest.raises(PromptTooLong):
        live.session.items.append(assistant("y" * 120))
    item = live.session.items.append(user("y" * 80))
    assert ids(live)[-1] == item.id
    live.session.close()
    with pytest.raises(UsageError, match="closed"):
        live.session.items.append(user("x"))


def test_a_message_whose_media_cannot_be_encoded_is_not_there(root: Path) -> None:
    live = Live(root)
    live.backend.graphs["audio_encoder"] = Gate(live.backend.graphs["audio_encoder"], 1, ZeroDivisionError("planted"))
    with pytest.raises(ZeroDivisionError):
        live.session.items.append(user([{"type": "audio", "audio": (voice(1), 16000)}]))
    live.session.items.append(user("hello"))
    answers_as(live, root, [user("hello")])


def test_a_turn_may_be_kept_and_answered_later(live: Live, root: Path) -> None:
    sound = voice(2.6)
    turn = live.session.turn()
    with pytest.raises(PromptError, match="nothing to keep"):
        turn.keep()
    turn.push_audio(sound[:8000], 16000)
    turn.push_audio(sound[8000:], 16000)
    turn.keep()
    assert turn.ended
    for act in (turn.keep, turn.commit, turn.answer, lambda: turn.push_text("x")):
        with pytest.raises(TurnEnded, match="was kept"):
            act()
    turn.cancel()
    (item_id,) = turn.item_ids
    assert live.session.items[item_id].cached == live.session.items[item_id].tokens
    answers_as(live, root, [user([{"type": "audio", "audio": (sound, 16000)}])])


def test_answer_is_for_a_turn_without_content(live: Live, root: Path) -> None:
    turn = live.ask("hello", thinker=SamplingConfig(max_new_tokens=12), talker=LONG)
    with pytest.raises(UsageError, match=r"commit\(\)"):
        turn.answer()
    answers_as(live, root, [user("hello")], turn)
    said(live, "again", "yes")
    live.session.items.append({"role": "tool", "content": "42"})
    turn = live.session.turn(speak=False, thinker=LONG)
    live.script("so")
    assert sort(turn.answer())[2].text == "so"
    assert texts(live)[-2:] == [("tool", "42"), ("assistant", "so")]
    assert live.session.items[turn.item_ids[-1]].role == "assistant"


def test_messages_come_before_the_turn_that_is_open(live: Live, root: Path) -> None:
    turn = live.session.turn(thinker=SamplingConfig(max_new_tokens=12), talker=LONG)
    turn.push_audio(voice(2.5), 16000)
    first = live.session.items.append(user("first"))
    assert first.cached < first.tokens, "the open turn has the caches"
    live.session.items.append(user([{"type": "image", "image": PICTURE}]), before=first.id)
    turn.push_audio(voice(2.5, seed=1), 16000)
    heard = np.concatenate([voice(2.5), voice(2.5, seed=1)])
    messages = [user([{"type": "image", "image": PICTURE}]), user("first")]
    answers_as(live, root, [*messages, user([{"type": "audio", "audio": (heard, 16000)}])], turn)


def test_messages_that_come_while_a_reply_is_made_follow_it(root: Path) -> None:
    live = Live(root)
    gate = Gate(live.backend.graphs["thinker"], 3)
    live.script("a quick answer", [*CODES[:14], 52])
    live.backend.graphs["thinker"] = gate
    consumer = start(lambda: sort(live.ask("hello", thinker=LONG, talker=LONG).commit()))
    assert gate.reached.wait(20)
    live.session.items.append(user("and this"))
    before = live.session.items.append({"role": "system", "content": "Hm."}, before=ids(live)[1])
    gate.go.set()
    assert consumer.result(20)[2].text == "a quick answer"
    live.backend.graphs["thinker"] = gate.inner
    assert ids(live)[1] == before.id
    messages = [{"role": "system", "content": live.session.manifest.chat.system_prompt}]
    messages += [{"role": "system", "content": "Hm."}, user("hello"), assistant("a quick answer"), user("and this")]
    answers_as(live, root, messages)


# --- replies that are cut later -----------------------------------------------------------------------------------


def test_a_reply_is_cut_while_the_next_turn_is_open(live: Live, root: Path) -> None:
    first = said(live, "hello", "01234567")
    turn = live.session.turn(thinker=SamplingConfig(max_new_tokens=12), talker=LONG)
    turn.push_audio(voice(2.5), 16000)
    encoder = live.backend.graphs["audio_encoder"]
    assert isinstance(encoder, FakeEncoder)
    encoded = len(encoder.calls)
    first.cancel(heard=0.25)
    assert texts(live)[-1] == ("assistant", "012")
    turn.push_audio(voice(0.4, seed=1), 16000)
    heard = np.concatenate([voice(2.5), voice(0.4, seed=1)])
    messages = [user("hello"), assistant("012"), user([{"type": "audio", "audio": (heard, 16000)}])]
    answers_as(live, root, messages, turn)
    assert len(encoder.calls) == encoded + 1, "what was heard is not encoded again"


def test_a_reply_is_cut_while_the_next_is_made(root: Path) -> None:
    """It is cut for whoever looks, and for the next reply; the one that is made goes on as it was asked."""
    live, fresh = Live(root), Live(root)
    first = said(live, "hello", "01234567")
    gate = Gate(live.backend.graphs["thinker"], 3)
    live.script("a quick answer", [*CODES[:14], 52])
    live.backend.graphs["thinker"] = gate
    consumer = start(lambda: sort(live.ask("again", thinker=LONG, talker=LONG).commit()))
    assert gate.reached.wait(20)
    first.cancel(heard=0.25)
    assert texts(live)[2] == ("assistant", "012")
    gate.go.set()
    sound = consumer.result(20)[1]
    live.backend.graphs["thinker"] = gate.inner
    said(fresh, "hello", "01234567")
    fresh.script("a quick answer", [*CODES[:14], 52])
    np.testing.assert_array_equal(sound, sort(fresh.ask("again", thinker=LONG, talker=LONG).commit())[1])
    messages = [user("hello"), assistant("012"), user("again"), assistant("a quick answer"), user("so?")]
    turn = live.ask("so?", thinker=SamplingConfig(max_new_tokens=12), talker=LONG)
    done = answers_as(live, root, messages, turn)
    assert done.stats.reused_tokens < len(fresh.prompt(messages[:2]).token_ids)


def test_a_reply_is_cut_by_the_id_of_its_item(live: Live, root: Path) -> None:
    turns = [said(live, "one", "01234567"), said(live, "two", "abcdefgh"), said(live, "three", "read", speak=False)]
    first, second, third = (turn.item_ids[-1] for turn in turns)
    items = live.session.items
    assert not items.truncate(first, heard=99.0), "more than it has cuts nothing"
    assert items.truncate(first, heard=0.25)
    assert items.truncate(second, tokens=4)
    assert not items.truncate(second, tokens=4)
    assert [text for _, text in texts(live)[2::2]] == ["012", "abcd", "read"]
    for item_id, how, match in (
        (third, {"heard": 0.1}, "was not spoken"),
        (turns[0].item_ids[0], {"tokens": 1}, "no reply of the model"),
        ("item_99", {"tokens": 1}, "no complete item"),
        (first, {}, "one of heard and tokens"),
        (first, {"heard": -1}, "0 or more"),
    ):
        with pytest.raises(UsageError, match=match):
            items.truncate(item_id, **how)
    turns[1].cancel(heard=0.1)
    assert texts(live)[4] == ("assistant", "a")
    messages = [user("one"), assistant("012"), user("two"), assistant("a"), user("three"), assistant("read")]
    turn = live.ask("so?", thinker=SamplingConfig(max_new_tokens=12), talker=LONG)
    answers_as(live, root, [*messages, user("so?")], turn)


def test_a_reply_without_sound_is_not_cut_by_what_was_heard(live: Live) -> None:
    live.script("abc", [52])
    turn = live.ask("hello", thinker=LONG, talker=LONG)
    assert sort(turn.commit())[2].codec_ids == []
    turn.cancel(heard=0.5)
    assert texts(live)[-1] == ("assistant", "abc")


# --- deleted, rewound, replaced -----------------------------------------------------------------------------------


def test_any_item_can_be_deleted(live: Live, root: Path) -> None:
    first = live.session.turn(speak=False, thinker=LONG)
    first.push_audio(voice(2.2), 16000)
    live.script("heard")
    sort(first.commit())
    said(live, "two", "second")
    said(live, "three", "third")
    live.session.items.delete(first.item_ids[1])
    live.session.items.delete(ids(live)[4])
    with pytest.raises(UsageError):
        live.session.items.delete(first.item_ids[1])
    sound = user([{"type": "audio", "audio": (voice(2.2), 16000)}])
    messages = [sound, user("two"), assistant("second"), assistant("third"), user("so?")]
    turn = live.ask("so?", thinker=SamplingConfig(max_new_tokens=12), talker=LONG)
    done = answers_as(live, root, messages, turn)
    begun = live.encode("assistant\n")
    assert done.stats.reused_tokens == len(live.prompt([sound]).token_ids) - len(begun)
    assert done.stats.usage.cached.audio == 55, "sound before the first difference stays in the cache"


def test_a_conversation_is_rewound(live: Live, root: Path) -> None:
    first = said(live, "one", "first")
    said(live, "two", "second")
    live.session.items.rewind(first.item_ids[1])
    assert texts(live)[1:] == [("user", "one"), ("assistant", "first")]
    turn = live.ask("so?", thinker=SamplingConfig(max_new_tokens=12), talker=LONG)
    done = answers_as(live, root, [user("one"), assistant("first"), user("so?")], turn)
    assert done.stats.prefilled_tokens < 40
    live.session.items.rewind(first.item_ids[0])
    answers_as(live, root, [user("one")])  # the same question once more
    live.session.items.rewind(None)
    assert [role for role, _ in texts(live)] == ["system"]


def test_the_same_question_once_more_runs_nothing_again(live: Live) -> None:
    live.script("abc", [1, 2, 52])
    turn = live.ask("hello", thinker=LONG, talker=LONG)
    first = sort(turn.commit())[2]
    live.session.items.delete(turn.item_ids[1])
    again = sort(live.session.turn(thinker=LONG, talker=LONG).answer())[2]
    assert (again.token_ids, again.codec_ids) == (first.token_ids, first.codec_ids)
    assert (again.stats.prefilled_tokens, again.stats.reused_tokens) == (0, first.stats.prompt_tokens)


def test_what_follows_the_last_token_is_run_again_where_it_was_lost(live: Live, root: Path) -> None:
    """The tokens of the question are all in the cache, as the beginning of a longer one."""
    live.session.items.append(user("hello"))
    header = live.prompt([user("hello")]).token_ids
    item = live.session.items.append(assistant("x"))  # its message begins as a reply does
    live.session.items.delete(item.id)
    done = answers_as(live, root, [user("hello")])
    assert done.stats.reused_tokens == len(header) - 1


def test_a_whole_conversation_is_prefilled_from_where_it_differs(live: Live, root: Path) -> None:
    picture = user([{"type": "image", "image": PICTURE}, {"type": "text", "text": "What is it?"}])
    messages = [picture]
    live.session.items.replace(messages)
    encoder = live.backend.graphs["vision_encoder"]
    assert isinstance(encoder, FakeEncoder)
    assert not encoder.calls, "nothing is computed before the reply"
    answers_as(live, root, messages)
    assert len(encoder.calls) == 1
    kept = ids(live)
    messages = [picture, assistant("A disc."), user("And what else?")]
    live.session.items.replace(messages)
    assert ids(live)[:2] == kept[:2], "the items that both have stay"
    done = answers_as(live, root, messages)
    assert len(encoder.calls) == 1
    assert len(live.prompt([picture]).token_ids) <= done.stats.reused_tokens < done.stats.prompt_tokens - 10
    assert done.stats.usage.cached.image == done.stats.usage.prompt.image == 6
    live.session.items.replace([user("new"), picture])  # it has moved
    answers_as(live, root, [user("new"), picture])
    assert len(encoder.calls) == 1, "what a picture was encoded to moves with it"
    other = user([{"type": "image", "image": PICTURE[::-1]}, {"type": "text", "text": "What is it?"}])
    live.session.items.replace([user("new"), other])
    answers_as(live, root, [user("new"), other])
    assert len(encoder.calls) == 2, "another picture of the same size is another one"


def test_the_same_frames_at_another_rate_are_at_other_times(live: Live, root: Path) -> None:
    frames = [PICTURE, PICTURE[::-1], PICTURE, PICTURE[::-1]]

    def shown(fps: float) -> list[dict[str, Any]]:
        return [user([{"type": "video", "video": frames, "fps": fps}, {"type": "text", "text": "Well?"}])]

    slow, fast = live.prompt(shown(0.5)), live.prompt(shown(2.0))
    np.testing.assert_array_equal(slow.token_ids, fast.token_ids)
    assert (slow.position_ids != fast.position_ids).any()
    for fps in (0.5, 2.0):
        live.session.items.replace(shown(fps))
        answers_as(live, root, shown(fps))


def test_replies_that_come_back_as_text(live: Live, root: Path) -> None:
    said(live, "hello", "Grüße")
    live.session.items.replace([user("hello"), assistant("Grüße"), user("well?")])
    done = answers_as(live, root, [user("hello"), assistant("Grüße"), user("well?")])
    assert done.stats.reused_tokens >= len(live.prompt([user("hello")]).token_ids) + len(live.encode("Grüße"))


def test_replace_is_refused_whole(tmp_path: Path) -> None:
    live = Live(make_bundle(tmp_path / "bundle", max_context=200))
    said(live, "hello", "fine")
    before = ids(live)
    for bad, error in (([user("x" * 300)], PromptTooLong), ([user(7)], PromptError), ("x", PromptError)):
        with pytest.raises(error):
            live.session.items.replace(bad)
        assert ids(live) == before
    with live.session.turn(), pytest.raises(UsageError, match="still open"):
        live.session.items.replace([user("x")])
    live.session.items.replace([])
    assert [role for role, _ in texts(live)] == ["system"]


def test_nothing_is_dropped_for_a_reply_that_takes_what_is_left(tmp_path: Path) -> None:
    live = Live(make_bundle(tmp_path / "bundle", max_context=220))
    messages = [user("x" * 110), assistant("y" * 20), user("z")]
    for drop, count in ((False, 0), (True, 1)):
        live.session.items.replace(messages)
        live.script("ok", [1, 52])
        _, _, done, dropped = sort(live.session.turn(thinker=LONG, talker=LONG).answer(drop=drop))
        assert (done.text, len(dropped)) == ("ok", count)
        roles = [role for role, _ in texts(live)]
        assert roles == ["system", *["user", "assistant"] * (2 - count)]
    more = 220 - len(live.prompt([user("x" * 90), user("z")]).token_ids)
    live.session.items.replace([user("x" * 90), user("z" * (1 + more))])
    with pytest.raises(PromptTooLong):
        list(live.session.turn(thinker=LONG, talker=LONG).answer(drop=False))
    assert len(live.session.items) == 3, "the reply that had no room has left nothing"


def test_dropped_items_are_named(tmp_path: Path) -> None:
    live = Live(make_bundle(tmp_path / "bundle", max_context=220))
    turns = [said(live, f"question {k}", "fine") for k in range(3)]
    live.session.items.append({"role": "system", "content": "Hm."})
    live.script("ok", [1, 52])
    dropped = live.say("x" * 60, thinker=LONG, talker=LONG)[3]
    assert dropped[0].items[:2] == turns[0].item_ids
    assert dropped[0].turns >= 1
    assert not set(dropped[0].items) & set(ids(live))


def test_items_change_in_many_threads(live: Live, root: Path) -> None:
    """Whoever changes them while turns go on: the next reply is that of what is left."""
    stop = threading.Event()

    def edit(k: int) -> None:
        while not stop.is_set():
            item = live.session.items.append(user(f"note {k}"))
            live.session.items.delete(item.id)

    editors = [start(edit, k) for k in range(3)]
    for k in range(6):
        turn = live.session.turn(thinker=LONG, talker=LONG)
        live.script("fine", [*CODES[:12], 52])
        for part in range(3):
            turn.push_audio(voice(1.1, seed=3 * k + part), 16000)
        for event in turn.commit():
            if isinstance(event, AudioChunk) and k % 2:
                turn.cancel(heard=0.1)
    stop.set()
    for editor in editors:
        editor.result(20)
    messages = []
    for k, (_, text) in enumerate(texts(live)[2::2]):
        sound = np.concatenate([voice(1.1, seed=3 * k + part) for part in range(3)])
        messages += [user([{"type": "audio", "audio": (sound, 16000)}]), assistant(text)]
    turn = live.ask("so?", thinker=SamplingConfig(max_new_tokens=12), talker=LONG)
    answers_as(live, root, [*messages, user("so?")], turn)


@pytest.mark.parametrize("close", [True, False])
def test_closing_ends_what_is_appended(root: Path, close: bool) -> None:
    live = Live(root)
    gate = Gate(live.backend.graphs["thinker"], 1)
    live.backend.graphs["thinker"] = gate
    adding = start(lambda: live.session.items.append(user("hello" * 300)))
    assert gate.reached.wait(20)
    (token,) = live.session._outside._under_way
    closer = start(live.session.close if close else token.check)
    while close and not token.cancelled:
        time.sleep(0.001)
    gate.go.set()
    closer.result(20)
    if close:
        with pytest.raises(UsageError, match="closed"):
            adding.result(20)
    else:
        assert adding.result(20).cached


# --- results of tools ---------------------------------------------------------------------------------------------

CALLS: list[dict[str, Any]] = [
    user("weather?"),
    {"role": "assistant", "tool_calls": [{"function": {"name": f"f{k}", "arguments": {}}} for k in range(3)]},
]


def result(text: Any) -> dict[str, Any]:
    return {"role": "tool", "content": text}


def test_results_that_follow_one_another_are_one_message(live: Live, root: Path) -> None:
    for message in (*CALLS, result("sunny"), result("12"), result("windy")):
        live.session.items.append(message)
    listed = [f"<tool_response>\n{text}\n</tool_response>" for text in ("sunny", "12", "windy")]
    assert texts(live)[-3:] == [("user", text) for text in listed]
    items = list(live.session.items)
    assert [item.start for item in items[1:]] == list(np.cumsum([item.tokens for item in items])[:-1])
    answers_as(live, root, [*CALLS, result("sunny"), result("12"), result("windy")])


@pytest.mark.parametrize("gone", [[0], [1], [2], [0, 1], [0, 2], [1, 2]])
def test_a_result_among_others_is_deleted(live: Live, root: Path, gone: list[int]) -> None:
    results = [result(text) for text in ("sunny", "12", "windy")]
    added = [live.session.items.append(message).id for message in (*CALLS, *results)][2:]
    for k in gone:
        live.session.items.delete(added[k])
    assert ids(live)[-(3 - len(gone)) :] == [added[k] for k in range(3) if k not in gone]
    answers_as(live, root, [*CALLS, *(results[k] for k in range(3) if k not in gone)])


def test_a_result_is_put_before_another_and_something_between(live: Live, root: Path) -> None:
    for message in CALLS:
        live.session.items.append(message)
    last = live.session.items.append(result("windy")).id
    first = live.session.items.append(result("sunny"), before=last).id
    both = [*CALLS, result("sunny"), result("windy")]
    answers_as(live, root, both)
    live.session.items.rewind(last)
    middle = live.session.items.append(user("wait"), before=last).id
    answers_as(live, root, [*CALLS, result("sunny"), user("wait"), result("windy")])
    live.session.items.rewind(last)
    live.session.items.delete(middle)
    answers_as(live, root, both)
    live.session.items.rewind(first)
    answers_as(live, root, [*CALLS, result("sunny")])


def test_results_are_dropped_together(root: Path) -> None:
    live = Live(root)
    for message in (*CALLS, result("sunny"), result("windy"), user("next")):
        live.session.items.append(message)
    turns = live.conversation.entries.turns()
    assert [[entry.result for entry in turn] for turn in turns[-2:]] == [["sunny", "windy"], [None]]


def test_a_result_with_a_picture_is_a_message_of_its_own(live: Live, root: Path) -> None:
    shown = result([{"type": "text", "text": "see"}, {"type": "image", "image": PICTURE}])
    for message in (*CALLS, result("sunny"), shown, result("windy")):
        live.session.items.append(message)
    roles = [entry.result for entry in live.conversation.entries]
    assert roles[-3:] == ["sunny", None, "windy"]
    assert all(not entry.beside for entry in live.conversation.entries)
