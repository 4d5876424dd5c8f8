"""Live turns over fake graphs: pieces against whole messages, conversations, limits and refusals."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omniport.runtime import (
    MediaError,
    OmniSession,
    PromptError,
    PromptTooLong,
    SamplingConfig,
    TurnEnded,
    UsageError,
)
from support.bundles import edit, make_bundle
from support.fake_backend import FakeEncoder
from support.live_turns import Live, as_live, assert_fed_alike, film, pieces, push_film, sort, voice

GREEDY = SamplingConfig(max_new_tokens=60)


@pytest.fixture(autouse=True)
def _frames_as_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """A live clip cannot know how long it will be: it shows other frames than a whole file."""
    monkeypatch.setattr("omniport.runtime.media.video.sample_frames", as_live)


def same_as_message(root: Path, parts: list[dict[str, Any]], push: Any, exact: bool = False) -> None:
    """A turn that ``push`` fills gives the cache, reply and speech of one message with ``parts``."""
    whole, turned = Live(root), Live(root)
    for setup in (whole, turned):
        setup.script("", [*range(30), 52])
        setup.decoder("thinker").script = []
    told = sort(whole.session.reply([{"role": "user", "content": parts}], talker=GREEDY, thinker=GREEDY))
    turn = turned.session.turn(talker=GREEDY, thinker=GREEDY, exact=exact)
    push(turn)
    heard = sort(turn.commit())
    assert_fed_alike(turned, whole)
    assert (heard[2].token_ids, heard[2].codec_ids) == (told[2].token_ids, told[2].codec_ids)
    assert len(told[2].token_ids) >= 3
    np.testing.assert_allclose(heard[1], told[1], atol=1e-5)
    assert heard[2].stats.prompt_tokens == told[2].stats.prompt_tokens


@pytest.mark.parametrize("rate", [16000, 44100])
@pytest.mark.parametrize("seconds", [0.035, 1.9, 2.0, 2.01, 4.7, 6.0])
def test_sound_in_pieces(root: Path, seconds: float, rate: int) -> None:
    samples = voice(seconds, rate)
    rng = np.random.default_rng(round(seconds * 100))

    def push(turn: Any) -> None:
        for part in pieces(rng, len(samples), int(rng.integers(2, 30000))):
            turn.push_audio(samples[part], rate)
        turn.push_text("What was ")
        turn.push_text("that?")

    parts = [{"type": "audio", "audio": (samples, rate)}, {"type": "text", "text": "What was that?"}]
    same_as_message(root, parts, push)


@pytest.mark.parametrize(
    ("seconds", "sound", "lead"),
    [
        (0.1, 0, 0),
        (0.9, 0, 0),
        (5.0, 0, 0),
        (5.0, 5.0, 0),
        (4.0, 4.0, 1.0),
        (7.3, 2.5, -0.5),
        (2.0, 6.5, 0.3),
        (3, 0.02, 0),
    ],
)
@pytest.mark.parametrize("fps", [3, 10, 25])
def test_video_in_pieces(root: Path, tmp_path: Path, seconds: float, sound: float, lead: float, fps: int) -> None:
    path = film(tmp_path / "film.mkv", seconds, sound, fps)
    rng = np.random.default_rng(fps)
    parts = [{"type": "video", "video": path, "use_audio": True}, {"type": "text", "text": "Well?"}]

    def push(turn: Any) -> None:
        push_film(turn, path, rng, lead)
        turn.push_text("Well?")

    same_as_message(root, parts, push)


def test_several_clips_in_one_turn(root: Path, tmp_path: Path) -> None:
    path = film(tmp_path / "film.mkv", 3, 0)
    picture = np.random.default_rng(1).integers(0, 255, (70, 90, 3), np.uint8)
    first, second = voice(2.5, seed=1), voice(1.0, 8000, seed=2)
    rng = np.random.default_rng(0)

    def push(turn: Any) -> None:
        turn.push_text("One: ")
        turn.push_audio(first, 16000)
        turn.push_image(picture)
        turn.push_text(" two: ")
        push_film(turn, path, rng)
        turn.push_text(" three: ")
        turn.push_audio(second, 8000)

    parts = [
        {"type": "text", "text": "One: "},
        {"type": "audio", "audio": (first, 16000)},
        {"type": "image", "image": picture},
        {"type": "text", "text": " two: "},
        {"type": "video", "video": path},
        {"type": "text", "text": " three: "},
        {"type": "audio", "audio": (second, 8000)},
    ]
    same_as_message(root, parts, push)


def test_content_that_is_complete(root: Path, tmp_path: Path) -> None:
    path = film(tmp_path / "film.mkv", 5, 4)
    picture = np.random.default_rng(1).integers(0, 255, (70, 90, 3), np.uint8)
    parts: list[dict[str, Any]] = [
        {"type": "text", "text": "One: "},
        {"type": "audio", "audio": (voice(2.5), 16000)},
        {"type": "image", "image": picture},
        {"type": "video", "video": path, "use_audio": True},
        {"type": "text", "text": " two"},
    ]

    def push(turn: Any) -> None:
        turn.push(parts[:2])
        for bad, error in (
            ([{"type": "text"}], PromptError),
            (7, PromptError),
            ([{"type": "text", "text": "\ud800"}], PromptError),
            ([parts[1], {"type": "image", "image": "nowhere.png"}], MediaError),
        ):
            with pytest.raises(error):
                turn.push(bad)
        turn.push(parts[2:4])
        turn.push(" two")

    same_as_message(root, parts, push)


def test_a_picture_after_sound_alone_begins_a_new_clip(root: Path, tmp_path: Path) -> None:
    first = voice(2.6, seed=3)
    path = film(tmp_path / "film.mkv", 3, 0)
    rng = np.random.default_rng(0)

    def push(turn: Any) -> None:
        turn.push_audio(first, 16000)  # 2 s are complete: this is sound alone
        push_film(turn, path, rng)

    same_as_message(root, [{"type": "audio", "audio": (first, 16000)}, {"type": "video", "video": path}], push)


def test_exact_takes_back_what_a_loud_end_changes(root: Path) -> None:
    samples = voice(7.0)[::-1].copy()
    samples[:48000] *= 1e-5  # the loudest moment comes last
    parts = [{"type": "audio", "audio": (samples, 16000)}]
    same_as_message(root, parts, lambda turn: turn.push_audio(samples, 16000), exact=True)
    with pytest.raises(AssertionError):  # without it the quiet start keeps the floor of what was heard by then
        same_as_message(root, parts, lambda turn: turn.push_audio(samples, 16000))


def test_exact_in_a_video(root: Path, tmp_path: Path) -> None:
    path = film(tmp_path / "film.mkv", 5, 5, loud_first=False)
    rng = np.random.default_rng(0)
    parts = [{"type": "video", "video": path, "use_audio": True}]
    same_as_message(root, parts, lambda turn: push_film(turn, path, rng), exact=True)


def test_only_the_last_piece_is_left_at_commit(live: Live) -> None:
    live.script("ok", [1, 52])
    turn = live.session.turn()
    for i in range(0, 9 * 16000, 800):
        turn.push_audio(voice(9)[i : i + 800], 16000)
    encoder = live.backend.graphs["audio_encoder"]
    assert isinstance(encoder, FakeEncoder)
    assert len(encoder.calls) == 4  # 8 s, each piece as it was complete
    cached = sum(call["inputs_embeds"].shape[1] for call in live.decoder("thinker").calls)
    assert cached > 200
    talked = sum(call["inputs_embeds"].shape[1] for call in live.decoder("talker").calls)
    assert talked == cached, "the talker reads along"
    stats = sort(turn.commit())[2].stats
    assert len(encoder.calls) == 5
    assert stats.prefilled_tokens == stats.prompt_tokens
    assert stats.late_tokens == stats.prompt_tokens - cached < 50
    assert (stats.reused_tokens, stats.backend) == (0, "fake")


def test_what_came_before_the_turn_does_not_wait_for_a_piece(live: Live) -> None:
    live.script("ok", [1, 52])
    turn = live.session.turn()
    turn.push_text("hm")
    assert not live.decoder("thinker").calls, "text is prefilled at commit, with all the rest"
    turn.push_audio(voice(0.5), 16000)
    (call,) = live.decoder("thinker").calls
    system = call["inputs_embeds"].shape[1]
    assert system == len(live.session._conversation.entries.segments()[0])
    turn.push_audio(voice(0.5), 16000)
    assert len(live.decoder("thinker").calls) == 1
    stats = sort(turn.commit())[2].stats
    assert stats.late_tokens == stats.prompt_tokens - system < 50


# --- conversations ------------------------------------------------------------------------------------------------


def history(live: Live) -> list[int]:
    """What the session's conversation holds."""
    return [int(i) for i in live.conversation.ids]


def test_a_second_turn_prefills_only_what_is_new(live: Live) -> None:
    told = []
    for k, said in enumerate(("hello", "fine", "bye")):
        live.script(said, [*range(20 + k), 52])
        _, _, done, dropped = live.say(f"question {k}")
        assert (done.text, done.finish_reason, done.speech_finish_reason, dropped) == (said, "stop", "stop", [])
        told.append(done.stats)
    messages: list[dict[str, Any]] = []
    for k, said in enumerate(("hello", "fine", "bye")):
        messages += [{"role": "user", "content": f"question {k}"}, {"role": "assistant", "content": said}]
    ids = live.prompt(messages[:-1]).token_ids
    assert history(live)[: len(ids)] == list(ids)
    for before, stats in itertools.pairwise(told):
        assert stats.reused_tokens == before.prompt_tokens + before.text_tokens
        assert stats.prefilled_tokens == stats.prompt_tokens - stats.reused_tokens < 40


def test_a_later_turn_equals_the_whole_conversation(root: Path) -> None:
    """Thinker and talker see in the third turn what they see when the conversation is given whole."""
    live, fresh = Live(root), Live(root)
    sounds = [voice(2.3, seed=5), voice(1.2, seed=6)]
    messages: list[dict[str, Any]] = []
    for k, samples in enumerate(sounds):
        live.script(f"answer {k}", [*range(15), 52])
        turn = live.session.turn(speak=k != 0)
        turn.push_audio(samples, 16000)
        sort(turn.commit())
        messages.append({"role": "user", "content": [{"type": "audio", "audio": (samples, 16000)}]})
        messages.append({"role": "assistant", "content": f"answer {k}"})
    messages.append({"role": "user", "content": "and now?"})
    for setup in (live, fresh):
        setup.script("last", [*range(15), 52])
    got, wanted = live.say("and now?"), sort(fresh.session.reply(messages))
    assert_fed_alike(live, fresh)
    assert got[2].codec_ids == wanted[2].codec_ids
    np.testing.assert_allclose(got[1], wanted[1], atol=1e-5)
    assert np.sqrt(np.mean(got[1] ** 2)) > 0.01


def test_reset_and_system_message(live: Live) -> None:
    live.script("hi", [1, 52])
    for system in (None, "Be brief.", None):
        live.session.reset(system)
        done = live.say("hello")[2]
        messages = [{"role": "system", "content": system}] if system else []
        prompt = live.prompt([*messages, {"role": "user", "content": "hello"}])
        assert history(live)[: len(prompt.token_ids)] == list(prompt.token_ids)
        assert done.stats.reused_tokens == 0


def test_a_conversation_that_outgrows_the_cache(tmp_path: Path) -> None:
    live = Live(make_bundle(tmp_path / "bundle", max_context=220))
    seen = []
    for k in range(8):
        live.script(f"reply {k}", [*range(12), 52])
        limits = {"thinker": SamplingConfig(max_new_tokens=10), "talker": SamplingConfig(max_new_tokens=15)}
        _, sound, done, dropped = live.say(f"question {k} " + "x" * 20, **limits)
        assert (done.text, len(sound)) == (f"reply {k}", 12 * 480)
        seen.append(dropped[0] if dropped else None)
        if dropped:
            assert done.stats.prefilled_tokens >= dropped[0].prefilled
    assert seen[:3] == [None] * 3
    assert any(seen)
    kept = [k for k in range(8) if f"question {k}" in live.session.text_codec.decode(history(live))]
    dropped_turns = sum(d.turns for d in seen if d)
    assert kept == list(range(dropped_turns, 8))
    assert live.session.manifest.chat.system_prompt in live.session.text_codec.decode(history(live))
    # what is left is what a fresh conversation of the same turns would be
    messages: list[dict[str, Any]] = []
    for k in kept:
        messages += [
            {"role": "user", "content": f"question {k} " + "x" * 20},
            {"role": "assistant", "content": f"reply {k}"},
        ]
    prompt = live.prompt(messages[:-1])
    assert history(live)[: len(prompt.token_ids)] == list(prompt.token_ids)
    fed = live.fed("thinker")[: len(prompt.token_ids)]
    np.testing.assert_array_equal(np.stack([p for _, p in fed], axis=1), prompt.position_ids)


def test_a_turn_too_long_for_the_cache_is_taken_back(tmp_path: Path) -> None:
    live = Live(make_bundle(tmp_path / "bundle", max_context=200))
    live.script("hello", [1, 52])
    live.say("hi")
    before = history(live)
    turn = live.session.turn()
    with pytest.raises(PromptTooLong, match="holds 200"):
        turn.push_audio(voice(10), 16000)
    for push in (lambda: turn.push_text("x" * 300), lambda: turn.push([{"type": "text", "text": "x" * 300}])):
        with pytest.raises(PromptTooLong, match="holds 200"):
            push()
    turn.push_text("hi")  # what was refused was not taken
    assert sort(turn.commit())[2].text == "hello"
    assert history(live)[: len(before)] == before, "earlier turns are not dropped for what can never fit"
    before = history(live)
    turn = live.session.turn()
    turn.push_text("x" * 120)
    with pytest.raises(PromptTooLong):
        turn.push_text("x" * 60)  # text that waits is counted
    turn.push_text("x" * 50)  # fits, but not with what ends the message
    with pytest.raises(PromptTooLong):
        list(turn.commit())
    assert history(live) == before
    assert live.say("hi")[2].text == "hello"


# --- refusals -----------------------------------------------------------------------------------------------------


def test_refused_pushes_take_nothing(root: Path) -> None:
    picture = np.zeros((56, 84, 3), np.uint8)
    samples = voice(3)

    def push(turn: Any) -> None:
        turn.push_audio(samples[:9000], 16000)
        for bad, match in (
            (lambda: turn.push_audio(samples, 8000), "8000 Hz follows sound at 16000"),
            (lambda: turn.push_audio(np.full(10, np.nan), 16000), "NaN"),
            (lambda: turn.push_audio(samples.astype(complex), 16000), "dtype"),
            (lambda: turn.push_audio(samples, -5), "rate"),
            (lambda: turn.push_audio(np.zeros(16000 * 301, np.float32), 16000), "at most 300"),
            (lambda: turn.push_frame(picture, float("nan")), "time is nan"),
            (lambda: turn.push_frame(picture, 1e6), "at most 384"),
            (lambda: turn.push_frame(np.zeros((3, 900, 3), np.uint8), 0.0), "too elongated"),
            (lambda: turn.push_frame("nowhere.png", 0.0), "does not exist"),
            (lambda: turn.push_image(np.zeros((3, 900, 3), np.uint8)), "too elongated"),
        ):
            with pytest.raises(MediaError, match=match):
                bad()
        for text, match in ((b"bytes", "bytes"), ("\ud800", "surrogate")):
            with pytest.raises(PromptError, match=match):
                turn.push_text(text)
        turn.push_audio(samples[9000:], 16000)
        turn.push_audio(np.zeros(0, np.float32), 16000)
        turn.push_text("")

    same_as_message(root, [{"type": "audio", "audio": (samples, 16000)}], push)


def test_frames_out_of_order_or_of_another_size(live: Live) -> None:
    live.script("ok", [1, 52])
    turn = live.session.turn()
    turn.push_frame(np.zeros((56, 84, 3), np.uint8), 1.0)
    with pytest.raises(MediaError, match="times must increase"):
        turn.push_frame(np.zeros((56, 84, 3), np.uint8), 1.0)
    with pytest.raises(MediaError, match="56x56 pixels follows one of 84x56"):
        turn.push_frame(np.zeros((56, 56, 3), np.uint8), 2.0)
    with pytest.raises(MediaError, match="at most 384"):
        turn.push_frame(np.zeros((56, 84, 3), np.uint8), 1000.0)
    assert sort(turn.commit())[2].text == "ok"


def test_sound_too_short_leaves_the_turn_open(live: Live) -> None:
    live.script("ok", [1, 52])
    turn = live.session.turn()
    turn.push_audio(voice(0.01), 16000)
    with pytest.raises(MediaError, match="too short"):
        turn.commit()
    with pytest.raises(MediaError, match="too short"):
        turn.push_text("hm")
    turn.push_audio(voice(0.1), 16000)
    assert sort(turn.commit())[2].text == "ok"


def test_order_of_calls(live: Live) -> None:
    live.script("ok", [1, 52])
    session = live.session
    turn = session.turn()
    with pytest.raises(PromptError, match="nothing was pushed"):
        turn.commit()
    with pytest.raises(UsageError, match="still open"):
        session.turn()
    with pytest.raises(UsageError, match="still open"):
        session.reset()
    turn.push_text("hi")
    events = turn.commit()
    for act in (turn.commit, lambda: turn.push_text("more"), lambda: turn.push_audio(voice(1), 16000)):
        with pytest.raises(TurnEnded, match="committed"):
            act()
    with pytest.raises(UsageError, match="still open"):
        session.turn()
    sort(events)
    session.turn().cancel()
    with pytest.raises(UsageError, match="seed"):
        session.turn(seed=-1)
    with pytest.raises(UsageError, match="multiples of 12"):
        session.turn(window=_windows(10))
    with pytest.raises(UsageError, match=r"SpeechWindows.behind is 100; multiples of 12"):
        session.turn(window=_windows(12, behind=100))
    session.turn().cancel()  # what was refused left no turn open


def _windows(*chunks: int, behind: int | None = None) -> Any:
    from omniport.runtime import SpeechWindows

    return SpeechWindows(chunks, behind=behind)


def test_a_medium_without_its_encoder(root: Path) -> None:
    edit(root, lambda m: m["graphs"].pop("audio_encoder"))
    turn = Live(root).session.turn()
    with pytest.raises(UsageError, match="sound needs the graph 'audio_encoder'"):
        turn.push_audio(voice(1), 16000)


def test_sessions_share_graphs_and_close_them_last(live: Live) -> None:
    live.script("ok", [1, 52])
    other = live.session.fork()
    assert isinstance(other, OmniSession)
    live.session.close()
    assert not live.backend.closed
    turn = other.turn()
    turn.push_text("hi")
    assert sort(turn.commit())[2].text == "ok"
    other.close()
    other.close()
    assert live.backend.closed


@pytest.mark.parametrize(
    ("text", "more"),
    [
        (97, "y" * 70),
        (97, [{"type": "image", "image": np.full((56, 56, 3), 90, np.uint8)}]),
        (95, [{"type": "audio", "audio": (voice(1.0), 16000)}]),  # 25 tokens and the two around them
    ],
    ids=["text", "image", "audio"],
)
def test_text_that_waits_for_what_follows_takes_room(tmp_path: Path, text: int, more: Any) -> None:
    """What does not fit beside it is refused, and the turn stays open."""
    live = Live(make_bundle(tmp_path / "bundle", max_context=150))
    with live.session.turn() as turn:
        turn.push_text("x" * text)
        with pytest.raises(PromptTooLong):
            turn.push(more)
        assert not turn.ended


@pytest.mark.parametrize("system", [3, b"Be brief.", ["Be brief."]])
def test_a_system_message_is_text(live: Live, system: Any) -> None:
    with pytest.raises(UsageError, match="system message"):
        live.session.reset(system)


def test_a_frame_at_a_time_beyond_every_float(live: Live) -> None:
    with live.session.turn() as turn, pytest.raises(MediaError, match="the frame's time is 1000"):
        turn.push_frame(np.zeros((28, 28, 3), np.uint8), 10**400)
