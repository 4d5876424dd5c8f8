"""What quantized DiT and vocoder cost: SQNR of mels and of samples, each graph alone against the base bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omniport.runtime.backends.base import Array, Backend, Graph, KvCache
from omniport.runtime.backends.onnxruntime.backend import OrtBackend
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.speech.token2wav import NoiseStream, Token2Wav


def sqnr(got: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Energy of the reference over energy of the difference, in dB."""
    wanted64 = wanted.astype(np.float64)
    energy = float((wanted64**2).sum())
    if energy == 0:
        raise SystemExit("the reference has no energy: nothing is measured")
    return 10 * float(np.log10(energy / ((got - wanted64) ** 2).sum()))


class Voice:
    """One bundle's DiT and vocoder, and the mel between them."""

    def __init__(self, root: Path, threads: int) -> None:
        self.bundle = Bundle.open(root)
        self._backend = OrtBackend(self.bundle, threads=threads)

    def mel(self, codes: list[int]) -> NDArray[np.float32]:
        """[80, T] for codes, from noise of seed 0."""
        tap = _Tap(self._backend)
        dit = self.bundle.manifest.dit
        assert dit is not None
        noise = NoiseStream(None, np.random.default_rng(0), dit.mel_dim)
        made = Token2Wav(tap, self.bundle, self.bundle.voice(), noise, window="whole")
        for code in codes:
            made.push(code)
        made.finish()
        return tap.mel

    def wave(self, mel: NDArray[np.float32]) -> NDArray[np.float32]:
        """Samples for a mel [80, T]."""
        outputs = self._backend.graph("bigvgan").run({"mel": mel[None]})
        return np.concatenate([array.reshape(-1) for array in outputs.values()])


class _Tap:
    """A backend that keeps the mel the vocoder is given."""

    name = "ort-cpu"

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.mel = np.zeros((80, 0), np.float32)

    def graph(self, name: str) -> Graph:
        return _Tapped(self, self._backend.graph(name)) if name == "bigvgan" else self._backend.graph(name)

    def close(self) -> None:
        """The backend is used again."""


class _Tapped:
    def __init__(self, tap: _Tap, graph: Graph) -> None:
        self._tap, self._graph = tap, graph

    def run(self, feeds: Mapping[str, Array], cache: KvCache | None = None) -> dict[str, NDArray[np.float32]]:
        self._tap.mel = np.array(feeds["mel"][0], np.float32)
        return self._graph.run(feeds, cache)

    def new_cache(self, capacity: int) -> KvCache:
        return self._graph.new_cache(capacity)


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
            row["mel"] = sqnr(voice.mel(codes) - mel.mean(), mel - mel.mean())
        if graphs["bigvgan"].compute:
            row["wave"] = sqnr(voice.wave(mel), wave)
        found[key] = row
    return found
