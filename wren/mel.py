"""The mel spectrogram between DiT and vocoder: 80 bins to 8 kHz, 100 frames a second, natural log of the amplitude.

The vocoder's class takes exactly this: it computes exp, then decibels, then clamps at -115 dB. flite's voices end at
8 kHz, and so do the bins.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from wren import sizes

FFT = 1024
TOP_HZ = 8000.0
FLOOR = 3e-4  # what is below is silence: ln -8.1

FILTERS = torch.from_numpy(
    mel_filter_bank(FFT // 2 + 1, sizes.MELS, 0.0, TOP_HZ, sizes.RATE, norm="slaney", mel_scale="slaney").T.astype(
        np.float32
    )
)
WINDOW = torch.hann_window(FFT)


def log_mel(sound: Tensor) -> Tensor:
    """[batch, n] -> [batch, n / 240, 80]; frame i is centred on the 240 samples that the vocoder makes of it."""
    around = (FFT - sizes.HOP) // 2
    padded = torch.nn.functional.pad(sound[:, None], (around, around), mode="reflect")[:, 0]
    amplitude = torch.stft(padded, FFT, sizes.HOP, window=WINDOW, center=False, return_complex=True).abs()
    return torch.log(torch.clamp(FILTERS @ amplitude, min=FLOOR)).transpose(1, 2)


def mel_of(sound: NDArray[np.int16] | NDArray[np.float32]) -> Tensor:
    """int16, or float32 between -1 and 1, [n] -> float32 [n / 240, 80]"""
    scale = 32768 if sound.dtype == np.int16 else 1
    return log_mel(torch.from_numpy(sound.astype(np.float32) / scale)[None])[0]
