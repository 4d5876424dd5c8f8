"""What precisions, recipes, solvers, windows and contexts cost in speech that is heard, on Wren (docs/results/wren.md).

    python -m benchmarks.wren_loss [--work .work/wren-loss] [--count N] [--only NAME ...]

Every way answers the first N questions of each kind of wren/questions. Right answers and words heard wrong say what is
lost; distances are from the FP32 bundle's mel and sound of the same codes and noise. GPTQ and AWQ bundles are measured
where `python -m benchmarks.wren_packed WORK` has packed the weights.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray
from omniport.export.evaluation.half_emulation import EmulatedBackend
from omniport.export.evaluation.hearing import Ear, words
from omniport.export.evaluation.machine import environment, usable_threads
from omniport.export.evaluation.questions import Answer, Question, QuestionSet, answers, figures, read_questions
from omniport.export.evaluation.speech_metrics import log_mel_power, mel_cepstral_distortion, mel_l1
from omniport.runtime.backends.base import Backend
from omniport.runtime.backends.onnxruntime.backend import OrtBackend
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.events import Done
from omniport.runtime.media.audio import load_audio
from omniport.runtime.session import OmniSession
from omniport.runtime.speech.token2wav import NoiseStream, Token2Wav
from omniport.runtime.speech.windows import SpeechWindows, Window

from .harness import ROOT, command_line, record, table

CHECKPOINT, QUESTIONS = ROOT / "wren" / "checkpoint", ROOT / "wren" / "questions" / "questions.jsonl"
RATE = 24000
#: bundle -> the commands that make it, from CHECKPOINT (C), earlier bundles (B/NAME) and calibration data (B/calib)
BUNDLES: dict[str, Sequence[str]] = {
    "fp32": ("export C B/fp32",),
    "fp16": ("export C B/fp16 --precision fp16",),
    "fp16 all": ("export C B/fp16-all --precision fp16 --token2wav fp16",),
    "bf16": ("export C B/bf16 --precision bf16",),
    "w8": ("quantize B/fp32 B/w8 --recipe w8",),
    "w8, calibrated": ("quantize B/fp32 B/w8-calib --recipe w8 --calib B/calib",),
    "int8": ("quantize B/fp32 B/int8 --recipe int8 --calib B/calib",),
    "int4": ("quantize B/fp32 B/int4 --recipe int4",),
    "int4, calibrated": ("quantize B/fp32 B/int4-calib --recipe int4 --calib B/calib",),
    "fp8": ("quantize B/fp32 B/fp8 --recipe fp8 --calib B/calib",),
    "edge-8gb": ("quantize B/fp32 B/edge-8gb --recipe edge-8gb --calib B/calib",),
    "edge-16gb": ("quantize B/fp32 B/edge-16gb --recipe edge-16gb --calib B/calib",),
    "int4 to 15 dB": ("quantize B/fp32 B/int4-15 --recipe int4 --target-sqnr 15",),
    "int4 to 20 dB": ("quantize B/fp32 B/int4-20 --recipe int4 --target-sqnr 20",),
    "int4 to 25 dB": ("quantize B/fp32 B/int4-25 --recipe int4 --target-sqnr 25",),
    "GPTQ": ("export B/packed-gptq B/gptq",),
    "AWQ": ("export B/packed-awq B/awq",),
}
#: ways to make speech of the FP32 bundle's codes
SOLVERS = ("rk4", "midpoint", "fast", "faster", "euler")
WINDOWS = (12, 24, 48, 96, 240)
#: mel frames around a window that the vocoder sees
CONTEXTS = (20, 34)
#: seconds of sound that a live turn is given at a time, and how much quieter the first half of a sound is made
PIECE, QUIETER = 0.1, 0.1


class Spoken:
    """One bundle's speech of given codes."""

    def __init__(self, root: Path) -> None:
        self.bundle = Bundle.open(root)
        threads = usable_threads(self.bundle)
        half = any(spec.compute_dtype == "bfloat16" for spec in self.bundle.manifest.graphs.values())
        opened = EmulatedBackend if half else OrtBackend
        self.backend: Backend = opened(self.bundle, threads=threads)

    def sound(self, codes: Sequence[int], voice: str, window: Window = "whole", **options: Any) -> NDArray[np.float32]:
        """Samples of codes, from noise of seed 0."""
        dit = self.bundle.manifest.dit
        assert dit is not None
        noise = NoiseStream(None, np.random.default_rng(0), dit.mel_dim)
        spoken_by = self.bundle.voice(voice)
        made = Token2Wav(self.backend, self.bundle, spoken_by, noise, window=window, **options)
        chunks = [samples for code in codes for samples in made.push(code)] + made.finish()
        return np.concatenate(chunks)


def asked(root: Path, count: int) -> QuestionSet:
    """The first ``count`` questions of each kind."""
    with OmniSession.open(root) as session:
        found = read_questions(QUESTIONS, session.manifest, session.text_codec)
    kinds = dict.fromkeys(question.kind for question in found.questions)
    chosen = [[q for q in found.questions if q.kind == kind][:count] for kind in kinds]
    return QuestionSet(tuple(question for questions in chosen for question in questions), found.grammar)


def heard(given: Sequence[Answer], ear: Ear, seconds: float) -> dict[str, Any]:
    """Figures of answers that took ``seconds`` in all."""
    found = figures(given, ear, RATE)
    return {
        "right": {kind: right / count for kind, (right, count) in found.right.items()},
        "right_share": found.right_share,
        "word_error_rate": found.word_error_rate,
        "ended": found.ended / max(1, found.spoken),
        "clipped": found.clipped,
        "real_time_factor": seconds / found.seconds if found.seconds else None,
    }


def distance(got: Sequence[NDArray[np.float32]], wanted: Sequence[NDArray[np.float32]]) -> dict[str, float]:
    """Mean distance of sounds: log-mel power in nepers, and mel-cepstral distortion in dB."""
    pairs = [(log_mel_power(a), log_mel_power(b)) for a, b in zip(got, wanted, strict=True)]
    return {
        "mel_l1": float(np.mean([mel_l1(*pair) for pair in pairs])),
        "mcd_db": float(np.mean([mel_cepstral_distortion(*pair) for pair in pairs])),
    }


def answered(root: Path, questions: Sequence[Question], **options: Any) -> tuple[list[Answer], float]:
    """Answers of a bundle, and the seconds that they took."""
    spoken = Spoken(root)
    with OmniSession(spoken.bundle, spoken.backend) as session:
        begin = time.monotonic()
        given = list(answers(session, questions, options=options))
        return given, time.monotonic() - begin


def measure(options: argparse.Namespace, before: Any) -> Iterator[Any]:
    """Yields what is measured so far."""
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    only = set(options.only)
    result: dict[str, Any] = {"bundles": {}, "ways": {}} | dict(before)
    make("fp32", work)
    base = work / "fp32"
    result["environment"] = environment(usable_threads(Bundle.open(base)))
    result["count"] = options.count
    found = asked(base, options.count)
    ear = Ear(found.grammar)
    first, seconds = answered(base, found.questions)
    said = Spoken(base)
    sounds = [said.sound(a.codes, a.voice) for a in first]

    def wanted(name: str) -> bool:
        return not only or name in only or (name == "fp32" and name not in result["bundles"])

    for name in filter(wanted, BUNDLES):
        if (packed := _packed(name, work)) is not None and not packed.exists():
            continue
        root = make(name, work)
        given, seconds = (first, seconds) if name == "fp32" else answered(root, found.questions)
        row = heard(given, ear, seconds)
        row["bytes"] = sum(file.size for file in Bundle.open(root).manifest.files.values())
        row["same_codes"] = float(np.mean([a.codes == b.codes for a, b in zip(given, first, strict=True)]))
        other = Spoken(root)
        row |= distance([other.sound(a.codes, a.voice) for a in first], sounds)
        result["bundles"][name] = row
        yield result
    for name, change in ways().items():
        if wanted(name):
            given, seconds = answered(base, found.questions, **change)
            row = heard(given, ear, seconds)
            row |= distance([said.sound(a.codes, a.voice, **change) for a in first], sounds)
            result["ways"][name] = row
            yield result
    if wanted("live"):
        spoken = [question for question in found.questions if question.kind == "spoken"]
        for name, exact, first_half in LIVE:
            result.setdefault("live", {})[name] = live_right(base, spoken, exact, first_half)
            yield result


#: name, ``exact`` of ``OmniSession.turn`` (None: the whole clip at once), and the level of a sound's first half
LIVE: Sequence[tuple[str, bool | None, float]] = (
    ("whole clip", None, 1.0),
    ("live, floor so far", False, 1.0),
    ("live, exact", True, 1.0),
    ("whole clip, first half 20 dB quieter", None, QUIETER),
    ("live, floor so far, first half 20 dB quieter", False, QUIETER),
    ("live, exact, first half 20 dB quieter", True, QUIETER),
)


def live_right(root: Path, questions: Sequence[Question], exact: bool | None, first_half: float) -> dict[str, float]:
    """The share of spoken questions that are answered right in text when they are heard live."""
    right = 0
    with OmniSession.open(root) as session:
        greedy = replace(session.manifest.thinker_sampling, temperature=0.0, max_new_tokens=64)
        for question in questions:
            (part,) = question.messages[-1]["content"]
            sound, rate = load_audio(part["audio"]).copy(), 16000
            sound[: len(sound) // 2] *= first_half
            session.reset()
            if exact is None:
                asked = [{"role": "user", "content": [{"type": "audio", "audio": (sound, rate)}]}]
                events = list(session.reply(asked, speak=False, thinker=greedy))
            else:
                with session.turn(speak=False, thinker=greedy, exact=exact) as turn:
                    for piece in np.array_split(sound, max(1, round(len(sound) / rate / PIECE))):
                        turn.push_audio(piece, rate)
                    events = list(turn.commit())
            text = next(event.text for event in events if isinstance(event, Done))
            right += words(text) == words(question.answer)
    return {"questions": len(questions), "right": right / len(questions)}


def ways() -> Mapping[str, dict[str, Any]]:
    """Ways to speak: options of ``OmniSession.reply``."""
    found: dict[str, dict[str, Any]] = {"streamed": {"window": SpeechWindows()}, "whole": {"window": "whole"}}
    found |= {f"whole, {solver}": {"window": "whole", "solver": solver} for solver in SOLVERS}
    found |= {f"windows of {codes}": {"window": SpeechWindows(chunks=(codes,))} for codes in WINDOWS}
    return found | {f"vocoder sees {n} frames around": {"window": SpeechWindows(vocoder_context=n)} for n in CONTEXTS}


def _packed(name: str, work: Path) -> Path | None:
    """The checkpoint that a bundle needs, which other tools have to pack first."""
    source = BUNDLES[name][0].split()[1]
    return work / source.removeprefix("B/") if source.startswith("B/packed") else None


def make(name: str, work: Path) -> Path:
    """The bundle of a name, made if it is not there."""
    folder = work / BUNDLES[name][-1].split()[2].removeprefix("B/")
    if folder.exists():
        return folder
    if any("B/calib" in command for command in BUNDLES[name]) and not (work / "calib").exists():
        _omniport(work, f"calibrate C B/calib --data {QUESTIONS.parent / 'calib' / 'calib.jsonl'}")
    for command in BUNDLES[name]:
        _omniport(work, command)
    return folder


def _omniport(work: Path, command: str) -> None:
    words = [str(CHECKPOINT) if word == "C" else word.replace("B/", f"{work}/") for word in command.split()]
    subprocess.run([sys.executable, "-m", "omniport.cli", *words, "-q"], check=True)


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def page(found: Any) -> str:
    """docs/results/wren.md"""
    kinds = list(next(iter(found["bundles"].values()))["right"])
    bundles = [
        [name, f"{row['bytes'] / 1e6:.1f} MB", percent(row["right_share"])]
        + [percent(row["right"][kind]) for kind in kinds]
        + [percent(row["same_codes"]), *_speech(row)]
        for name, row in found["bundles"].items()
    ]
    count = found["count"]
    lines = [
        "# Loss that is heard",
        "",
        "Made by `python -m benchmarks.wren_loss` from [wren.json](wren.json): answers of",
    ]
    lines += [
        f"Wren to the first {count} questions of each kind of `wren/questions`, read and heard. Distances are from the"
    ]
    lines += [
        "sound that the FP32 bundle makes of the same codes. Other work shared the processor: RTFs are not compared.",
        "",
    ]
    lines += table(["bundle", "size", "right", *kinds, "same codes", *_SPEECH], bundles)
    if ways := [[name, *_speech(row)] for name, row in found["ways"].items()]:
        lines += ["", *table(["speech of the FP32 bundle", *_SPEECH], ways)]
    if live := [[name, str(row["questions"]), percent(row["right"])] for name, row in found.get("live", {}).items()]:
        lines += ["", *table(["spoken questions", "asked", "right"], live)]
    return "\n".join([*lines, ""])


_SPEECH = ("words heard wrong", "ended", "mel L1", "MCD dB", "RTF")


def _speech(row: Mapping[str, Any]) -> list[str]:
    shares = [percent(row["word_error_rate"]), percent(row["ended"])]
    return [*shares, f"{row['mel_l1']:.3f}", f"{row['mcd_db']:.2f}", f"{row['real_time_factor']:.2f}"]


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("--work", type=Path, default=Path(".work/wren-loss"))
    parser.add_argument("--count", type=int, default=40, help="questions of each kind")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="rows to measure; all without it")
    record("wren", page, measure, parser)
