"""How much of a reply was heard: what the client says, else an estimate from what was sent and when."""

from __future__ import annotations

import time

import pytest
from omniport.serve.realtime.responses.heard_sound import Playback


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_the_estimate_plays_what_was_sent_without_a_break(clock: list[float]) -> None:
    playback = Playback()
    assert playback.heard == 0.0
    playback.written(2.0)
    clock[0] += 0.5
    playback.written(1.0)
    assert (playback.sent, playback.heard) == (3.0, pytest.approx(0.5))
    clock[0] += 1.0
    assert playback.heard == pytest.approx(1.5)
    clock[0] += 10.0
    assert playback.heard == 3.0, "no more than was sent"


def test_a_gap_is_not_heard(clock: list[float]) -> None:
    playback = Playback()
    playback.written(1.0)
    clock[0] += 5.0
    playback.written(2.0)
    clock[0] += 0.25
    assert playback.heard == pytest.approx(1.25)


def test_what_the_client_says_counts(clock: list[float]) -> None:
    playback = Playback()
    playback.written(2.0)
    clock[0] += 1.5
    playback.played(0.7)
    assert playback.heard == 0.7
    playback.played(9.0)
    assert playback.heard == 2.0
