"""What quantized DiT and vocoder cost: SQNR of mels and of samples, each graph alone against the base bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from omniport.export.evaluation.recording import RecordingBackend
from omniport.export.evaluation.speech_metrics import snr_db
from omniport.runtime.backends.onnxruntime.backend import OrtBackend
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.speech.token2wav import NoiseStream, Token2Wav


class Voice:
    """One bundle's DiT and vocoder, and the mel between them."""

    def __init__(self, root: Path, threads: int) -> None:
        self.bundle = Bundle.open(root)
        self._backend = OrtBackend(self.bundle, threads=threads)

    def mel(self, codes: list[int]) -> NDArray[np.float32]:
        """[80, T] for codes, from noise of seed 0."""
        tap = RecordingBackend(self._backend)
        dit = self.bundle.manifest.dit
        assert dit is not None
        noise = NoiseStream(None, np.random.default_rng(0), dit.mel_dim)
        made = Token2Wav(tap, self.bundle, self.bundle.voice(), noise, window="whole")
        for code in codes:
            made.push(code)
        made.finish()
        mel: NDArray[np.float32] = tap.graph("bigvgan").calls[-1]["mel"][0]
        return mel

    def wave(self, mel: NDArray[np.float32]) -> NDArray[np.float32]:
        """Samples for a mel [80, T]."""
        outputs = self._backend.graph("bigvgan").run({"mel": mel[None]})
        return np.concatenate([array.reshape(-1) for array in outputs.values()])


def measure_speech(roots: Mapping[str, Path], threads: int, count: int) -> dict[str, dict[str, float]]:
    """Bundle -> SQNR in dB of its mel (less the mean) and of its samples for the base's mel; ``count`` random codes."""
    base = Voice(roots["base"], threads)
    dit = base.bundle.manifest.dit
    assert dit is not None
    codes = np.random.default_rng(0).integers(0, dit.num_embeds, count).tolist()
    mel = base.mel(codes)
    wave = base.wave(mel)
    found = {}
    for key, root in roots.items():
        if key == "base":
            continue
        voice, graphs = Voice(root, threads), Bundle.open(root).manifest.graphs
        row = {}
        if graphs["dit"].compute:
            row["mel"] = snr_db(voice.mel(codes) - mel.mean(), mel - mel.mean())
        if graphs["bigvgan"].compute:
            row["wave"] = snr_db(voice.wave(mel), wave)
        found[key] = row
    return found
