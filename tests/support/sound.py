"""Sounds for tests, and what was written of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray


def tone(seconds: float, rate: int = 16000) -> NDArray[np.float32]:
    """A sine of 220 Hz, float32 [n]."""
    return (0.3 * np.sin(2 * np.pi * 220 * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def read_speech(path: Path) -> NDArray[np.float32]:
    """The samples of a file in the rate of replies, 24 kHz."""
    samples, rate = soundfile.read(path, dtype="float32")
    assert rate == 24000
    return np.asarray(samples)
