"""Methods and schedules for the DiT's ODE, judged on Wren's DiT by what is heard (docs/results/solvers.md).

    python -m benchmarks.solvers BUNDLE [--count N] [--only NAME,NAME]
    python -m benchmarks.solvers BUNDLE --search NAME [--rounds N] [--count N]

BUNDLE is Wren in FP32. It answers N questions in each voice, and every way turns the same codes and noise, whole,
into a mel and sound. Velocities come from transformers' own DiT in wren/checkpoint, which takes any time. Distances are
from ``rk4`` with 36 evaluations. ``--search`` moves the ends of a way's intervals, one at a time, as long as the sound
comes closer to ``rk4``'s, and prints them.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from msgspec.structs import replace
from numpy.typing import NDArray
from omniport.export.evaluation.hearing import Ear
from omniport.export.evaluation.machine import environment, usable_threads
from omniport.export.evaluation.questions import Answer, answers, read_questions
from omniport.export.evaluation.speech_metrics import log_mel_power, power_frames
from omniport.runtime.backends.onnxruntime.backend import OrtBackend
from omniport.runtime.bundle.manifest import SolverSpec
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.session import OmniSession
from omniport.runtime.speech.ode import rk4_schedule
from omniport.runtime.speech.ode_methods import METHODS, Method
from transformers import Qwen2_5OmniForConditionalGeneration

from .harness import ROOT, command_line, record, table
from .wren_loss import CHECKPOINT, QUESTIONS, RATE

if TYPE_CHECKING:
    from omniport.runtime.speech.ode_methods import State, Velocity

Sound = NDArray[np.float32]
REFERENCE = "rk4"
#: what a spectrum's distance counts as silence: 60 dB below a full-scale sine of the least loud speech
_SILENT = 1e-9


def bent(intervals: int, sway: float) -> tuple[float, ...]:
    """Ends of intervals, as F5-TTS bends them: denser at the start for a negative sway."""
    even = np.linspace(0, 1, intervals + 1)
    return tuple((even + sway * (np.cos(np.pi / 2 * even) - 1 + even)).tolist())


def _ralston(velocity: Velocity, stages: tuple[int, ...], state: State, step: np.float32) -> State:
    """Second order, with the least bound on its error."""
    k1 = velocity(stages[0], state)
    k2 = velocity(stages[1], state + k1 * step * (2 / 3))
    return state + (k1 + k2 * 3) * step * 0.25


def _kutta3(velocity: Velocity, stages: tuple[int, ...], state: State, step: np.float32) -> State:
    """Third order, Kutta's own."""
    k1 = velocity(stages[0], state)
    k2 = velocity(stages[1], state + k1 * step * 0.5)
    k3 = velocity(stages[2], state + (k2 * 2 - k1) * step)
    return state + (k1 + k2 * 4 + k3) * step * (1 / 6)


RALSTON3, MIDPOINT, EULER, RK4 = (METHODS[name].advance for name in ("fast", "midpoint", "euler", "rk4"))
#: way -> method; those of the product, and those that were tried beside them
WAYS: Mapping[str, Method] = {
    **{str(name): method for name, method in METHODS.items()},
    "midpoint over 6 (sway -0.5)": Method((0, 0.5), MIDPOINT, bent(6, -0.5)),
    "Kutta 3 over 4 (sway -0.5)": Method((0, 0.5, 1), _kutta3, bent(4, -0.5)),
    "Ralston 3 over 4 (sway -0.5)": Method((0, 0.5, 0.75), RALSTON3, bent(4, -0.5)),
    "rk4 over 3 (sway -0.5)": Method((0, 1 / 3, 2 / 3, 1), RK4, bent(3, -0.5)),
    "Ralston 2 over 6 (sway -0.5)": Method((0, 2 / 3), _ralston, bent(6, -0.5)),
    "Ralston 2 over 4 (found)": Method((0, 2 / 3), _ralston, (0, 0.1842, 0.5612, 0.8552, 1)),
    "Ralston 2 over 3 (found)": Method((0, 2 / 3), _ralston, (0, 0.2427, 0.7274, 1)),
    "Ralston 3 over 2 (found)": Method((0, 0.5, 0.75), RALSTON3, (0, 0.5039, 1)),
    "Euler over 9 (sway -0.5)": Method((0,), EULER, bent(9, -0.5)),
}


def schedule_of(method: Method) -> tuple[SolverSpec, Method]:
    """A schedule that has this method's times alone."""
    spec = rk4_schedule()
    grid = np.asarray(method.grid or spec.grid, np.float32)
    times = [
        float(start + (end - start) * np.float32(point))
        for start, end in itertools.pairwise(grid)
        for point in method.points
    ]
    count = len(method.points)
    stages = tuple(tuple(range(i, i + count)) for i in range(0, len(times), count))
    return replace(spec, grid=tuple(map(float, grid)), table=tuple(times), stages=stages), method


@dataclass(frozen=True, eq=False)
class Made:
    """mel float32 [frames, 80], and samples."""

    mel: NDArray[np.float32]
    sound: Sound


class Speaker:
    """Wren's DiT in torch, and the bundle's vocoder."""

    def __init__(self, root: Path) -> None:
        self.bundle = Bundle.open(root)
        self.vocoder = OrtBackend(self.bundle, threads=usable_threads(self.bundle)).graph("bigvgan")
        load: Any = Qwen2_5OmniForConditionalGeneration.from_pretrained
        self.model = load(CHECKPOINT, dtype=torch.float32)
        self.dit = self.model.token2wav.code2wav_dit_model.eval()

    @torch.inference_mode()
    def make(self, answer: Answer, method: Method, seed: int) -> Made:
        """The sound of an answer's codes."""
        spec, method = schedule_of(method)
        voice = self.model.speaker_map[answer.voice]
        codes = torch.tensor([answer.codes])
        frames = 2 * len(answer.codes)
        given = {
            "speaker_embedding": voice["cond"].reshape(1, 1, -1).expand(1, frames, -1),
            "condition_vector": voice["ref_mel"],
            "quantized_code": codes,
            "apply_cfg": True,
        }

        def velocity(index: int, state: State) -> State:
            time = torch.tensor(spec.table[index], dtype=torch.float32)
            said, unsaid = self.dit(hidden_states=torch.from_numpy(state), time_step=time, **given).chunk(2, 0)
            return np.asarray(said + (said - unsaid) * spec.guidance_scale)

        state = np.random.default_rng(seed).standard_normal((1, frames, 80), np.float32)
        grid = np.asarray(spec.grid, np.float32)
        for i, stages in enumerate(spec.stages):
            state = method.advance(velocity, stages, state, grid[i + 1] - grid[i])
        wave = self.vocoder.run({"mel": np.ascontiguousarray(state[0].T[None])})["wav"].reshape(-1)
        return Made(state[0], wave)


def spectral_distance(got: Sound, wanted: Sound) -> float:
    """Log-spectral distance in dB, mean over frames."""
    a, b = (10 * np.log10(power_frames(sound) + _SILENT) for sound in (got, wanted))
    return float(np.sqrt(((a - b) ** 2).mean(1)).mean())


def timbre(sound: Sound) -> NDArray[np.float64]:
    """Mean and spread of the log-mel spectrum: what tells the two voices apart."""
    power = log_mel_power(sound)
    return np.concatenate([power.mean(0), power.std(0)])


def figures(given: Sequence[Answer], made: Sequence[Made], first: Sequence[Made], ear: Ear) -> dict[str, float]:
    """Of one way: distances from the reference's sounds, words heard wrong, and the voice.

    ``same_voice`` is the share of sounds whose timbre is nearer to its voice's mean than to the other's, by the
    reference's sounds; ``timbre_moved`` the mean distance of a timbre from the reference's, over that of the two means.
    """
    score = ear.score((answer.question.answer, one.sound.clip(-1, 1)) for answer, one in zip(given, made, strict=True))
    voices = sorted({answer.voice for answer in given})
    before = [timbre(one.sound) for one in first]
    means = {v: np.mean([t for t, a in zip(before, given, strict=True) if a.voice == v], 0) for v in voices}
    apart = float(np.linalg.norm(means[voices[0]] - means[voices[-1]]))
    after = [timbre(one.sound) for one in made]
    nearest = [min(voices, key=lambda v, t=t: float(np.linalg.norm(t - means[v]))) for t in after]  # type: ignore[misc]
    return {
        "lsd_db": float(np.mean([spectral_distance(a.sound, b.sound) for a, b in zip(made, first, strict=True)])),
        "mel_l1": float(np.mean([np.abs(a.mel - b.mel).mean() for a, b in zip(made, first, strict=True)])),
        "word_error_rate": score.rate,
        "same_voice": float(np.mean([name == answer.voice for name, answer in zip(nearest, given, strict=True)])),
        "timbre_moved": float(np.mean([np.linalg.norm(a - b) for a, b in zip(after, before, strict=True)])) / apart,
        "clipped": float(sum(int((np.abs(one.sound) >= 1).sum()) for one in made)),
    }


def replies(root: Path, count: int) -> tuple[list[Answer], str]:
    """``count`` spoken answers of each voice, right in text, and the grammar they are heard by."""
    given: dict[str, list[Answer]] = {}
    with OmniSession.open(root) as session:
        found = read_questions(QUESTIONS, session.manifest, session.text_codec)
        order = list(found.questions)
        while len(given) < len(session.manifest.voices) or min(map(len, given.values())) < count:
            for answer in answers(session, order):
                mine = given.setdefault(answer.voice, [])
                if answer.right and answer.ended and len(mine) < count:
                    mine.append(answer)
                if all(len(theirs) == count for theirs in given.values()) and len(given) > 1:
                    break
            order = [*order[1:], order[0]]  # the other voice for each question
    return [answer for theirs in given.values() for answer in theirs], found.grammar


def search(speaker: Speaker, given: Sequence[Answer], name: str, rounds: int) -> None:
    """Move the ends of a way's intervals."""
    method = WAYS[name]
    first = [speaker.make(answer, WAYS[REFERENCE], seed) for seed, answer in enumerate(given)]

    def far(grid: Sequence[float]) -> float:
        tried = Method(method.points, method.advance, tuple(grid))
        made = [speaker.make(answer, tried, seed) for seed, answer in enumerate(given)]
        return float(np.mean([spectral_distance(a.sound, b.sound) for a, b in zip(made, first, strict=True)]))

    grid = list(method.grid or rk4_schedule().grid)
    best, share = far(grid), 0.25
    for _ in range(rounds):
        for i in range(1, len(grid) - 1):
            for move in (share * (grid[i + 1] - grid[i]), share * (grid[i - 1] - grid[i])):
                moved = [*grid[:i], grid[i] + move, *grid[i + 1 :]]
                if (distance := far(moved)) < best:
                    best, grid = distance, moved
                    break
        share *= 0.6
        print(f"{name}: {best:.3f} dB at {', '.join(f'{t:.4f}' for t in grid)}", flush=True)


def measure(options: argparse.Namespace, before: Any) -> Iterator[Any]:
    """Yields what is measured so far."""
    torch.set_num_threads(usable_threads(Bundle.open(options.bundle)))
    speaker = Speaker(options.bundle)
    given, grammar = replies(options.bundle, options.count)
    ear, only = Ear(grammar), set(options.only.split(",")) if options.only else set(WAYS)
    result: dict[str, Any] = {"ways": {}} | dict(before)
    result |= {"environment": environment(usable_threads(speaker.bundle)), "replies": len(given)}
    first: list[Made] = []
    for name, method in WAYS.items():
        if name not in only | {REFERENCE}:
            continue
        begin = time.monotonic()
        made = [speaker.make(answer, method, seed) for seed, answer in enumerate(given)]
        seconds = time.monotonic() - begin
        first = first or made
        row = figures(given, made, first, ear)
        row["evaluations"] = len(schedule_of(method)[0].table)
        row["seconds_per_second"] = seconds / (sum(len(one.sound) for one in made) / RATE)
        result["ways"][name] = row
        yield result


def page(result: Any) -> str:
    """docs/results/solvers.md."""
    best = math.inf
    rows = []
    for name, row in sorted(result["ways"].items(), key=lambda item: (item[1]["evaluations"], item[1]["lsd_db"])):
        front = row["lsd_db"] < best
        best = min(best, row["lsd_db"])
        cells = [f"`{name}`" if name in METHODS else name, row["evaluations"], f"{row['lsd_db']:.2f}"]
        cells += [f"{row['mel_l1']:.4f}", f"{100 * row['word_error_rate']:.1f}%", f"{100 * row['same_voice']:.1f}%"]
        cells += [f"{row['timbre_moved']:.3f}", f"{row['seconds_per_second']:.2f}", "yes" if front else ""]
        rows.append(cells)
    head = [
        "way",
        "evaluations",
        "LSD, dB",
        "mel, nepers",
        "words wrong",
        "voice right",
        "timbre moved",
        "work",
        "front",
    ]
    return "\n".join(
        [
            "# Solvers of the DiT, by ear",
            "",
            f"{result['replies']} replies of Wren in both voices, whole, from the same codes and noise "
            "(`python -m benchmarks.solvers BUNDLE`). Distances are from `rk4` with 36 evaluations: the log-spectral "
            "one of the sound (LSD), and the mel's mean difference. *Voice right*: the timbre (mean and spread of the "
            "log-mel spectrum) is nearer to its own voice's mean than to the other's. *Timbre moved*: its distance "
            "from `rk4`'s over that of the two voices. *Work*: seconds for a second of speech, DiT in PyTorch and "
            "vocoder, beside other work; the product's, on idle cores, are in [bench.md](bench.md#solvers-of-speech). "
            "*Front*: nothing with as few evaluations is as near.",
            "",
            *table(head, rows),
            "",
            "The intervals of `fast` were found by `--search` on Wren. On the published model they were not heard.",
            "",
        ]
    )


@cache
def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = command_line(__doc__)
    found.add_argument("bundle", type=Path, nargs="?", default=ROOT / "demo" / "bundle")
    found.add_argument("--count", type=int, default=100, help="replies of each voice")
    found.add_argument("--only", help="names of ways, with commas between")
    found.add_argument("--search", metavar="NAME", help="find better intervals for this way, and print them")
    found.add_argument("--rounds", type=int, default=4)
    return found


def main() -> None:
    options, _ = parser().parse_known_args()
    if options.search:
        given, _ = replies(options.bundle, options.count)
        search(Speaker(options.bundle), given, options.search, options.rounds)
    else:
        record("solvers", page, measure, parser())


if __name__ == "__main__":
    main()
