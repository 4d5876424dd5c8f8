"""Figures of sound on signals whose figures are known."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from omniport.export.evaluation.speech_metrics import (
    FLOOR_DB,
    clipped_share,
    log_mel_power,
    loudness_dbfs,
    mel_cepstral_distortion,
    mel_l1,
    misplaced_chunks,
    seam_figures,
    silent_share,
    snr_db,
    sound_figures,
    spectral_flatness,
    synthetic_kind,
    tone_share,
)
from omniport.export.validation.checks.asr import word_error_rate, words

RATE = 24000
Wave = NDArray[np.float32]


def voice(seconds: float = 0.5, seed: int = 0) -> Wave:
    """Gliding harmonics that open and close, over a little noise."""
    t = np.arange(round(seconds * RATE)) / RATE
    phase = 2 * np.pi * np.cumsum(130 + 40 * np.sin(2 * np.pi * 2 * t + seed)) / RATE
    harmonics = np.sum([np.sin(k * phase) / k for k in range(1, 30)], axis=0)
    noise = np.random.default_rng(seed).standard_normal(t.shape)
    return (0.15 * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * t)) * harmonics + 0.01 * noise).astype(np.float32)


def tone(hertz: float = 1000, seconds: float = 0.5, level: float = 0.3) -> Wave:
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def white(seconds: float = 0.5, level: float = 0.1) -> Wave:
    return (level * np.random.default_rng(9).standard_normal(round(seconds * RATE))).astype(np.float32)


def test_equal_waves_have_no_distance() -> None:
    wave = voice()
    figures = sound_figures(wave, wave.copy())
    assert figures["snr_db"] == 300
    assert figures["seconds"] == 0.5
    for name in ("mel_l1", "mcd_db", "loudness_error_db", "clipped_excess", "silent_excess"):
        assert figures[name] == 0, name
    assert figures["synthetic"] is None
    assert figures["flatness"] == figures["reference_flatness"]


def test_snr_of_a_known_error() -> None:
    wave = voice().astype(np.float64)
    error = np.random.default_rng(3).standard_normal(wave.size)
    for wanted in (-6.0, 20.0, 60.0):
        scale = np.sqrt(np.sum(wave**2) / np.sum(error**2)) * 10 ** (-wanted / 20)
        assert snr_db(wave + scale * error, wave) == pytest.approx(wanted, abs=1e-6)
    assert snr_db(wave, np.zeros_like(wave)) == -300
    with pytest.raises(ValueError, match="samples"):
        snr_db(wave[1:], wave)


def test_loudness_is_rms_of_full_scale() -> None:
    assert loudness_dbfs(np.ones(480)) == 0
    assert loudness_dbfs(tone(level=1.0)) == pytest.approx(-3.0103, abs=1e-3)
    assert loudness_dbfs(0.1 * np.ones(480)) == pytest.approx(-20)
    assert loudness_dbfs(np.zeros(480)) == loudness_dbfs(np.zeros(0)) == FLOOR_DB


def test_gain_is_level_and_not_spectrum() -> None:
    wave = voice()
    figures = sound_figures(wave * np.float32(0.5), wave)
    assert figures["loudness_error_db"] == pytest.approx(6.0206, abs=1e-3)
    # half the amplitude is a quarter of the power in every band
    assert figures["mel_l1"] == pytest.approx(np.log(4), rel=1e-3)
    assert figures["mcd_db"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("coefficient", [1, 5, 13])
def test_mel_cepstral_distortion_of_a_known_cepstrum(coefficient: int) -> None:
    """A cosine over the bands of height 2d is one cepstral coefficient of d."""
    bands = np.arange(80)
    ripple = 2 * 0.3 * np.cos(np.pi * coefficient * (bands + 0.5) / 80)
    wanted = log_mel_power(voice())
    assert mel_cepstral_distortion(wanted + ripple, wanted) == pytest.approx(10 / np.log(10) * np.sqrt(2) * 0.3)
    beyond = 0.6 * np.cos(np.pi * 14 * (bands + 0.5) / 80)
    assert mel_cepstral_distortion(wanted + beyond, wanted) == pytest.approx(0, abs=1e-9)
    assert mel_cepstral_distortion(wanted + 1, wanted) == pytest.approx(0, abs=1e-9)


def test_mel_sees_where_a_tone_is() -> None:
    low, high = log_mel_power(tone(500)), log_mel_power(tone(5000))
    assert low.shape == (50, 80)
    assert low.mean(0).argmax() < high.mean(0).argmax()
    assert mel_l1(low, high) > 1
    assert mel_cepstral_distortion(low, high) > 5
    assert log_mel_power(np.zeros(1)).shape == (1, 80)


def test_other_speech_is_far() -> None:
    figures = sound_figures(voice(seed=1), voice(seed=0))
    assert figures["mel_l1"] > 0.1  # type: ignore[operator]
    assert figures["mcd_db"] > 1  # type: ignore[operator]


def test_clipping_and_silence_are_shares() -> None:
    wave = tone()
    wave[: wave.size // 4] = 1.0
    assert clipped_share(wave) == 0.25
    assert clipped_share(-np.ones(4)) == 1
    wave[: wave.size // 5] = 0
    assert silent_share(wave) == 0.2
    assert silent_share(0.99e-3 * np.ones(480)) == 1
    assert silent_share(1.01e-3 * np.ones(480)) == 0
    assert silent_share(np.zeros(0)) == 1
    figures = sound_figures(wave, tone())
    assert figures["silent_excess"] == 0.2
    assert figures["clipped_excess"] == pytest.approx(0.05)


def test_flatness_and_tone_share() -> None:
    assert spectral_flatness(white()) > 0.5
    assert spectral_flatness(voice()) < 0.3
    assert spectral_flatness(tone()) < 0.01
    assert spectral_flatness(np.zeros(4800)) == 0
    assert tone_share(tone()) > 0.99
    assert tone_share(voice()) < 0.8
    assert tone_share(np.zeros(4800)) == 0


@pytest.mark.parametrize(
    ("wave", "kind"),
    [
        (np.zeros(12000, np.float32), "silent"),
        (np.full(12000, 1e-5, np.float32), "silent"),
        (np.zeros(0, np.float32), "silent"),
        (np.full(12000, 0.2, np.float32), "constant"),
        (tone(), "a pure tone"),
        (white(), "white noise"),
    ],
    ids=["zeros", "nearly", "empty", "constant", "tone", "noise"],
)
def test_what_is_no_speech_is_named(wave: Wave, kind: str) -> None:
    assert synthetic_kind(wave, voice()) == kind
    assert synthetic_kind(voice(), voice(seed=1)) is None
    if wave.size:
        assert synthetic_kind(wave, wave) is None  # what the reference is too is no fault


@pytest.mark.parametrize("count", [480, 5760])
def test_short_waves_have_figures(count: int) -> None:
    wave = voice()[:count]
    figures = sound_figures(wave, wave)
    assert all(np.isfinite(value) for value in figures.values() if isinstance(value, float))
    assert figures["synthetic"] is None


def test_seams() -> None:
    wave = voice()
    clean = seam_figures(wave, wave, [4800, 9600])
    assert clean == {"seams": 2, "seam_jump": 0, "seam_error": 0, "seam_mel_l1": 0}
    assert seam_figures(wave, wave, [])["seams"] == 0
    click = wave.copy()
    click[4800] += 0.2
    figures = seam_figures(click, wave, [4800, 9600])
    step = np.sqrt(np.mean(np.diff(wave[4560:5040].astype(np.float64)) ** 2))
    assert figures["seam_jump"] == pytest.approx(0.2 / step, rel=1e-4)
    assert figures["seam_mel_l1"] > 0.1  # type: ignore[operator]
    assert seam_figures(click, wave, [9600])["seam_jump"] == 0  # not at this seam
    shifted = np.concatenate([wave[:4800], wave[4830:], wave[:30]])
    figures = seam_figures(shifted, wave, [4800])
    assert figures["seam_jump"] > 0.5  # type: ignore[operator]
    assert figures["seam_error"] > 0.25  # type: ignore[operator]
    with pytest.raises(ValueError, match="samples"):
        seam_figures(wave[1:], wave, [100])


def test_a_reply_that_differs_everywhere_has_no_seam_for_it() -> None:
    """Coarse activations round otherwise in windows than in the whole, at a seam as anywhere else."""
    draw = np.random.default_rng(0)
    wave = np.sin(np.arange(14400) * 0.05).astype(np.float32) * 0.1
    noisy = wave + draw.normal(0, 0.02, wave.shape).astype(np.float32)
    assert seam_figures(noisy, wave, [4800, 9600])["seam_error"] < 0.1  # type: ignore[operator]
    noisy[4800:4900] += 0.1
    figures = seam_figures(noisy, wave, [4800, 9600])
    assert figures["seam_error"] > 0.25  # type: ignore[operator]
    assert figures["seam_jump"] > 5  # type: ignore[operator]


def test_a_seam_in_a_pause_is_measured_against_the_speech() -> None:
    wave = voice()
    wave[4000:6000] = 0
    faint = wave.copy()
    faint[4800] += 1e-6
    figures = seam_figures(faint, wave, [4800])
    assert figures["seam_jump"] < 0.01  # type: ignore[operator]
    assert figures["seam_error"] < 0.01  # type: ignore[operator]


def test_misplaced_chunks_are_found() -> None:
    wave = voice(1.0)
    chunks = [wave[:6000], wave[6000:18000], wave[18000:]]
    assert misplaced_chunks(chunks, wave) == []
    assert misplaced_chunks([chunks[0], chunks[0], *chunks[1:]], wave)[0] == (
        "chunk 1 (samples 6000 to 12000) holds the sound of samples 0 to 6000"
    )
    assert misplaced_chunks([chunks[0], chunks[2]], wave) == [
        "chunk 1 (samples 6000 to 12000) holds the sound of samples 18000 to 24000"
    ]
    assert misplaced_chunks([chunks[0], white()[:6000]], wave) == []
    assert misplaced_chunks([np.zeros(100, np.float32), np.zeros(0, np.float32)], wave) == []


@pytest.mark.parametrize(
    ("heard", "spoken", "rate"),
    [
        ("The sea is blue.", "the sea, is BLUE", 0),
        ("the is blue", "the sea is blue", 0.25),
        ("the deep sea was blue", "the sea is blue", 0.5),
        ("", "the sea", 1),
        ("a b c d", "e f", 2),
        ("it's naïve", "its nai\u0308ve", 0),
    ],
)
def test_word_error_rate(heard: str, spoken: str, rate: float) -> None:
    assert word_error_rate(words(heard), words(spoken)) == rate
