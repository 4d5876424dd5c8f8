"""The checks of speech: a sound bundle passes, and every planted fault fails at its stage."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from omniport.export.checkpoint.checkpoint import Checkpoint
from omniport.export.validation.checks import asr as speech_asr
from omniport.export.validation.checks import speech_runs
from omniport.export.validation.checks.speech import asr_checks, speech_checks
from omniport.export.validation.context import Context
from omniport.export.validation.reference import Reference
from omniport.export.validation.types import FAIL, NOT_RUN, PASS, Check
from omniport.runtime.backends import open_backend
from omniport.runtime.backends.base import Array, Backend, BackendWrapper, Graph, GraphWrapper, KvCache, RunHandle
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import BackendError, UsageError
from omniport.runtime.speech import token2wav
from omniport.runtime.speech.kept_blocks import KeptBlocks
from omniport.runtime.speech.ode import solve
from omniport.runtime.speech.token2wav import MelPiece, NoiseStream, Token2Wav

pytestmark = pytest.mark.timeout(600)

Outputs = dict[str, NDArray[np.float32]]
#: three windows, and the last one starts after the first frame
CODES = 49


class Changed(GraphWrapper):
    """A graph whose outputs are changed: ``change(feeds, outputs, calls so far)``; equal calls are computed once."""

    def __init__(self, graph: Graph, change: Callable[..., Outputs] | None, memory: dict[Any, Outputs]) -> None:
        super().__init__(graph)
        self._change, self._memory = change, memory
        self._calls = 0

    def run(self, feeds: Mapping[str, Array], cache: KvCache | None = None, handle: RunHandle | None = None) -> Outputs:
        key = tuple((name, array.shape, array.tobytes()) for name, array in sorted(feeds.items()))
        if cache is not None:
            return super().run(feeds, cache, handle)
        if key not in self._memory:
            self._memory[key] = super().run(feeds)
        outputs = {name: array.copy() for name, array in self._memory[key].items()}
        self._calls += 1
        return self._change(feeds, outputs, self._calls) if self._change else outputs


class Stand(BackendWrapper):
    """A backend that can be broken: ``changes`` by graph name; ``missing`` graphs cannot be loaded."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.changes: dict[str, Callable[..., Outputs]] = {}
        self.missing: set[str] = set()
        self._memory: dict[str, dict[Any, Outputs]] = {}
        self._graphs: dict[str, Changed] = {}

    def graph(self, name: str) -> Graph:
        if name in self.missing:
            raise BackendError(f"graph {name!r} needs a GPU that is not here")
        if name not in self._graphs:
            memory = self._memory.setdefault(name, {})
            self._graphs[name] = Changed(super().graph(name), self.changes.get(name), memory)
        return self._graphs[name]

    def forget(self) -> None:
        """Sound again."""
        self.changes, self.missing, self._graphs = {}, set(), {}


@pytest.fixture(scope="module")
def sound(tiny_bundle: Path, tiny_checkpoint: Path) -> Any:
    bundle, checkpoint = Bundle.open(tiny_bundle), Checkpoint.open(tiny_checkpoint)
    stand = Stand(open_backend("ort-cpu", bundle))
    yield Context(
        bundle=bundle,
        checkpoint=checkpoint,
        backend=stand,
        reference=Reference(checkpoint),
        suite="quick",
        graphs=tuple(bundle.manifest.graphs),
        precision={name: spec.precision for name, spec in bundle.manifest.graphs.items()},
        progress=lambda line: None,
    )
    stand.close()


@pytest.fixture
def context(sound: Context, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One reply of 49 codes, on a backend to break."""
    monkeypatch.setattr(speech_runs, "QUICK_LENGTHS", (CODES,))
    sound.artifacts.clear()
    assert isinstance(sound.backend, Stand)
    sound.backend.forget()  # a test of the sound bundle leaves its graphs
    yield sound
    sound.backend.forget()


@pytest.fixture
def brief(context: Context, monkeypatch: pytest.MonkeyPatch) -> Context:
    """One reply of 13 codes, for faults that show in any window."""
    monkeypatch.setattr(speech_runs, "QUICK_LENGTHS", (13,))
    return context


def stand(context: Context) -> Stand:
    assert isinstance(context.backend, Stand)
    return context.backend


def failures(context: Context) -> dict[str, Check]:
    """Failed checks by the first word of their name: mel, waveform, whole, streamed."""
    checks = list(speech_checks(context))
    assert len(checks) == 4
    assert all(check.status in (PASS, FAIL) for check in checks)
    assert all(check.message for check in checks if check.status == FAIL)
    return {check.name.split()[0]: check for check in checks if check.status == FAIL}


def stages(context: Context) -> dict[str, str]:
    return {name: check.stage for name, check in failures(context).items()}


# --- a sound bundle --------------------------------------------------------------------------------------------------


def test_a_sound_bundle_passes(sound: Context) -> None:
    sound.artifacts.clear()
    checks = list(speech_checks(sound))
    assert [(check.stage, check.status, check.message) for check in checks] == [
        (stage, PASS, "") for stage in ("dit", "bigvgan", "speech", "speech")
    ] * 3
    names = [(check.stage, check.name) for check in checks]
    assert len(set(names)) == len(names)
    for check in checks:
        assert check.limits
        assert check.limits.keys() == check.reasons.keys()
        assert check.figures["energy"] > 0.01  # type: ignore[operator]
        assert check.limits.keys() <= check.figures.keys()
        assert msgspec.json.decode(msgspec.json.encode(check), type=Check) == check
    last = checks[-1]
    assert last.name == "streamed reply of 61 codes"
    assert last.figures["samples"] == 61 * 480
    assert last.figures["chunks"] == 3
    assert 0 < last.figures["rel_rms"] < 1e-2  # type: ignore[operator]
    assert last.figures["context_gain"] > 50  # type: ignore[operator]


def test_sound_and_mel_are_kept_for_the_report(sound: Context) -> None:
    sound.artifacts.clear()
    checks = list(speech_checks(sound))
    roles = checks[-1].artifacts
    assert roles == {
        side + mel: f"speech/61/{side}.{mel[1:] or 'wav'}"
        for mel in ("", "_mel")
        for side in ("reference", "whole", "streamed")
    }
    for role, name in roles.items():
        array = sound.artifacts[name]
        assert array.dtype == np.float32
        assert array.shape == ((80, 122) if "mel" in role else (61 * 480,))
        assert array.std() > 1e-2
    assert set(sound.artifacts) == set(roles.values())


def test_every_length_is_of_a_reply(sound: Context) -> None:
    """What is spoken are the model's own codes, where they are loudest; without a talker there are none, but random."""
    full = replace(sound, suite="full")
    cases = speech_runs.speech_cases(full)
    assert [len(case.codes) for case in cases] == [1, 11, 12, 13, 35, 36, 37, 60, 61]
    assert len(set(cases[-1].codes)) > 10
    assert cases[0].codes[0] in cases[-1].codes
    assert {case.noise.shape[0] for case in cases} == {2 * len(case.codes) for case in cases}
    without = speech_runs.speech_cases(replace(full, graphs=("dit", "bigvgan")))
    assert without[-1].codes != cases[-1].codes


def test_the_loudest_part_of_a_reply_is_taken() -> None:
    reply = speech_runs._Spoken([5, 6, 7, 8], [0.0, 1.0, 3.0, 0.5])
    assert [reply.loudest(count) for count in (1, 2, 6)] == [[7], [6, 7], [5, 6, 7, 8, 5, 6]]


# --- planted faults: the runtime -------------------------------------------------------------------------------------


def emitting(patch: pytest.MonkeyPatch, change: Callable[[Token2Wav, NDArray[np.float32]], Any]) -> None:
    """Change what leaves ``Token2Wav`` window by window, when streaming."""
    vocode = Token2Wav.vocode

    def changed(self: Token2Wav, piece: MelPiece) -> Any:
        samples = vocode(self, piece)
        return change(self, samples) if self._streaming else samples

    patch.setattr(Token2Wav, "vocode", changed)


def test_first_chunk_repeated(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    first: list[NDArray[np.float32]] = []

    def repeat(self: Token2Wav, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        first.append(samples)
        return np.concatenate([first[0], samples]) if self._emitted == 2 else samples

    emitting(monkeypatch, repeat)
    failed = failures(context)
    assert {name: check.stage for name, check in failed.items()} == {"streamed": "speech"}
    assert "29280 samples came out; 23520 were expected: 5760 too many" in failed["streamed"].message


def test_first_chunk_in_place_of_the_second(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """The count is right: only the comparison sees it."""

    def vocoder(self: Token2Wav, mel: NDArray[np.float32], skip: int, count: int) -> NDArray[np.float32]:
        return synthesize(self, mel, 0, count)  # the left context is spoken again

    synthesize = Token2Wav._synthesize
    monkeypatch.setattr(Token2Wav, "_synthesize", vocoder)
    failed = failures(context)
    assert {name: check.stage for name, check in failed.items()} == {"streamed": "speech"}
    message = failed["streamed"].message
    assert "chunk 1 (samples 5760 to 17280) holds the sound of samples 0 to 11520" in message
    assert "rel_rms is" in message


def test_a_chunk_is_dropped(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    emitting(monkeypatch, lambda self, samples: samples[:0] if self._emitted == 2 else samples)
    failed = failures(context)
    assert {name: check.stage for name, check in failed.items()} == {"streamed": "speech"}
    assert "12000 samples came out; 23520 were expected: 11520 missing" in failed["streamed"].message


def test_the_end_comes_twice(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = Token2Wav.finish
    kept: list[NDArray[np.float32]] = []

    def again(self: Token2Wav) -> list[NDArray[np.float32]]:
        ended = finish(self)
        kept.extend(ended)
        return ended or kept[-1:]

    monkeypatch.setattr(Token2Wav, "finish", again)
    failed = failures(context)
    assert {name: check.stage for name, check in failed.items()} == {"whole": "speech", "streamed": "speech"}
    assert "came out again after the end" in failed["streamed"].message


def test_a_click_at_a_seam(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def click(self: Token2Wav, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        samples[0] += 0.2 if self._emitted == 2 else 0
        return samples

    emitting(monkeypatch, click)
    failed = failures(context)
    assert {name: check.stage for name, check in failed.items()} == {"streamed": "speech"}
    assert "seam_jump is" in failed["streamed"].message
    assert "rel_rms is" not in failed["streamed"].message  # it is too short to show there


def kept(monkeypatch: pytest.MonkeyPatch, block: int | None) -> None:
    """Windows keep nothing, or this block of theirs."""
    feeds = KeptBlocks.feeds
    if block is None:
        monkeypatch.setattr(KeptBlocks, "take", lambda *_: None)
    else:
        monkeypatch.setattr(KeptBlocks, "feeds", lambda self, evaluation, _: feeds(self, evaluation, block))


@pytest.mark.parametrize("block", [None, 0])
def test_windows_without_context(context: Context, monkeypatch: pytest.MonkeyPatch, block: int | None) -> None:
    kept(monkeypatch, block)
    failed = failures(context)
    assert {name: check.stage for name, check in failed.items()} == {"streamed": "speech"}
    assert "mel_rel_rms is" in failed["streamed"].message


def test_noise_of_wrong_positions(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = NoiseStream.frames
    monkeypatch.setattr(NoiseStream, "frames", lambda self, start, stop: frames(self, 0, stop - start))
    assert stages(context) == {"streamed": "speech"}


def test_noise_of_a_wrong_order(brief: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = NoiseStream.frames
    monkeypatch.setattr(NoiseStream, "frames", lambda self, start, stop: frames(self, start, stop)[::-1].copy())
    assert stages(brief) == {"mel": "speech", "whole": "speech"}


def test_a_wrong_weight_in_the_solver(brief: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of every interval counts twice."""

    def wrong(spec: Any, velocity: Any, initial: Any) -> Any:
        def doubled(step: int, x: Any) -> Any:
            return velocity(step, x) * np.float32(2 if step == 3 else 1)

        return solve(spec, doubled, initial)

    monkeypatch.setattr(token2wav, "solve", wrong)
    monkeypatch.setattr("omniport.export.validation.checks.solver.solve", wrong)
    failed = stages(brief)
    assert failed["mel"] == failed["whole"] == "solver"


def test_an_error_of_the_runtime_is_a_failure(brief: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: NoiseStream, start: int, stop: int) -> Any:
        raise UsageError("noise ends too soon")

    monkeypatch.setattr(NoiseStream, "frames", refuse)
    failed = failures(brief)
    assert {name: check.stage for name, check in failed.items()} == dict.fromkeys(failed, "speech")
    assert "noise ends too soon" in failed["mel"].message


# --- planted faults: the graphs --------------------------------------------------------------------------------------


def samples_of(make: Callable[[int], Any]) -> Callable[..., Outputs]:
    def change(_feeds: Any, outputs: Outputs, _calls: int) -> Outputs:
        count = outputs["wav"].shape[-1]
        return {"wav": np.broadcast_to(np.asarray(make(count), np.float32), (1, count)).copy()}

    return change


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda count: 0.0, "the waveform is silent"),
        (lambda count: 0.1, "the waveform is constant"),
        (lambda count: 0.1 * np.sin(np.arange(count) * 0.3), "the waveform is a pure tone"),
        (lambda count: 0.1 * np.random.default_rng(0).standard_normal(count), "the waveform is white noise"),
        (lambda count: np.where(np.arange(count) % 500 < 40, np.inf, 0.1), "NaN or infinite"),
        (lambda count: np.clip(3 * np.sin(np.arange(count) * 0.3), -1, 1), "clipped_excess is"),
    ],
    ids=["silent", "constant", "tone", "noise", "infinite", "clipped"],
)
def test_a_vocoder_that_does_not_speak(brief: Context, make: Any, says: str) -> None:
    stand(brief).changes["bigvgan"] = samples_of(make)
    failed = failures(brief)
    assert {name: check.stage for name, check in failed.items()} == {
        "waveform": "bigvgan",
        "whole": "bigvgan",
        **({"streamed": "bigvgan"} if "streamed" in failed else {}),
    }
    assert says in failed["waveform"].message
    if says in ("the waveform is silent", "NaN or infinite"):
        assert "streamed" in failed


def test_a_vocoder_that_repeats_itself(context: Context) -> None:
    """Every second call gives what the first gave: one call alone shows nothing."""
    spoken: list[NDArray[np.float32]] = []

    def stuck(_feeds: Any, outputs: Outputs, calls: int) -> Outputs:
        spoken.append(outputs["wav"])
        if calls != 5:  # the reply that gives the codes, whole, alone, first window, second window
            return outputs
        wav = outputs["wav"]
        wav[:, : spoken[3].shape[1]] = spoken[3]
        return {"wav": wav}

    stand(context).changes["bigvgan"] = stuck
    assert stages(context) == {"streamed": "speech"}


def test_a_dit_that_is_wrong(brief: Context) -> None:
    def weaker(_feeds: Any, outputs: Outputs, _calls: int) -> Outputs:
        return {**outputs, "velocity": outputs["velocity"] * np.float32(0.99)}

    stand(brief).changes["dit"] = weaker
    failed = stages(brief)
    assert failed["mel"] == failed["whole"] == "dit"
    assert "waveform" not in failed


def test_a_dit_that_overflows(brief: Context) -> None:
    def overflow(feeds: Any, outputs: Outputs, _calls: int) -> Outputs:
        outputs["velocity"][0, -1, 3] = np.inf
        return outputs

    stand(brief).changes["dit"] = overflow
    failed = failures(brief)
    assert {name: check.stage for name, check in failed.items()} == dict.fromkeys(("mel", "whole", "streamed"), "dit")
    assert "not finite" in failed["mel"].message


def test_a_reference_without_energy_proves_nothing(brief: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence on both sides is no agreement."""
    from omniport.export.validation.checks import speech as module

    monkeypatch.setattr(module, "reference_wave", lambda _context, case: np.zeros(len(case.codes) * 480, np.float32))
    stand(brief).changes["bigvgan"] = samples_of(lambda count: 0.0)
    failed = failures(brief)
    assert {"waveform", "whole", "streamed"} <= set(failed)
    assert "proves nothing" in failed["waveform"].message


def test_a_clipped_reference_proves_nothing(brief: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """A square wave at full scale on both sides is no agreement either."""
    from omniport.export.validation.checks import speech as module

    def square(count: int) -> NDArray[np.float32]:
        return np.where(np.arange(count) % 100 < 50, 1, -1).astype(np.float32)

    monkeypatch.setattr(module, "reference_wave", lambda _context, case: square(len(case.codes) * 480))
    stand(brief).changes["bigvgan"] = samples_of(square)
    failed = failures(brief)
    assert {"waveform", "whole", "streamed"} <= set(failed)
    assert "is at its largest value" in failed["waveform"].message


# --- what cannot run -------------------------------------------------------------------------------------------------


def test_what_cannot_run_is_not_run(brief: Context) -> None:
    (left_out,) = speech_checks(replace(brief, graphs=("dit",)))
    assert (left_out.status, left_out.stage) == (NOT_RUN, "speech")
    assert "bigvgan" in left_out.message
    stand(brief).missing = {"dit"}
    (no_gpu,) = speech_checks(brief)
    assert no_gpu.status == NOT_RUN
    assert "GPU that is not here" in no_gpu.message


# --- the user's recogniser -------------------------------------------------------------------------------------------

LISTEN = """
import json, sys, wave
with wave.open(sys.argv[-1]) as file:
    shape = [file.getnchannels(), file.getsampwidth(), file.getframerate(), file.getnframes()]
open(sys.argv[1], "w").write(json.dumps([shape, sys.argv[1:-1]]))
print("The sea  was blue!")
"""


def recogniser(*program: str) -> str:
    return shlex.join([sys.executable, "-c", *program])


@pytest.fixture
def spoken(context: Context, monkeypatch: pytest.MonkeyPatch) -> Context:
    """A reply whose text is known."""
    samples = (0.1 * np.sin(np.arange(4800) * 0.05)).astype(np.float32)
    monkeypatch.setattr(speech_asr, "_reply", lambda *_: ("The sea is blue.", samples, 24000))
    return context


def test_word_error_rate_of_a_reply(spoken: Context, tmp_path: Path) -> None:
    notes = tmp_path / "no tes; $HOME"
    (check,) = asr_checks(spoken, recogniser(LISTEN, str(notes)))
    assert (check.status, check.stage) == (PASS, "speech")
    assert check.figures["word_error_rate"] == 0.25
    assert check.figures["heard"] == "The sea  was blue!"
    assert not check.limits
    shape, arguments = json.loads(notes.read_text())
    assert shape == [1, 2, 24000, 4800]
    assert arguments == [str(notes)]
    assert set(spoken.artifacts) == {"speech/asr/reply.wav"}


def test_a_recogniser_that_fails_is_not_run(spoken: Context) -> None:
    command = recogniser("import sys; sys.exit('no model')")
    (check,) = asr_checks(spoken, command)
    assert check.status == NOT_RUN
    assert repr(command) in check.message
    assert "code 1: no model" in check.message
    (check,) = asr_checks(spoken, recogniser("import time; time.sleep(60)"), timeout=0.5)
    assert (check.status, "0.5 s" in check.message) == (NOT_RUN, True)


@pytest.mark.parametrize("command", ["", "no-such-recogniser --fast", "'unbalanced"])
def test_a_command_that_cannot_be_run(context: Context, command: str) -> None:
    with pytest.raises(UsageError, match="recogniser command") as caught:
        next(speech_checks(context, asr=command))
    assert repr(command) in str(caught.value)


def test_a_real_reply_reaches_the_recogniser(context: Context) -> None:
    """Random weights speak noise: that there is a figure is all that counts."""
    (check,) = asr_checks(context, recogniser("print('hello')"), text_tokens=12, codec_tokens=13)
    assert check.status == PASS, check.message
    assert check.figures["seconds"] == pytest.approx(13 * 0.02)
    assert check.figures["word_error_rate"] > 0  # type: ignore[operator]
    assert check.figures["text"]
