"""Run the runtime's Token2Wav for the speech checks, recording the graph calls."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray
from omniport.runtime.backends.base import Array, Backend, Graph, KvCache
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import OmniportError
from omniport.runtime.speech.token2wav import NoiseStream, Token2Wav
from omniport.runtime.speech.windows import Window

from ...evaluation.metrics import compare
from ..context import Context
from .speech_cases import SpeechCase, geometry

Wave = NDArray[np.float32]


@dataclass
class SpeechRun:
    """What the runtime made of a case.

    Attributes:
        chunks: samples float32 [n] in the order in which they came.
        late: samples that came when the end was asked for again.
        mels: float32 [80, T] as the vocoder got them, call by call.
        broken: the graph that first gave NaN or infinity.
        error: what the runtime raised.
    """

    chunks: list[Wave] = field(default_factory=list)
    late: int = 0
    mels: list[Wave] = field(default_factory=list)
    broken: str = ""
    error: str = ""

    @property
    def wave(self) -> Wave:
        """All samples, float32 [n]."""
        return np.concatenate([np.zeros(0, np.float32), *self.chunks])


class _TappedGraph:
    """A graph that keeps the mel it was given, and notes the first output that is not finite."""

    def __init__(self, graph: Graph, name: str, run: SpeechRun) -> None:
        self._graph, self._name, self._run = graph, name, run

    def run(self, feeds: Mapping[str, Array], cache: KvCache | None = None) -> dict[str, NDArray[np.float32]]:
        if "mel" in feeds:
            self._run.mels.append(np.array(feeds["mel"][0]))
        outputs = self._graph.run(feeds, cache)
        if not self._run.broken and not all(np.isfinite(array).all() for array in outputs.values()):
            self._run.broken = self._name
        return outputs

    def new_cache(self, capacity: int) -> KvCache:
        return self._graph.new_cache(capacity)


class _Tap:
    """A backend whose graphs are tapped into a run."""

    def __init__(self, backend: Backend, run: SpeechRun) -> None:
        self._backend, self._run = backend, run
        self.name = backend.name

    def graph(self, name: str) -> Graph:
        return _TappedGraph(self._backend.graph(name), name, self._run)

    def close(self) -> None:
        """The backend belongs to somebody else."""


def speak(context: Context, case: SpeechCase, window: Window, bundle: Bundle | None = None) -> SpeechRun:
    """The case through the runtime's own Token2Wav."""
    dit, _ = geometry(context)
    run, bundle = SpeechRun(), bundle or context.bundle
    noise = NoiseStream(case.noise, np.random.default_rng(0), dit.mel_dim)
    made = Token2Wav(_Tap(context.backend, run), bundle, bundle.voice(), noise, window=window)
    try:
        with np.errstate(all="ignore"):  # a graph that overflows is found by its result
            for code in case.codes:
                run.chunks += made.push(code)
            run.chunks += made.finish()
            run.late = sum(map(len, made.finish()))
    except OmniportError as error:
        run.error = str(error)
    return run


def streamed_mel(context: Context, run: SpeechRun) -> Wave:
    """The mel frames that became samples, [80, T]; fewer if the vocoder was not called once a chunk.

    Each vocoder call gets the kept tail of final frames, the chunk's new frames, and right context.
    """
    dit, vocoder = geometry(context)
    done, parts = 0, [np.zeros((dit.mel_dim, 0), np.float32)]
    for mel, chunk in zip(run.mels, run.chunks, strict=False):
        tail, count = min(done, vocoder.context_frames), len(chunk) // vocoder.hop
        parts.append(mel[:, tail : tail + count])
        done += count
    return np.concatenate(parts, axis=1)


def without_context(context: Context) -> Bundle:
    """The bundle as if its DiT looked neither back nor ahead."""
    dit, _ = geometry(context)
    bundle = copy.copy(context.bundle)
    blind = msgspec.structs.replace(dit, look_back_blocks=0, look_ahead_blocks=0)
    bundle.manifest = msgspec.structs.replace(bundle.manifest, dit=blind)
    return bundle


def mel_error(got: Wave, whole: SpeechRun) -> float:
    """Relative RMS difference from the whole reply's mel; infinite if that has another shape."""
    same = len(whole.mels) == 1 and got.shape == whole.mels[0].shape
    return float(compare(*centred(got, whole.mels[0]))["rel_rms"] or 0) if same else float("inf")


def centred(got: Wave, wanted: Wave) -> tuple[Wave, Wave]:
    """Both less the reference's mean: a log-mel lies around -5, and an error counts against what varies."""
    mean = wanted.mean()
    return got - mean, wanted - mean
