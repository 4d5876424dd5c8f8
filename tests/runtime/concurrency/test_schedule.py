"""Slots on shared cores, and the first sound before everything else: orders of graph runs over fake graphs."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omniport.runtime import Done, SamplingConfig
from omniport.runtime.backends.guarded import GuardedBackend
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.concurrency.cancel import Cancelled, CancelToken
from omniport.runtime.concurrency.pace import Pace
from omniport.runtime.concurrency.schedule import RunSlots, Share, _Run
from omniport.runtime.concurrency.timing import StageTimer
from omniport.runtime.speech.token2wav import NoiseStream, Token2Wav
from support.fake_backend import FakeBackend
from support.live_turns import Live, Watch, Watched, sort, start

SPEECH = ("thinker", "talker", "dit", "bigvgan")
TEXT = "the quick brown fox jumps over the lazy dog"
LONG = SamplingConfig(max_new_tokens=130)
ASKED = [{"role": "user", "content": "hi"}]


def watched(root: Path, room: int | None, text: str = TEXT) -> tuple[Live, Watch]:
    live, watch = Live(root, room), Watch()
    live.script(text, [*(k % 48 for k in range(120)), 52])
    for name in SPEECH:
        live.backend.graphs[name] = Watched(live.backend.graphs[name], name, watch)
    return live, watch


def say(live: Live, **options: Any) -> Done:
    return sort(live.session.reply(ASKED, thinker=LONG, talker=LONG, **options))[2]


def waiting(slots: RunSlots) -> int:
    """Runs that wait for a slot."""
    return len(slots._waiting)


def share(slots: RunSlots) -> Share:
    """One that nobody cancels."""
    return Share(CancelToken(), StageTimer(), slots)


def until(reached: Callable[[], bool]) -> None:
    """Wait for other threads to get somewhere; a test that waits in vain fails."""
    end = time.perf_counter() + 20
    while not reached():
        assert time.perf_counter() < end
        time.sleep(0.0005)


# --- slots --------------------------------------------------------------------------------------------------------


def test_the_nearest_to_the_sound_goes_first() -> None:
    slots = RunSlots(1)
    reply = share(slots)
    order: list[str] = []

    def run(name: str) -> None:
        with reply.slot(name):
            order.append(name)

    runs = []
    with reply.slot("vision_encoder"):
        for name in ("audio_encoder", *SPEECH):
            runs.append(start(run, name))
            until(lambda: waiting(slots) == len(runs))
        assert order == []
    for begun in runs:
        begun.result(20)
    assert order == ["bigvgan", "dit", "talker", "thinker", "audio_encoder"]


def test_as_many_at_once_as_there_is_room_for() -> None:
    slots = RunSlots(2)
    reply = share(slots)
    inside: list[str] = []
    go = threading.Event()

    def run(name: str) -> None:
        with reply.slot(name):
            inside.append(name)
            assert go.wait(20)

    runs = []
    for name in ("thinker", "dit", "talker"):
        runs.append(start(run, name))
        until(lambda: len(inside) + waiting(slots) == len(runs))
    assert (inside, waiting(slots)) == (["thinker", "dit"], 1)
    go.set()
    for begun in runs:
        begun.result(20)
    assert (inside[2], slots._running) == ("talker", 0)


def test_who_takes_a_slot_leaves_room_to_the_next() -> None:
    slots = RunSlots(2)
    reply = share(slots)
    entered, go = threading.Event(), threading.Event()

    def run() -> None:
        with reply.slot("thinker"):
            entered.set()
            assert go.wait(20)

    nearer = _Run(reply, 0)
    slots._waiting.append(nearer)  # it has not woken yet
    begun = start(run)
    until(lambda: waiting(slots) == 2)
    assert not entered.is_set()
    slots._waiting.remove(nearer)
    with reply.slot("dit"):
        assert entered.wait(5)
    go.set()
    begun.result(20)


def test_cancelling_wakes_who_waits_and_a_failed_run_frees_its_slot() -> None:
    slots, token = RunSlots(1), CancelToken()
    reply = Share(token, StageTimer(), slots)
    with pytest.raises(ZeroDivisionError), reply.slot("dit"):
        raise ZeroDivisionError

    def run() -> None:
        with reply.slot("dit"):
            pass

    with reply.slot("talker"):
        begun = start(run)
        until(lambda: waiting(slots) == 1)
        token.cancel()
        with pytest.raises(Cancelled):
            begun.result(20)
    assert (waiting(slots), slots._running) == (0, 0)


def test_waiting_for_a_slot_is_no_work() -> None:
    timer = StageTimer()
    with timer("dit"), timer("inner"):
        timer.leave_out(50.0)
        start(timer.leave_out, 1000.0).result(20)
    assert -51 < timer.busy["dit"] < -49
    assert -51 < timer.busy["inner"] < -49
    assert timer.left_out == 50.0
    slots = RunSlots(1)
    reply = Share(CancelToken(), timer, slots)

    def run() -> float:
        with reply.slot("dit"):
            pass
        return timer.left_out

    with reply.slot("talker"):
        waited = start(run)
        until(lambda: waiting(slots) == 1)
        began = time.perf_counter()
        until(lambda: time.perf_counter() > began + 0.01)
    assert waited.result(20) >= 0.01


@pytest.mark.parametrize(("room", "most"), [(1, 1), (2, 2)])
def test_graphs_of_a_reply_take_slots(root: Path, room: int, most: int) -> None:
    live, watch = watched(root, room)
    done = say(live)
    assert (done.text, len(done.codec_ids)) == (TEXT, 120)
    assert watch.most == most
    assert set(watch.log) == set(SPEECH)


def test_graphs_of_a_device_run_at_once(root: Path) -> None:
    live, watch = watched(root, None)
    say(live)
    assert watch.most > 1
    assert live.backend.at_once() is None
    assert GuardedBackend(live.backend, CancelToken(), StageTimer()).at_once() is None


def test_who_waits_is_counted_as_waiting(root: Path) -> None:
    live, _ = watched(root, 1, TEXT * 3)
    live.backend.graphs["thinker"] = Watched(live.backend.graphs["thinker"], "thinker", Watch(), seconds=0.004)
    stats = say(live).stats
    # 130 tokens of 4 ms each, and between two of them one evaluation of the DiT: it waits for most of the time
    assert 0 < stats.workers["token2wav"].busy < 3 * stats.busy["dit"]


# --- the first sound ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("words", [5, 24, 43])
def test_until_the_first_sound_nothing_is_made_that_it_does_not_take(root: Path, words: int) -> None:
    live, watch = watched(root, 1, TEXT[:words])
    done = say(live)
    before = watch.log[: watch.log.index("bigvgan") + 1]
    # 24 codes take 24 rows, or all there are; the first token and code come from the prompt.
    assert Counter(before) == {"thinker": 1 + min(24, words), "talker": 1 + 1 + 23, "dit": 36, "bigvgan": 1}
    assert before[-37:] == ["dit"] * 36 + ["bigvgan"]
    assert (done.text, len(done.codec_ids)) == (TEXT[:words], 120)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("room", [None, 2])
def test_with_room_beside_it_nobody_is_held(root: Path, room: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "hold", lambda self, made: pytest.fail("held"))
    assert say(Live(root, room)).finish_reason == "length"


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("window", ["stream", "whole"])
@pytest.mark.parametrize(
    ("words", "codes"), [(0, 40), (1, 0), (1, 40), (9, 3), (40, 0), (40, 1), (40, 23), (40, 24), (40, 25), (40, 60)]
)
def test_replies_that_end_before_the_first_window(root: Path, words: int, codes: int, window: Any) -> None:
    """Nobody is held for ever, and what is said does not change."""
    ran: list[Any] = []
    for threads in (True, False):
        live = Live(root, 1)
        live.script(TEXT[:words], [*range(codes), 52])
        reply = live.session.reply(ASKED, thinker=LONG, talker=LONG, window=window, threads=threads)
        _, sound, done, _ = sort(reply)
        ran.append((done.text, done.codec_ids, sound.tobytes()))
        assert done.text == TEXT[:words]
        assert len(sound) == 480 * len(done.codec_ids)
    assert ran[0] == ran[1]


def held(pace: Pace, token: CancelToken, made: int) -> bool:
    """Whether a worker that has made so many would wait: one that waits when the token is set is cancelled."""
    token.cancel()
    try:
        assert pace.hold(made) == 0.0
    except Cancelled:
        return True
    return False


@pytest.mark.parametrize(
    ("seconds", "made", "waits"),
    [(0.25, 24, True), (0.23, 24, False), (9.0, 23, False), (9.0, 25, False), (9.0, 24, True)],
)
def test_who_is_held(seconds: float, made: int, waits: bool) -> None:
    """The first 12 codes are heard for 0.24 s: who made 24 in that time makes the next 24 before they end."""
    now: Iterator[float] = iter([0.0, 5.0, 5.0 + seconds])
    token = CancelToken()
    pace = Pace(24, 100.0, lambda: next(now), token)
    pace.begin()
    assert held(pace, token, made) == waits


def test_release_lets_go() -> None:
    pace = Pace(24, 100.0, itertools.count(1.0).__next__, CancelToken())
    held = start(pace.hold, 24)
    pace.release()
    assert held.result(20) >= 0
    assert pace.hold(24) < 1


def test_windows_and_lead_are_those_that_were_simulated(root: Path) -> None:
    """With these no reply that keeps up gets another gap; others have to be simulated again.

    See docs/decisions/first-sound-first.md.
    """
    bundle = Bundle.open(root)
    noise = NoiseStream(None, np.random.default_rng(0), 80)
    windows = Token2Wav(FakeBackend(bundle.manifest, room=1), bundle, bundle.voice(), noise)
    assert windows.first_window == (24, 100.0)
    assert (windows._windows.chunks, windows._windows.behind) == ((12, 24, 48), 240)


def test_what_is_said_does_not_depend_on_slots(root: Path) -> None:
    loose = SamplingConfig(max_new_tokens=100, temperature=1.0)
    said = []
    for room in (None, 1, 2):
        live = Live(root, room)
        _, sound, done, _ = sort(live.session.reply(ASKED, thinker=loose, talker=loose, seed=3))
        said.append((done.token_ids, done.codec_ids, sound.tobytes()))
    assert said[1:] == [said[0]] * 2
    assert len(set(said[0][1])) > 10
