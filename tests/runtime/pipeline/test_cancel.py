"""Barge-in, faults and limits of live turns over fake graphs: every stage can be stopped, and nothing stays behind."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omniport.runtime import AudioChunk, Done, OmniportError, SamplingConfig, TextDelta, Turn, TurnEnded, UsageError
from omniport.runtime.backends.guarded import GuardedBackend
from omniport.runtime.backends.onnxruntime.backend import OrtBackend
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.concurrency.cancel import Cancelled, CancelToken
from omniport.runtime.concurrency.channel import Channel
from omniport.runtime.concurrency.timing import StageTimer
from omniport.runtime.events import underruns
from omniport.runtime.pipeline.workers import Workers
from support.live_turns import Gate, Live, assert_fed_alike, sort, start, voice

LONG = SamplingConfig(max_new_tokens=400)
TEXT = "the quick brown fox jumps over the lazy dog"
CODES = [k % 48 for k in range(200)]
pytestmark = pytest.mark.usefixtures("no_thread_is_left")


def cancel_at(gate: Gate, turn: Turn, live: Live) -> dict[str, int]:
    """Cancel while the graph runs, which is then let go; gives the runs of each graph until then."""
    canceller = start(turn.cancel)
    while not turn._task.token.cancelled:  # it has got as far as waiting for the graph
        time.sleep(0.001)
    before = counts(live)
    gate.go.set()
    canceller.result(10)
    return before


@pytest.fixture(params=[None, 1], ids=["at once", "in turns"])
def room(request: pytest.FixtureRequest) -> int | None:
    """Graph runs at once. In turns, the machine is so slow that thinker and talker are held until the first sound."""
    room: int | None = request.param
    if room is not None:
        request.getfixturevalue("slow")
    return room


def gated(
    root: Path, graph: str, at: int, error: BaseException | None = None, room: int | None = None
) -> tuple[Live, Gate]:
    live = Live(root, room)
    gate = Gate(live.backend.graphs[graph], at, error)
    live.script(TEXT, [*CODES, 52])
    live.backend.graphs[graph] = gate
    return live, gate


def script(live: Live, graph: str, gate: Gate, text: str, codes: list[int]) -> None:
    live.backend.graphs[graph] = gate.inner
    live.script(text, codes)


def counts(live: Live) -> dict[str, int]:
    return {name: len(getattr(g, "inner", g).calls) for name, g in live.backend.graphs.items()}


def next_turn_is_right(live: Live, root: Path, asked: Any, said: str) -> None:
    """The session answers as one whose last reply was ``said`` to the end."""
    oracle = Live(root)
    if asked is not None:
        oracle.script(said, [*range(14), 52])
        turn = oracle.session.turn(speak=False)
        asked(turn)
        done = sort(turn.commit())[2]
        assert done.text == said
    for setup in (live, oracle):
        setup.script("fine", [*range(14), 52])
    got, wanted = live.say("and now?"), oracle.say("and now?")
    assert list(live.conversation.ids) == list(oracle.conversation.ids)
    assert_fed_alike(live, oracle)
    assert (got[2].text, got[2].codec_ids) == (wanted[2].text, wanted[2].codec_ids) == ("fine", list(range(14)))
    np.testing.assert_allclose(got[1], wanted[1], atol=1e-5)
    assert got[1].std() > 0.01


STAGES = [("thinker", 1), ("thinker", 2), ("thinker", 9), ("talker", 1), ("talker", 2), ("talker", 40)]
STAGES += [("dit", 1), ("dit", 17), ("dit", 40), ("bigvgan", 1), ("bigvgan", 3)]


@pytest.mark.parametrize(("graph", "at"), STAGES)
def test_cancel_at_every_stage_of_a_reply(root: Path, graph: str, at: int, room: int | None) -> None:
    live, gate = gated(root, graph, at, room=room)
    turn = live.ask("hello", talker=LONG, thinker=LONG)
    consumer = start(lambda: sort(turn.commit()))
    assert gate.reached.wait(20)
    time.sleep(0.05)  # the other workers go as far as they can
    before = cancel_at(gate, turn, live)
    _, sound, done, _ = consumer.result(10)
    steps = sum(counts(live).values()) - sum(before.values())
    assert steps <= (room or 3), "each worker ends the step that it is in, no more"
    assert done.finish_reason == done.speech_finish_reason == "cancelled"
    assert TEXT.startswith(done.text)
    assert len(done.codec_ids) * 480 == len(sound)
    if not len(sound):
        assert done.text == "", "nothing was heard, so nothing was said"
    script(live, graph, gate, "", [])
    next_turn_is_right(live, root, lambda t: t.push_text("hello"), done.text)


@pytest.mark.parametrize(("graph", "at"), [("audio_encoder", 1), ("audio_encoder", 3), ("thinker", 1), ("thinker", 3)])
def test_cancel_while_listening(root: Path, graph: str, at: int) -> None:
    live, gate = gated(root, graph, at)
    turn = live.session.turn()

    def push() -> None:
        for k in range(10):
            turn.push_audio(voice(1, seed=k), 16000)

    pusher = start(push)
    assert gate.reached.wait(20)
    cancel_at(gate, turn, live)
    with pytest.raises(TurnEnded, match="cancelled"):
        pusher.result(10)
    with pytest.raises(TurnEnded):
        turn.push_text("more")
    with pytest.raises(TurnEnded):
        turn.commit()
    script(live, graph, gate, "", [])
    next_turn_is_right(live, root, None, "")


def test_cancel_while_the_last_piece_is_encoded(root: Path) -> None:
    live, gate = gated(root, "audio_encoder", 1)
    turn = live.session.turn()
    turn.push_audio(voice(1), 16000)
    consumer = start(lambda: list(turn.commit()))
    assert gate.reached.wait(20)
    cancel_at(gate, turn, live)
    (done,) = consumer.result(10)
    assert isinstance(done, Done)
    assert done.finish_reason == "cancelled"
    script(live, "audio_encoder", gate, "", [])
    next_turn_is_right(live, root, lambda t: t.push_audio(voice(1), 16000), "")  # it was complete: it stays


def test_a_run_ends_at_its_next_operator(tiny_bundle: Path) -> None:
    """The longest window of the vocoder takes seconds on a CPU; nobody who interrupts waits for its end."""
    backend = OrtBackend(Bundle.open(tiny_bundle))
    mel = {"mel": np.random.default_rng(0).standard_normal((1, 80, 4000)).astype(np.float32) - 5}
    began = time.process_time()  # not the clock's: what else the machine does is no work of ours
    backend.graph("bigvgan").run(mel)
    whole = time.process_time() - began
    assert whole > 0.1, "too quick to be interrupted"
    for late in (0.0, 0.3):
        token = CancelToken()
        graph = GuardedBackend(backend, token, StageTimer()).graph("bigvgan")
        began = time.process_time()

        def cancel(until: float = began + late * whole, token: CancelToken = token) -> None:
            while time.process_time() < until:
                time.sleep(0.001)
            token.cancel()

        canceller = start(cancel)
        with pytest.raises(Cancelled):
            graph.run(mel)
        assert time.process_time() - began < (late + 0.4) * whole
        canceller.result(10)


@pytest.mark.parametrize(("graph", "at"), STAGES)
def test_cancel_from_another_thread_waits_for_work_in_the_callers(root: Path, graph: str, at: int) -> None:
    """With ``threads=False`` nothing that the bodies use may change before they have left it."""
    live, gate = gated(root, graph, at)
    turn = live.session.turn(talker=LONG, thinker=LONG, threads=False)
    turn.push_text("hello")
    consumer = start(lambda: list(turn.commit()))
    assert gate.reached.wait(20)
    canceller = start(turn.cancel)
    while not turn._task.token.cancelled:
        time.sleep(0.001)
    time.sleep(0.1)
    assert not canceller.done(), "it has to wait: a graph is running over the caches"
    gate.go.set()
    canceller.result(10)
    done = sort(iter(consumer.result(10)))[2]
    assert done.finish_reason == "cancelled"
    script(live, graph, gate, "", [])
    next_turn_is_right(live, root, lambda t: t.push_text("hello"), done.text)


@pytest.mark.parametrize("threads", [True, False])
def test_work_that_has_not_begun_never_does_after_a_cancel(
    root: Path, threads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cancel comes between the prompt and the first step."""
    live = Live(root)
    live.script(TEXT, [*CODES, 52])
    turn = live.session.turn(talker=LONG, thinker=LONG, threads=threads)
    turn.push_text("hello")
    begin, work, begun = Workers.events, Workers._work, list[str]()

    def late(workers: Workers) -> Iterator[Any]:
        turn.cancel()
        return begin(workers)

    def watched(workers: Workers, name: str, *body: Any) -> None:
        begun.append(name)
        work(workers, name, *body)

    monkeypatch.setattr(Workers, "events", late)
    monkeypatch.setattr(Workers, "_work", watched)
    done = sort(turn.commit())[2]
    monkeypatch.undo()
    assert begun == []
    assert (done.finish_reason, done.token_ids) == ("cancelled", [])
    next_turn_is_right(live, root, lambda t: t.push_text("hello"), "")


@pytest.mark.parametrize("end", ["close", "drop"])
def test_an_iterator_that_ends_before_its_first_event_ends_the_turn(root: Path, end: str) -> None:
    live = Live(root)
    live.script(TEXT, [*CODES, 52])
    turn = live.session.turn(talker=LONG, thinker=LONG)
    turn.push_text("hello")
    events = turn.commit()
    if end == "close":
        events.close()  # type: ignore[attr-defined]
    del events
    gc.collect()
    assert turn.ended
    next_turn_is_right(live, root, lambda t: t.push_text("hello"), "")


@pytest.mark.parametrize("heard", [-1.0, float("nan"), "1 s"])
def test_what_was_heard_is_a_number_of_seconds(root: Path, heard: Any) -> None:
    live = Live(root)
    live.script("hello", [*range(30), 52])
    turn = live.session.turn()
    turn.push_text("hi")
    done = sort(turn.commit())[2]
    with pytest.raises(UsageError, match="seconds of speech"):
        turn.cancel(heard)
    assert done.finish_reason == "stop"
    next_turn_is_right(live, root, lambda t: t.push_text("hi"), "hello")


def test_cancel_twice_after_the_end_and_before_anything(live: Live, root: Path) -> None:
    live.script("hello", [*range(30), 52])
    turn = live.session.turn()
    turn.cancel()
    turn.cancel()
    turn = live.ask("hello")
    events = turn.commit()
    turn.cancel()  # committed, but nobody has asked for an event
    turn.cancel()
    turn.cancel(heard=1.0)
    done = sort(events)[2]
    assert (done.text, done.finish_reason) == ("", "cancelled")
    live.session.reset()
    turn = live.ask("hi")
    done = sort(turn.commit())[2]
    turn.cancel()
    assert done.finish_reason == "stop"
    next_turn_is_right(live, root, lambda t: t.push_text("hi"), "hello")


def test_text_that_was_read_counts_as_said(live: Live, root: Path) -> None:
    live.script(TEXT)
    turn = live.ask("hello", speak=False, thinker=LONG)
    events = turn.commit()
    for _ in range(7):
        next(events)
    turn.cancel()
    done = sort(events)[2]
    assert done.text == TEXT[:7]
    next_turn_is_right(live, root, lambda t: t.push_text("hello"), TEXT[:7])


@pytest.mark.parametrize(("heard", "said"), [(None, 2), (0.0, 0), (0.35, 1), (99.0, 2)])
def test_speech_that_was_heard_counts_as_said(root: Path, heard: float | None, said: int) -> None:
    """Two windows, 36 codes at 15 codes a token: two tokens. ``heard`` is what a loudspeaker got to play of it."""
    live, gate = gated(root, "talker", 150)  # the speech is not complete: the pace is not known
    turn = live.ask("hello", talker=LONG, thinker=LONG)
    events = turn.commit()
    chunks = 0
    while chunks < 2:
        chunks += isinstance(next(events), AudioChunk)
    gate.go.set()
    turn.cancel(heard)
    done = sort(events)[2]
    assert done.text == TEXT[:said]
    script(live, "talker", gate, "", [])
    next_turn_is_right(live, root, lambda t: t.push_text("hello"), TEXT[:said])


def test_the_pace_of_speech_is_learnt(live: Live) -> None:
    live.script("0123456789", [*CODES[:40], 52])
    assert live.say("hello", talker=LONG, thinker=LONG)[2].text == "0123456789"
    gate = Gate(live.backend.graphs["talker"], 150)
    live.script(TEXT, [*CODES, 52])
    live.backend.graphs["talker"] = gate
    turn = live.ask("again", talker=LONG, thinker=LONG)
    events = turn.commit()
    while not isinstance(next(events), AudioChunk):
        pass
    gate.go.set()
    turn.cancel()
    assert sort(events)[2].text == TEXT[:3]  # 12 codes at 4 a token


@pytest.mark.parametrize(("heard", "said"), [(0.0, ""), (0.25, "012"), (0.64, "01234567"), (99.0, "01234567")])
def test_a_reply_that_is_still_being_played_can_be_cut_back(live: Live, root: Path, heard: float, said: str) -> None:
    live.script("01234567", [*CODES[:32], 52])  # 0.64 s, 4 codes a token
    turn = live.ask("hello", talker=LONG, thinker=LONG)
    assert sort(turn.commit())[2].finish_reason == "stop"
    turn.cancel(heard)
    turn.cancel(heard)
    next_turn_is_right(live, root, lambda t: t.push_text("hello"), said)
    before = list(live.conversation.ids)
    turn.cancel(99.0)
    assert list(live.conversation.ids) == before


def test_an_iterator_that_is_dropped_cancels(live: Live, root: Path) -> None:
    live.script(TEXT, [*CODES, 52])
    turn = live.ask("hello", talker=LONG, thinker=LONG)
    for _ in turn.commit():
        break
    gc.collect()
    next_turn_is_right(live, root, lambda t: t.push_text("hello"), "")


@pytest.mark.parametrize(("graph", "at"), STAGES)
def test_a_worker_that_fails_ends_the_reply(root: Path, graph: str, at: int, room: int | None) -> None:
    live, gate = gated(root, graph, at, OmniportError("planted"), room)
    turn = live.ask("hello", talker=LONG, thinker=LONG)
    with pytest.raises(OmniportError, match="planted"):
        list(turn.commit())
    script(live, graph, gate, "", [])
    next_turn_is_right(live, root, None, "")


def test_a_push_that_fails_takes_the_turn_back(root: Path) -> None:
    live, gate = gated(root, "audio_encoder", 2, OmniportError("planted"))
    turn = live.session.turn()
    turn.push_audio(voice(3), 16000)
    with pytest.raises(OmniportError, match="planted"):
        turn.push_audio(voice(3), 16000)
    with pytest.raises(TurnEnded, match="ended by an error"):
        turn.commit()
    script(live, "audio_encoder", gate, "", [])
    next_turn_is_right(live, root, None, "")


def test_a_bug_keeps_its_type(root: Path) -> None:
    live, _ = gated(root, "dit", 3, ZeroDivisionError("bug"))
    with pytest.raises(ZeroDivisionError):
        live.say("hello", talker=LONG, thinker=LONG)


def test_a_slow_consumer_holds_the_workers_back(live: Live) -> None:
    live.script("a" * 3000, [k % 48 for k in range(1800)])
    endless = SamplingConfig(max_new_tokens=1800)
    events = live.ask("hello", talker=endless, thinker=endless).commit()
    next(events)
    time.sleep(0.2)
    last = -1
    while (now := sum(counts(live).values())) != last:  # until nothing moves any more
        last = now
        time.sleep(0.2)
    assert counts(live)["thinker"] < 400
    assert counts(live)["talker"] < 800
    listed = list(events)
    assert sum(isinstance(e, TextDelta) for e in listed) == 1799
    assert sum(len(e.samples) for e in listed if isinstance(e, AudioChunk)) == 1800 * 480


def test_two_sessions_in_two_threads(root: Path) -> None:
    loose = SamplingConfig(max_new_tokens=60, temperature=1.0)

    def talk(session: Any, seed: int) -> list[Any]:
        out = []
        for k in range(4):
            turn = session.turn(thinker=loose, talker=loose, seed=seed + k)
            turn.push_audio(voice(2.5, seed=seed), 16000)
            turn.push_text(f"question {k}")
            _, sound, done, _ = sort(turn.commit())
            out.append((done.token_ids, done.codec_ids, sound.tobytes()))
        return out

    alone = [talk(Live(root).session, seed) for seed in (0, 10)]
    shared = Live(root).session
    together = [start(talk, session, seed) for session, seed in ((shared, 0), (shared.fork(), 10))]
    assert [talked.result(60) for talked in together] == alone
    assert len({tuple(a[1]) for a in alone[0]}) == 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("codes", [1, 11, 12, 13, 24, 35, 36, 37, 60, 61, 130])
def test_workers_give_what_one_after_the_other_gives(live: Live, codes: int, temperature: float) -> None:
    config = SamplingConfig(max_new_tokens=codes, temperature=temperature, repetition_penalty=1.1)
    runs = []
    for threads in (True, False):
        live.script("", [])
        live.decoder("thinker").script = []
        reply = live.session.reply(
            [{"role": "user", "content": "hi"}], talker=config, thinker=config, seed=codes, threads=threads
        )
        runs.append(sort(reply))
    (_, together, a, _), (_, one, b, _) = runs
    assert (a.token_ids, a.codec_ids, a.text) == (b.token_ids, b.codec_ids, b.text)
    np.testing.assert_array_equal(together, one)
    assert len(together) == 480 * len(a.codec_ids)


def test_channel_blocks_wakes_and_ends() -> None:
    token = CancelToken()
    channel: Channel[int] = Channel(2, token, senders=2)
    sent: list[int] = []

    def send() -> None:
        for k in range(5):
            channel.send(k)
            sent.append(k)
        channel.close()

    sender = start(send)
    time.sleep(0.05)
    assert sent == [0, 1]
    assert [next(channel) for _ in range(5)] == list(range(5))
    sender.result(5)
    channel.close()
    assert list(channel) == []
    receiver = start(next, Channel(1, token))
    time.sleep(0.02)
    token.cancel()
    with pytest.raises(Cancelled):
        receiver.result(5)
    with pytest.raises(Cancelled):
        channel.send(1)
    with pytest.raises(Cancelled):  # a channel made after the token was set
        next(Channel(1, token))


def test_underruns() -> None:
    assert underruns([]) == (0, 0.0)
    assert underruns([(1.0, 0.5), (1.4, 0.5), (2.0, 0.5)]) == (0, 0.0)
    count, dry = underruns([(1.0, 0.5), (1.8, 0.5), (2.2, 0.1), (3.0, 1.0)])
    assert count == 2
    assert dry == pytest.approx(0.3 + 0.6)
