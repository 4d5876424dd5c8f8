"""Cases of the speech checks: codes to speak, what the reference makes of them, and what the runtime does, recorded."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from omniport.runtime.backends.base import (
    Array,
    Backend,
    BackendWrapper,
    Graph,
    GraphWrapper,
    KvCache,
    Outputs,
    RunHandle,
)
from omniport.runtime.bundle.manifest import DitGeometry, SamplingConfig, VocoderGeometry
from omniport.runtime.bundle.parts import PARTS, giving
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import OmniportError
from omniport.runtime.events import AudioChunk, Done
from omniport.runtime.session import OmniSession
from omniport.runtime.speech.token2wav import NoiseStream, Token2Wav
from omniport.runtime.speech.windows import Window
from torch import nn

from ...evaluation.metrics import compare
from ...models.speakers import Speaker, load_speakers
from ..context import Context
from ..reference import array_key

Wave = NDArray[np.float32]


@dataclass
class SpeechRun:
    """The runtime's result for a case.

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


class _TappedGraph(GraphWrapper):
    """A graph that keeps the mel it was given, and notes the first output that is not finite."""

    def __init__(self, graph: Graph, name: str, run: SpeechRun) -> None:
        super().__init__(graph)
        self._name, self._run = name, run

    def run(self, feeds: Mapping[str, Array], cache: KvCache | None = None, handle: RunHandle | None = None) -> Outputs:
        if "mel" in feeds:
            self._run.mels.append(np.array(feeds["mel"][0]))
        outputs = super().run(feeds, cache, handle)
        if not self._run.broken and not all(np.isfinite(array).all() for array in outputs.values()):
            self._run.broken = self._name
        return outputs


class _TappedBackend(BackendWrapper):
    """A backend whose graphs are tapped into a run."""

    def __init__(self, inner: Backend, run: SpeechRun) -> None:
        super().__init__(inner)
        self._run = run

    def graph(self, name: str) -> Graph:
        return _TappedGraph(super().graph(name), name, self._run)


def speak(context: Context, case: SpeechCase, window: Window, bundle: Bundle | None = None) -> SpeechRun:
    """The case through the runtime's own Token2Wav."""
    dit, _ = geometry(context)
    run, bundle = SpeechRun(), bundle or context.bundle
    noise = NoiseStream(case.noise, np.random.default_rng(0), dit.mel_dim)
    made = Token2Wav(_TappedBackend(context.backend, run), bundle, bundle.voice(), noise, window=window)
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


# --- cases ------------------------------------------------------------------------------------------------------------

#: codes of a reply: one, and both sides of the borders of one, three and five blocks of 12
FULL_LENGTHS = (1, 11, 12, 13, 35, 36, 37, 60, 61)
#: 61 has a window that starts after the first frame
QUICK_LENGTHS = (1, 13, 61)
#: lengths whose sound and mel are kept for the report
_KEPT = (37, 61)


@dataclass
class SpeechCase:
    """One reply: its codes and noise, and what the reference makes of them.

    Attributes:
        noise: float32 [2n, 80], the ODE's start. mel: float32 [80, 2n]. wave: float32 [480n].
    """

    name: str
    codes: list[int]
    noise: Wave
    key: str
    kept: bool
    mel: Wave = field(default_factory=lambda: np.zeros((80, 0), np.float32))
    wave: Wave = field(default_factory=lambda: np.zeros(0, np.float32))


def geometry(context: Context) -> tuple[DitGeometry, VocoderGeometry]:
    """DiT and vocoder of a bundle that speaks."""
    dit, vocoder = context.bundle.manifest.dit, context.bundle.manifest.vocoder
    assert dit is not None
    assert vocoder is not None
    return dit, vocoder


def speech_cases(context: Context) -> list[SpeechCase]:
    """Codes of every length of the suite: of a reply of the model, where it is loudest; random if it gives none.

    What a trained model makes of codes that nobody says is no speech: it has jumps at its seams and anywhere else.
    """
    dit, _ = geometry(context)
    needed = {name for name, part in PARTS.items() if part.speaks or part.decodes}
    reply = None
    if needed <= set(context.graphs):
        context.progress("speech: codes of a reply")
        reply = _spoken(context, max(FULL_LENGTHS))
    cases = []
    for count in FULL_LENGTHS if context.full else QUICK_LENGTHS:
        if reply is None:
            codes = np.random.default_rng(count).integers(0, dit.num_embeds, count).tolist()
        else:
            codes = reply.loudest(count)
        name = f"{count} codes" if count > 1 else "1 code"
        cases.append(_case(context, name, codes, count in _KEPT))
    return cases


@dataclass(frozen=True)
class _Spoken:
    """Codes of a reply, and the energy of what each of them sounds like."""

    codes: list[int]
    energy: list[float]

    def loudest(self, count: int) -> list[int]:
        """The ``count`` codes in a row that are loudest; a shorter reply is said again."""
        length = max(count, len(self.codes))
        codes, energy = np.resize(self.codes, length), np.resize(self.energy, length)
        start = int(np.convolve(energy, np.ones(count), "valid").argmax())
        return [int(code) for code in codes[start : start + count]]


def _case(context: Context, name: str, codes: list[int], kept: bool) -> SpeechCase:
    dit, _ = geometry(context)
    noise = _seeded_noise(len(codes), (1, len(codes) * dit.repeats, dit.mel_dim))[0]
    return SpeechCase(name, codes, noise.numpy(), array_key(np.asarray(codes, np.int64), noise.numpy()), kept)


def _seeded_noise(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The noise that ``sample`` draws first after ``torch.manual_seed(seed)``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.randn(shape)


def _spoken(context: Context, count: int) -> _Spoken | None:
    """At most ``count`` codes of a reply; None if the model says nothing or fails (end_to_end tells why)."""
    manifest = context.bundle.manifest
    assert manifest.talker_sampling is not None
    talker = msgspec.structs.replace(manifest.talker_sampling, max_new_tokens=count)
    session = OmniSession(context.bundle, context.backend)
    messages = [{"role": "user", "content": "What can you tell me about the sea?"}]
    thinker = SamplingConfig(max_new_tokens=24)
    try:
        with np.errstate(all="ignore"):  # a graph that overflows is found by its results
            events = list(
                session.reply(messages, thinker=thinker, talker=talker, seed=0, window="whole", threads=False)
            )
    except OmniportError:
        return None
    codes = [code for event in events if isinstance(event, Done) for code in event.codec_ids]
    waves = [event.samples for event in events if isinstance(event, AudioChunk)]
    if not codes or not waves:
        return None
    pieces = np.array_split(np.nan_to_num(np.concatenate(waves)), len(codes))
    return _Spoken(codes, [float(np.square(piece, dtype=np.float64).sum()) for piece in pieces])


def reference_mel(context: Context, case: SpeechCase) -> Wave:
    """float32 [80, T] of ``Qwen2_5OmniToken2WavDiTModel.sample`` with its own schedule and guidance."""
    voice = _reference_voice(context)

    def run(module: nn.Module) -> dict[str, torch.Tensor]:
        sample: Any = module.sample  # draws its noise first: the noise of this seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(len(case.codes))
            mel = sample(
                torch.from_numpy(voice.cond)[None],
                torch.from_numpy(voice.ref_mel)[None],
                torch.tensor([case.codes]),
            )
        return {"mel": mel[0]}

    return context.reference.result(
        giving("velocity").name, f"speech {case.key} {array_key(voice.cond, voice.ref_mel)}", run
    )["mel"]


def reference_wave(context: Context, case: SpeechCase) -> Wave:
    """float32 [n] of the reference's vocoder on the reference's mel."""

    def run(module: nn.Module) -> dict[str, torch.Tensor]:
        return {"wav": torch.as_tensor(module(torch.from_numpy(case.mel)[None])).reshape(-1)}

    return context.reference.result(giving("wav").name, f"speech {array_key(case.mel)}", run)["wav"]


def _reference_voice(context: Context) -> Speaker:
    return load_speakers(context.checkpoint.path / "spk_dict.pt")[context.bundle.find_voice().name]
