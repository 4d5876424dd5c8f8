"""Wren's mel against transformers' own spectrogram."""

from __future__ import annotations

import numpy as np
import pytest
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

torch = pytest.importorskip("torch")

from wren import mel, sizes  # noqa: E402


def test_mel_is_the_spectrogram_that_transformers_computes() -> None:
    sound = np.random.default_rng(0).normal(0, 0.1, 4800).astype(np.float32)
    around = (mel.FFT - sizes.HOP) // 2
    filters = mel_filter_bank(
        mel.FFT // 2 + 1, sizes.MELS, 0.0, mel.TOP_HZ, sizes.RATE, norm="slaney", mel_scale="slaney"
    )
    expected = spectrogram(
        np.pad(sound, around, mode="reflect"),
        window_function(mel.FFT, "hann"),
        mel.FFT,
        sizes.HOP,
        power=1.0,
        center=False,
        mel_filters=filters,
        mel_floor=mel.FLOOR,
    )
    np.testing.assert_allclose(mel.mel_of(sound).numpy(), np.log(expected).T, atol=1e-4)


def test_a_frame_is_centred_on_the_samples_that_the_vocoder_makes_of_it() -> None:
    sound = np.zeros(20 * sizes.HOP, np.float32)
    sound[7 * sizes.HOP : 8 * sizes.HOP] = np.random.default_rng(0).normal(0, 0.1, sizes.HOP)
    assert int(mel.mel_of(sound).mean(1).argmax()) == 7


def test_silence_is_the_floor() -> None:
    assert torch.allclose(mel.mel_of(np.zeros(2400, np.int16)), torch.tensor(np.log(mel.FLOOR), dtype=torch.float32))
