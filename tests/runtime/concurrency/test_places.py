"""Limits on replies at once: who waits, in which order, who is refused, and what ends the waiting."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omniport.runtime import Busy, OmniSession, SamplingConfig, TurnEnded, UsageError
from omniport.runtime.concurrency.cancel import Cancelled, CancelToken
from omniport.runtime.concurrency.places import Place, Places
from omniport.runtime.concurrency.shared import Shared
from support.live_turns import Gate, Live, sort, start

ASKED = [{"role": "user", "content": "hi"}]
FEW = SamplingConfig(max_new_tokens=20, temperature=1.0)


def until(reached: Callable[[], bool]) -> None:
    end = time.perf_counter() + 20
    while not reached():
        assert time.perf_counter() < end
        time.sleep(0.0005)


def limited(root: Path, replies: int, waiting: int) -> tuple[Live, Places]:
    live, places = Live(root), Places(replies, waiting)
    live.session = OmniSession(live.bundle, live.backend, shared=Shared(places))
    return live, places


def held_up(live: Live) -> Gate:
    """The thinker stops in its first run, until it is let go."""
    gate = Gate(live.backend.graphs["thinker"])
    live.backend.graphs["thinker"] = gate
    return gate


# --- places -------------------------------------------------------------------------------------------------------


def test_places_are_given_in_order() -> None:
    places, order, go = Places(2, 10), list[int](), [threading.Event() for _ in range(5)]
    taken = [Place(places, CancelToken()) for _ in go]

    def hold(k: int) -> None:
        taken[k].wait()
        order.append(k)
        assert go[k].wait(20)
        taken[k].leave()

    running = []
    for k, place in enumerate(taken):
        place.enter()
        running.append(start(hold, k))
        until(lambda: len(order) + len(places._waiting) == len(running))
    assert order == [0, 1]
    for k, wanted in ((1, [0, 1, 2]), (0, [0, 1, 2, 3]), (3, [0, 1, 2, 3, 4])):
        go[k].set()
        until(lambda: len(order) == len(wanted))  # noqa: B023
        assert order == wanted
    for event in go:
        event.set()
    for each in running:
        each.result(20)
    assert (places._entered, places._running, places._waiting) == (set(), {}, [])


def test_one_more_is_refused_and_told_when_to_come_back() -> None:
    now = [0.0]
    places = Places(1, 1, lambda: now[0])
    first, second, third = (Place(places, CancelToken()) for _ in range(3))
    first.enter()
    first.enter()
    second.enter()
    with pytest.raises(Busy, match="1 replies at once and 1 that wait") as refused:
        third.enter()
    assert refused.value.seconds == 2.0  # two replies of a second, as long as nothing is known
    assert first.wait() == 0
    now[0] = 11.0
    first.leave()
    first.leave()
    third.enter()
    with pytest.raises(Busy) as refused:
        first.enter()
    assert refused.value.seconds == pytest.approx(2 * (1 + 0.2 * 10))
    assert not isinstance(refused.value, UsageError)


def test_who_does_not_wait_holds_nobody_back() -> None:
    places = Places(1, 3)
    first, second = (Place(places, CancelToken()) for _ in range(2))
    first.enter()
    second.enter()
    assert second.wait() < 1
    second.leave()
    assert first.wait() < 1


def test_cancelling_ends_the_waiting_and_lets_the_next_in() -> None:
    places, tokens = Places(1, 3), [CancelToken() for _ in range(3)]
    first, second, third = (Place(places, token) for token in tokens)
    first.wait()
    waiting = []
    for place in (second, third):
        waiting.append(start(place.wait))
        until(lambda: len(places._waiting) == len(waiting))
    tokens[1].cancel()
    with pytest.raises(Cancelled):
        waiting[0].result(20)
    first.leave()
    assert waiting[1].result(20) > 0
    assert list(places._running) == [third]


@pytest.mark.parametrize(("replies", "waiting"), [(0, 4), (-1, 4), (1.5, 4), (True, 4), (1, -1), (1, None), (1, 2.0)])
def test_limits_that_are_none(root: Path, replies: Any, waiting: Any) -> None:
    with pytest.raises(UsageError, match=r"max_(replies|waiting) is .*; a whole number"):
        OmniSession.open(root, max_replies=replies, max_waiting=waiting)


# --- replies ------------------------------------------------------------------------------------------------------


def test_a_reply_over_the_limit_waits_and_the_waiting_is_no_work(root: Path) -> None:
    live, _ = limited(root, 1, 1)
    alone = sort(Live(root).session.reply(ASKED, thinker=FEW, talker=FEW))
    gate = held_up(live)
    first = start(lambda: sort(live.session.reply(ASKED, thinker=FEW, talker=FEW)))
    assert gate.reached.wait(20)
    other = live.session.fork()
    second = start(lambda: sort(other.reply(ASKED, thinker=FEW, talker=FEW)))
    until(lambda: len(live.session._shared.places._waiting) == 1)
    with pytest.raises(Busy):
        live.session.reply(ASKED)
    time.sleep(0.3)
    gate.go.set()
    for reply in (first, second):
        _, sound, done, _ = reply.result(60)
        assert (done.token_ids, done.codec_ids) == (alone[2].token_ids, alone[2].codec_ids)
        assert sound.tobytes() == alone[1].tobytes()
    stats = second.result()[2].stats
    assert first.result()[2].stats.queued < 0.1
    assert 0.3 <= stats.queued <= stats.time_to_first_token
    assert stats.real_time_factor == pytest.approx((stats.total_time - stats.queued) / stats.audio_seconds)
    assert sum(stats.busy.values()) < stats.total_time
    assert sort(live.session.reply(ASKED, thinker=FEW, talker=FEW))[2].stats.queued < 0.1


@pytest.mark.parametrize("end", ["cancel", "close", "drop"])
def test_what_ends_a_reply_that_waits(root: Path, end: str) -> None:
    live, places = limited(root, 1, 4)
    gate = held_up(live)
    first = start(lambda: sort(live.session.reply(ASKED, thinker=FEW, talker=FEW)))
    assert gate.reached.wait(20)
    other = live.session.fork()
    turn = other.turn(thinker=FEW, talker=FEW)
    turn.push_text("and I?")
    events = turn.commit()
    waiting = start(lambda: list(events))
    until(lambda: len(places._waiting) == 1)
    {"cancel": turn.cancel, "close": other.close, "drop": events.close}[end]()  # type: ignore[attr-defined]
    listed = waiting.result(20)
    assert [event.finish_reason for event in listed] == ["cancelled"]
    assert turn.ended
    gate.go.set()
    assert first.result(60)[2].finish_reason == "length"
    assert (places._entered, places._waiting, places._running) == (set(), [], {})
    if end != "close":
        assert sort(other.reply(ASKED, thinker=FEW, talker=FEW))[2].finish_reason == "length"


def test_a_turn_that_is_refused_stays_open(root: Path) -> None:
    live, places = limited(root, 1, 0)
    events = live.session.reply(ASKED, thinker=FEW, talker=FEW)
    other = live.session.fork()
    turn = other.turn(thinker=FEW, talker=FEW)
    turn.push_text("a question")
    with pytest.raises(Busy):
        turn.commit()
    assert not turn.ended
    events.close()  # type: ignore[attr-defined]
    turn.push_text(", all of it")
    assert sort(turn.commit())[2].finish_reason == "length"
    wanted = Live(root).say("a question, all of it", thinker=FEW, talker=FEW)[2]
    assert sort_again(other, turn) == wanted.token_ids
    assert places._entered == set()


def sort_again(session: OmniSession, turn: Any) -> list[int]:
    """The reply's tokens as the conversation holds them."""
    entry = session._conversation.entries.find(turn.item_ids[-1])
    return [int(token) for token in entry.segments[1].ids]


def test_places_come_back_whatever_happens(root: Path) -> None:
    live, places = limited(root, 1, 0)
    with pytest.raises(Exception, match="nothing to reply to"):
        live.session.reply([{"role": "user", "content": ""}])
    turn = live.ask("a question")
    turn.commit()
    turn.cancel()
    with pytest.raises(TurnEnded):
        turn.commit()
    live.backend.graphs["thinker"] = Gate(live.backend.graphs["thinker"], error=OSError("broken"))
    with pytest.raises(OSError, match="broken"):
        list(live.session.reply(ASKED))
    assert (places._entered, places._waiting, places._running) == (set(), [], {})
