"""Several replies over one backend: who gets the cores next, on a clock set by hand, and that nobody starves."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omniport.runtime import AudioChunk, Done, OmniSession, SamplingConfig
from omniport.runtime.backends.checked import CheckedBackend
from omniport.runtime.backends.guarded import GuardedBackend, slots_of
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.concurrency.cancel import Cancelled, CancelToken
from omniport.runtime.concurrency.schedule import FIRST_SOUND, RunSlots, Share, _Run
from omniport.runtime.concurrency.timing import StageTimer
from support.fake_backend import FakeBackend
from support.live_turns import Live, Watch, Watched, sort, start, voice

LOOSE = SamplingConfig(max_new_tokens=40, temperature=1.0)


@dataclass
class Talker:
    """Something that always has a run waiting: how long one takes, and seconds of sound that each run makes."""

    share: Share
    seconds: float
    makes: float = 0.0
    runs: int = 0
    worked: float = 0.0
    log: list[float] = field(default_factory=list)


class Machine:
    """Runs what the slots let in, one after the other, on its own clock."""

    def __init__(self, count: int = 1) -> None:
        self.now = 100.0
        self.slots = RunSlots(count, lambda: self.now)
        self.talkers: list[Talker] = []

    def add(self, seconds: float, makes: float = 0.0) -> Talker:
        """Somebody asks now."""
        self.talkers.append(Talker(Share(CancelToken(), StageTimer(), self.slots), seconds, makes))
        return self.talkers[-1]

    def go(self, until: Callable[[], bool], most: int = 10000) -> list[Talker]:
        """Who ran, in order."""
        order = []
        while not until():
            assert len(order) < most
            order.append(self.step())
        return order

    def step(self) -> Talker:
        slots = self.slots
        runs = {talker.share: _Run(talker.share, 0) for talker in self.talkers}
        slots._waiting = list(runs.values())
        pauses = {talker.share: slots._pause(runs[talker.share]) for talker in self.talkers}
        if 0.0 not in pauses.values():  # a slot is kept for who has just run: all of them wait here
            self.now += 0.01
            pauses = {talker.share: slots._pause(runs[talker.share]) for talker in self.talkers}
        (chosen,) = [talker for talker in self.talkers if pauses[talker.share] == 0.0]
        run = runs[chosen.share]
        run.owed = slots._owed(chosen.share, self.now) > 0
        slots._waiting.remove(run)
        slots._running += 1
        self.now += chosen.seconds
        with slots._changed:
            slots._leave(run, chosen.seconds)
        chosen.runs += 1
        chosen.worked += chosen.seconds
        chosen.log.append(self.now)
        if chosen.makes:
            chosen.share.give(chosen.makes)
        return chosen


# --- who is next --------------------------------------------------------------------------------------------------


def test_of_two_that_have_not_sounded_the_older_goes_first() -> None:
    machine = Machine()
    first = machine.add(0.01)
    machine.now += 0.1
    machine.add(0.01)
    assert machine.go(lambda: first.runs == 20) == [first] * 20


def test_who_has_sound_ahead_lets_a_new_question_go_first() -> None:
    machine = Machine()
    speaking = machine.add(0.01)
    speaking.share.give(3.0)
    new = machine.add(0.01)
    assert machine.go(lambda: new.runs == 30) == [new] * 30
    new.share.give(4.0)
    assert machine.step() is speaking


def test_who_is_about_to_run_dry_goes_before_a_new_question() -> None:
    machine = Machine()
    speaking = machine.add(0.01)
    speaking.share.give(FIRST_SOUND / 2)
    machine.add(0.01)
    assert machine.step() is speaking


def test_of_two_that_speak_the_one_with_less_sound_ahead_goes_first() -> None:
    machine = Machine()
    rich, poor = machine.add(0.01), machine.add(0.01)
    rich.share.give(2.0)
    poor.share.give(1.0)
    assert machine.step() is poor
    poor.share.give(1.5)
    assert machine.step() is rich
    machine.now += 9  # both have run dry: the one that has been longer goes first
    rich.share.give(0.5)
    assert machine.step() is poor


def test_two_that_keep_up_never_run_dry() -> None:
    """Each makes 0.5 s of sound in 0.2 s: both take 0.8 of the time. A third asks, is heard soon, and stops."""
    machine = Machine()
    both = [machine.add(0.2, makes=0.5) for _ in range(2)]
    machine.go(lambda: machine.now > 120)
    new = machine.add(0.02)
    asked = machine.now
    machine.go(lambda: new.runs == 20)  # 0.4 s of work alone
    machine.talkers.remove(new)
    assert machine.now - asked < 1.5
    machine.go(lambda: machine.now > 140)
    for one in both:
        late = [b - a for a, b in itertools.pairwise(one.log)]
        assert max(late) < 0.2 + 0.5 * len(one.log)
        assert one.share.due > machine.now


def test_a_live_piece_does_not_wait_for_a_reply_that_has_sound_ahead() -> None:
    machine = Machine()
    speaking = machine.add(0.05, makes=0.2)
    machine.go(lambda: speaking.share.due > machine.now + 2)
    spoken = machine.add(0.05)
    assert machine.go(lambda: spoken.runs == 3) == [spoken] * 3


# --- nobody starves -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [1, 2, 5])
def test_a_reply_that_is_late_is_never_starved(others: int) -> None:
    """Beside work without end that is due sooner, each late one gets its stated part of the time, whatever its runs."""
    machine = Machine()
    hog = machine.add(0.3)
    machine.now += 1
    late = [machine.add(0.01 * 3**k) for k in range(others)]
    machine.now += 10
    begun = machine.now
    machine.go(lambda: machine.now > begun + 200)
    for one in late:
        foreign = machine.now - begun - one.worked
        assert one.worked > foreign / (2 * (others + 1)) - 2 * one.seconds - 0.3
        gaps = np.diff([begun, *one.log, machine.now])
        # until it has made up for its own run, and then behind one run of everybody
        assert gaps.max() <= 2 * (others + 1) * one.seconds + 0.3 + 2 * sum(each.seconds for each in late)
    assert hog.worked > 200 * 0.4  # need still decides over half of the time


def test_who_is_not_late_is_owed_nothing() -> None:
    machine = Machine()
    speaking, hog = machine.add(0.01), machine.add(0.1)
    speaking.share.give(5.0)
    hog.share.due -= 1
    assert machine.go(lambda: machine.now > 104) == [hog] * hog.runs
    machine.now += 2
    assert hog.runs > 10
    machine.step()
    assert speaking in machine.go(lambda: machine.now > 107)


def test_random_shares_all_get_on() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        machine = Machine()
        count = int(rng.integers(2, 8))
        all_of = [machine.add(float(rng.uniform(0.001, 0.5)), float(rng.choice([0, 0.05, 1.0]))) for _ in range(count)]
        machine.now += 5
        begun = machine.now
        machine.go(lambda: machine.now > begun + 100)  # noqa: B023
        longest = sum(2 * (count + 1) * one.seconds for one in all_of)
        for one in all_of:
            dry = [b - a - one.makes for a, b in itertools.pairwise([begun, *one.log, machine.now])]
            assert max(dry) < longest


# --- slots --------------------------------------------------------------------------------------------------------


def test_a_slot_is_kept_for_who_has_just_run_and_is_due_sooner() -> None:
    machine = Machine()
    urgent, other = machine.add(0.004), machine.add(0.004)
    other.share.due += 5
    assert machine.step() is urgent
    run = _Run(other.share, 0)
    machine.slots._waiting = [run]
    assert machine.slots._pause(run) == pytest.approx(0.002)  # half of its run
    machine.now += 0.0021
    assert machine.slots._pause(run) == 0.0
    mine = _Run(urgent.share, 3)
    machine.slots._waiting = [mine]
    assert machine.slots._pause(mine) == 0.0


def test_all_sessions_over_a_backend_have_the_same_slots(root: Path) -> None:
    bundle = Bundle.open(root)
    backend, other = FakeBackend(bundle.manifest, room=1), FakeBackend(bundle.manifest, room=1)
    slots = slots_of(backend)
    assert slots is slots_of(CheckedBackend(backend, bundle.manifest.graphs)) is not None
    assert slots is slots_of(GuardedBackend(backend, CancelToken(), StageTimer()))
    assert slots is not slots_of(other)
    assert slots_of(FakeBackend(bundle.manifest)) is None
    backend.room = 2
    assert (again := slots_of(backend)) is not None
    assert again.count == 2


def test_cancelling_one_reply_lets_the_next_in() -> None:
    slots, token = RunSlots(1), CancelToken()
    first, second = Share(token, StageTimer(), slots), Share(CancelToken(), StageTimer(), slots)
    go = threading.Event()

    def hold() -> None:
        with second.slot("dit"):
            assert go.wait(20)

    def run(share: Share) -> str:
        with share.slot("dit"):
            return "ran"

    holding = start(hold)
    while not slots._running:
        pass
    waiting = [start(run, share) for share in (first, second)]
    while len(slots._waiting) < 2:
        pass
    token.cancel()
    with pytest.raises(Cancelled):
        waiting[0].result(20)
    go.set()
    assert waiting[1].result(20) == "ran"
    holding.result(20)
    assert (slots._running, slots._waiting) == (0, [])


# --- replies ------------------------------------------------------------------------------------------------------


def talk(session: OmniSession, seed: int) -> list[Any]:
    out = []
    for k in range(2):
        turn = session.turn(thinker=LOOSE, talker=LOOSE, seed=seed + k)
        turn.push_audio(voice(2.5, seed=seed), 16000)
        turn.push_text(f"question {k}")
        _, sound, done, _ = sort(turn.commit())
        out.append((done.token_ids, done.codec_ids, sound.tobytes()))
    return out


@pytest.mark.parametrize(("room", "most"), [(1, 1), (2, 2)])
def test_replies_at_once_are_those_of_each_alone(root: Path, room: int, most: int) -> None:
    alone = [talk(Live(root, room).session, seed) for seed in (0, 10, 20)]
    live, watch = Live(root, room), Watch()
    for name in live.backend.graphs:
        live.backend.graphs[name] = Watched(live.backend.graphs[name], name, watch)
    sessions = [live.session, live.session.fork(), OmniSession(live.bundle, live.backend)]
    together = [start(talk, session, seed) for session, seed in zip(sessions, (0, 10, 20), strict=True)]
    assert [talked.result(120) for talked in together] == alone
    assert watch.most == most


def test_three_forks_at_once_are_each_alone(tiny_bundle: Path) -> None:
    """Real graphs on the CPU: what is said, and its sound, bit for bit."""
    with OmniSession.open(tiny_bundle, "ort-cpu") as session:
        alone = [talk(fork, seed) for seed in (0, 10, 20) for fork in [session.fork()]]
        together = [start(talk, session.fork(), seed) for seed in (0, 10, 20)]
        assert [talked.result(300) for talked in together] == alone
        assert len({tuple(codes) for said in alone for _, codes, _ in said}) == 6


def test_a_speaking_user_is_heard_while_another_hears_a_reply(root: Path) -> None:
    """A piece of sound is encoded and prefilled at once, beside a reply that has sound ahead, on one core."""
    live, watch = Live(root, 1), Watch()
    live.script("the quick brown fox", [*(k % 48 for k in range(400)), 52])
    for name in live.backend.graphs:
        live.backend.graphs[name] = Watched(live.backend.graphs[name], name, watch, seconds=0.002)
    long = SamplingConfig(max_new_tokens=410)
    events = live.session.reply([{"role": "user", "content": "hi"}], talker=long)
    heard = 0.0
    while heard < 1.5:
        event = next(events)
        heard += len(event.samples) / event.sample_rate if isinstance(event, AudioChunk) else 0.0
    with live.session.fork().turn(speak=False) as turn:
        before = len(watch.log)
        turn.push_audio(voice(2.5), 16000)
        taken = watch.log[before:]
    assert "audio_encoder" in taken
    assert len(taken) <= 8, taken  # two runs of its own, and no more than those that were under way or between two
    *_, done = events
    assert isinstance(done, Done)
    assert len(done.codec_ids) == 400
