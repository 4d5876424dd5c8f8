"""Compare quantized bundles with the one they were made from, by running them.

All figures come from runs in ONNX Runtime on the CPU over the same recorded calls
(`omniport.calib.report.recorded_calls`). A figure that could not be measured is listed in ``missing`` with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from omniport.export.evaluation.hearing import Ear
from omniport.export.evaluation.machine import environment, usable_threads
from omniport.export.evaluation.questions import AnswerFigures, answers, figures, read_questions
from omniport.export.evaluation.recording import RecordingBackend
from omniport.export.evaluation.speech_metrics import log_mel_power, mel_cepstral_distortion, mel_l1
from omniport.runtime.backends.onnxruntime.backend import OrtBackend
from omniport.runtime.bundle.parts import giving
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import UsageError
from omniport.runtime.session import OmniSession
from omniport.runtime.speech.token2wav import NoiseStream, Token2Wav
from omniport.runtime.system.path_arguments import paths_checked
from omniport.runtime.system.progress import Progress

from ..calibration_file import Calibration
from .layer_loss import LayerLoss, layer_losses, sqnr_db
from .recorded_calls import Calls, Loss, Recording, Replayed, loss_of, record, replay

Wave = NDArray[np.float32]
#: calls that are few, and how often they are made
_FEW, _ROUNDS = 100, 3


class GraphLoss(msgspec.Struct, frozen=True, kw_only=True):
    """One graph of a bundle.

    Attributes:
        loss: against the unquantized graph; None where it was given no calls.
        prefill_ms, step_ms: of a decoder's longest and shortest call; ``step_ms`` of other graphs' fastest call.
    """

    graph: str
    precision: str
    bytes: int
    loss: Loss | None = None
    prefill_ms: float = 0.0
    step_ms: float = 0.0
    layers: list[LayerLoss] = []


class SoundLoss(msgspec.Struct, frozen=True, kw_only=True):
    """The same codes and noise said by both bundles.

    Attributes:
        mel_sqnr_db: of the DiT's mel, solved to the end. wave_sqnr_db: of the waveform; phases count.
        mel_l1: mean difference of log-mel power of the waveforms, in nepers. mcd_db: mel-cepstral distortion.
    """

    seconds: float
    mel_sqnr_db: float
    wave_sqnr_db: float
    mel_l1: float
    mcd_db: float


class BundleLoss(msgspec.Struct, frozen=True, kw_only=True):
    """One bundle. ``answers``: to a question set. ``missing``: what was not measured -> why."""

    name: str
    recipe: str
    bytes: int
    graphs: list[GraphLoss]
    sound: SoundLoss | None = None
    answers: AnswerFigures | None = None
    missing: dict[str, str] = {}


class RangePlot(msgspec.Struct, frozen=True, kw_only=True):
    """Histogram of one layer's input during calibration: counts of |x| in equal bins from 0 to ``top``, and ranges."""

    graph: str
    site: str
    top: float
    counts: list[int]
    clips: dict[str, float]


class LossReport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything. ``bundles``: the unquantized one first."""

    base: str
    source: str
    fingerprint: str
    conversations: list[str]
    steps: dict[str, int]
    bundles: list[BundleLoss]
    ranges: list[RangePlot] = []
    missing: dict[str, str] = {}
    environment: dict[str, str]


class Comparison(NamedTuple):
    """What `compare` gives: the report, and a waveform float32 [n] of each bundle that speaks, by the bundle's name."""

    report: LossReport
    waves: dict[str, Wave]


@paths_checked
def compare(
    base: str | os.PathLike[str],
    bundles: Sequence[str | os.PathLike[str]],
    *,
    data: str | os.PathLike[str] | None = None,
    questions: str | os.PathLike[str] | None = None,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Measure bundles against the one that they were made from.

    Args:
        base: not quantized.
        bundles: made from the same checkpoint.
        data: JSON lines with ``messages``; built-in conversations without.
        questions: a question set (`omniport.export.evaluation.questions`), which every bundle answers.
        calibration: whose ranges are shown.
        progress: called with what is measured, and bundles done and in all.

    Raises:
        UsageError: bundles of different checkpoints, an unquantized one among ``bundles``, or unusable ``data``.
        CheckFailed: outputs without energy, or not finite.
        BundleError: a bundle is damaged.
    """
    told = progress or (lambda _what, _done, _total: None)
    opened = Bundle.open(base)
    others = [_opened(path, opened) for path in bundles]
    if opened.manifest.quantization is not None:
        raise UsageError(f"{base} is quantized: give the bundle that the others were made from first")
    if calibration is not None:
        calibration.check(opened.manifest.source.fingerprint, base)
    asked = None if questions is None else _Asked(Path(questions), opened)
    names = _names([Path(path) for path in (base, *bundles)])
    recording = record(opened, data=data, progress=lambda what, _d, _t: told(what, 0, len(others) + 1))
    waves: dict[str, Wave] = {}
    rows, reference = [], _Sound(recording.codes)
    for number, (name, bundle) in enumerate(zip(names, [opened, *others], strict=True)):
        told(f"measuring {name}", number, len(names))
        work = _Measured(opened, bundle, recording)
        row = work.row(name, reference, waves)
        rows.append(row if asked is None else asked.add(row, bundle))
    report = LossReport(
        base=names[0],
        source=opened.manifest.source.name,
        fingerprint=opened.manifest.source.fingerprint,
        conversations=list(recording.conversations),
        steps={name: len(calls.feeds) for name, calls in recording.calls.items()},
        bundles=rows,
        ranges=[] if calibration is None else _ranges(calibration),
        missing={} if calibration is not None else {"ranges": "no calibration was given (--calib)"},
        environment=environment(usable_threads(opened)),
    )
    return Comparison(report, waves)


class _Asked:
    """A question set, and the ear that hears the answers."""

    def __init__(self, path: Path, base: Bundle) -> None:
        with OmniSession.open(base.root) as session:
            self.set = read_questions(path, session.manifest, session.text_codec)
        self.ear = Ear(self.set.grammar) if base.manifest.speaks else None

    def add(self, row: BundleLoss, bundle: Bundle) -> BundleLoss:
        """A bundle's row with the figures of its answers."""
        vocoder = bundle.manifest.vocoder
        with OmniSession.open(bundle.root) as session:
            given = list(answers(session, self.set.questions))
        rate = vocoder.sample_rate if vocoder is not None else 0
        return msgspec.structs.replace(row, answers=figures(given, self.ear, rate))


def _opened(path: str | os.PathLike[str], base: Bundle) -> Bundle:
    bundle = Bundle.open(path)
    if bundle.manifest.source.fingerprint != base.manifest.source.fingerprint:
        raise UsageError(f"{path} was made from another checkpoint than {base.root}: there is nothing to compare")
    return bundle


def _names(paths: Sequence[Path]) -> list[str]:
    """Folder names, or whole paths where two are the same."""
    short = [path.resolve().name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


class _Measured:
    """One bundle's measurements."""

    def __init__(self, base: Bundle, bundle: Bundle, recording: Recording) -> None:
        self.base, self.bundle, self.recording = base, bundle, recording
        self.threads = usable_threads(base)

    def row(self, name: str, reference: _Sound, waves: dict[str, Wave]) -> BundleLoss:
        """Everything of the bundle; its waveform goes to ``waves``."""
        manifest, missing = self.bundle.manifest, dict[str, str]()
        graphs = []
        backend = OrtBackend(self.bundle, threads=self.threads)
        for graph in manifest.graphs:
            calls = self.recording.calls.get(graph)
            if calls is None:
                missing[graph] = "no conversation reached it"
            made = None if calls is None else replay(backend.graph(graph), graph, calls, _rounds(calls))
            graphs.append(self._graph(graph, calls, made))
        sound = None
        if not self.recording.codes or not manifest.speaks:
            missing["sound"] = "the bundle does not speak" if not self.recording.codes else "it lacks speech graphs"
        else:
            mel, wave = reference.of(self.bundle, backend)
            waves[name] = wave
            assert manifest.vocoder is not None
            sound = reference.loss(mel, wave, manifest.vocoder.sample_rate)
        backend.close()
        record = manifest.quantization
        return BundleLoss(
            name=name,
            recipe=manifest.precision if record is None else record.recipe,
            bytes=sum(file.size for file in manifest.files.values()),
            graphs=graphs,
            sound=sound,
            missing=missing,
        )

    def _graph(self, name: str, calls: Calls | None, made: Replayed | None) -> GraphLoss:
        spec = self.bundle.manifest.graphs[name]
        files = self.bundle.manifest.files
        row = {
            "graph": name,
            "precision": spec.precision,
            "bytes": sum(files[file].size for file in (spec.file, *spec.data)),
            "layers": [] if self.bundle is self.base else self._layers(name, calls),
        }
        if calls is None or made is None:
            return GraphLoss(**row)  # type: ignore[arg-type]
        loss = loss_of(name, made.outputs, calls.wanted)
        times = {"prefill_ms": 1e3 * made.prefill, "step_ms": 1e3 * made.step}
        return GraphLoss(**row, loss=loss, **times)  # type: ignore[arg-type]

    def _layers(self, name: str, calls: Calls | None) -> list[LayerLoss]:
        if name not in self.base.manifest.graphs:
            return []
        return layer_losses(self.base, self.bundle, name, calls, self.threads)


def _rounds(calls: Calls) -> int:
    """Graphs that are called a few times are called again: a first call is slower."""
    return _ROUNDS if len(calls.feeds) < _FEW else 1


class _Sound:
    """The recorded codes said by a bundle, and how far that is from the first one that said them."""

    def __init__(self, codes: Sequence[int]) -> None:
        self.codes = codes
        self._first: tuple[Wave, Wave] | None = None

    def of(self, bundle: Bundle, backend: OrtBackend) -> tuple[Wave, Wave]:
        """Mel [80, T] and waveform, in one window, from the same noise for every bundle."""
        dit = bundle.manifest.dit
        assert dit is not None
        recording = RecordingBackend(backend)
        noise = NoiseStream(None, np.random.default_rng(0), dit.mel_dim)
        vocal = Token2Wav(recording, bundle, bundle.voice(), noise, window="whole")
        chunks = [samples for code in self.codes for samples in vocal.push(code)] + vocal.finish()
        mel: Wave = np.concatenate([call["mel"][0] for call in recording.graph(giving("wav").name).calls], axis=1)
        made = mel, np.concatenate(chunks)
        if self._first is None:
            self._first = made
        return made

    def loss(self, mel: Wave, wave: Wave, rate: int) -> SoundLoss:
        """Against the first."""
        assert self._first is not None
        wanted_mel, wanted = self._first
        spectra = log_mel_power(wave), log_mel_power(wanted)
        return SoundLoss(
            seconds=len(wanted) / rate,
            mel_sqnr_db=sqnr_db(mel, wanted_mel),
            wave_sqnr_db=sqnr_db(wave, wanted),
            mel_l1=mel_l1(*spectra),
            mcd_db=mel_cepstral_distortion(*spectra),
        )


def _ranges(calibration: Calibration) -> list[RangePlot]:
    """Every site that layers read, its histogram in 64 bins."""
    plots = []
    for graph, sites in calibration.graphs.items():
        for site in (site for site in sites if not site.record.output):
            counts = np.asarray(site.arrays["hist"]).reshape(64, -1).sum(axis=1)
            top = float(site.arrays["absmax"].max())
            plots.append(
                RangePlot(graph=graph, site=site.name, top=top, counts=counts.tolist(), clips=dict(site.record.clips))
            )
    return plots
