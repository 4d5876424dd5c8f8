"""Windows against the whole utterance, on graphs that see no further than real ones are promised."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from omniport.runtime import SpeechWindows
from omniport.runtime.bundle.manifest import DitGeometry
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.concurrency.timing import StageTimer
from omniport.runtime.errors import OmniportError, UsageError
from omniport.runtime.speech import token2wav
from omniport.runtime.speech.ode_methods import Solver
from omniport.runtime.speech.token2wav import MelPiece, NoiseStream, Token2Wav
from omniport.runtime.speech.windows import Window, vocoder_lengths
from support.bundles import CODES, make_bundle
from support.fake_backend import FakeBackend, FakeBigVgan, FakeDit

LENGTHS = [0, 1, 11, 12, 13, 23, 24, 25, 35, 36, 37, 48, 60, 61, 100, 200]
SAMPLES_PER_CODE = 480


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(make_bundle(tmp_path_factory.mktemp("t2w") / "bundle"))


class Run:
    """One utterance through Token2Wav."""

    def __init__(
        self,
        bundle: Bundle,
        codes: list[int],
        window: Window,
        noise: Any = None,
        seed: int = 0,
        solver: Solver = "rk4",
        room: int | None = None,
        **graphs: Any,
    ) -> None:
        self.backend = FakeBackend(bundle.manifest, graphs, room)
        stream = NoiseStream(noise, np.random.default_rng(seed), 80)
        self.timer = StageTimer()
        made = Token2Wav(self.backend, bundle, bundle.voice(), stream, window=window, solver=solver, timer=self.timer)
        self.pushed = [made.push(code) for code in codes]
        self.finished = made.finish()
        assert made.finish() == []
        self.chunks = [chunk for chunks in [*self.pushed, self.finished] for chunk in chunks]

    @property
    def samples(self) -> NDArray[np.float32]:
        return np.concatenate([np.zeros(0, np.float32), *self.chunks])

    def dit_windows(self) -> list[int]:
        """Codes of each DiT window."""
        graph = self.backend.graphs["dit"]
        assert isinstance(graph, FakeDit)
        return [call["codes"].shape[1] for call in graph.calls[::36]]

    def vocoder_windows(self) -> list[int]:
        """Mel frames of each vocoder run."""
        graph = self.backend.graphs["bigvgan"]
        assert isinstance(graph, FakeBigVgan)
        return [call["mel"].shape[2] for call in graph.calls]


def codes_of(count: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, CODES + 1, count).tolist()


@pytest.mark.parametrize("count", LENGTHS)
def test_streamed_equals_whole_for_every_length(bundle: Bundle, count: int) -> None:
    codes = codes_of(count)
    whole, stream = Run(bundle, codes, "whole"), Run(bundle, codes, "stream")
    assert len(whole.samples) == len(stream.samples) == count * SAMPLES_PER_CODE
    np.testing.assert_array_equal(stream.samples, whole.samples)
    if count:
        assert 0.05 < np.sqrt(np.mean(whole.samples**2)) < 1
        # No repeat can hide: no two neighbouring mel frames sound alike.
        frames = whole.samples.reshape(-1, 240)
        assert (np.abs(np.diff(frames, axis=0)).max(axis=1) > 1e-6).all()
        assert all(chunk.dtype == np.float32 and chunk.size for chunk in stream.chunks)


def test_whole_runs_once_at_the_end(bundle: Bundle) -> None:
    run = Run(bundle, codes_of(100), "whole")
    assert not any(run.pushed)
    assert [len(chunk) for chunk in run.finished] == [100 * SAMPLES_PER_CODE]
    assert run.dit_windows() == [100]


def test_sound_leaves_as_soon_as_the_look_ahead_is_there(bundle: Bundle) -> None:
    run = Run(bundle, codes_of(200), "stream")
    ready = {i + 1: [len(c) // SAMPLES_PER_CODE for c in chunks] for i, chunks in enumerate(run.pushed) if chunks}
    # codes needed -> new codes: 12 + 12 ahead, then 24, then 48
    assert ready == {24: [12], 48: [24], 96: [48], 144: [48], 192: [48]}
    assert [len(c) // SAMPLES_PER_CODE for c in run.finished] == [20]
    # left context of 24 codes (12 at first), right of 12, none at the end
    assert run.dit_windows() == [24, 12 + 24 + 12, 24 + 48 + 12, 24 + 48 + 12, 24 + 48 + 12, 24 + 20]


@pytest.mark.parametrize("chunks", [(12, 24, 48), (12,), (48,)])
def test_a_gpu_s_vocoder_sees_few_lengths(bundle: Bundle, chunks: tuple[int, ...]) -> None:
    """A GPU prepares itself for each: the last window is as long as one of the others, where enough was said before."""
    lengths = set()
    window = SpeechWindows(chunks)
    for count in range(90, 140):
        run = Run(bundle, codes_of(count), window)
        whole = Run(bundle, codes_of(count), "whole")
        np.testing.assert_array_equal(run.samples, whole.samples)
        lengths |= set(run.vocoder_windows())
    assert lengths <= set(vocoder_lengths(window, 34, bundle.manifest.dit or DitGeometry()))
    assert len(lengths) <= 4
    shared = Run(bundle, codes_of(100), window, room=1)
    assert shared.vocoder_windows()[-1] == 34 + 2 * (100 - sum(map(len, shared.chunks[:-1])) // SAMPLES_PER_CODE)


def clock(monkeypatch: pytest.MonkeyPatch, step: float, frame: float = 0.0) -> None:
    """An evaluation of the DiT takes ``step`` seconds for 84 codes, 3 % of them whatever its codes; the vocoder
    ``frame`` for a mel frame."""
    now, cost, solve, voice = [0.0], [0.0], Token2Wav._solve, Token2Wav._synthesize

    def voice_in(self: Token2Wav, mel: np.ndarray, skip: int, count: int) -> np.ndarray:
        cost[0] = frame * len(mel)
        return voice(self, mel, skip, count)

    def solve_in(self: Token2Wav, first: int, last: int, stop: int) -> np.ndarray:
        cost[0] = step * ((last - first) / 84 + 0.03) / 1.03
        return solve(self, first, last, stop)

    def tick() -> float:
        now[0] += cost[0]
        return now[0]

    monkeypatch.setattr(Token2Wav, "_solve", solve_in)
    monkeypatch.setattr(Token2Wav, "_synthesize", voice_in)
    monkeypatch.setattr(token2wav, "time", SimpleNamespace(perf_counter=tick))


@pytest.mark.parametrize(
    ("step", "room", "window", "chunks"),
    [
        # 84 codes are 48 new ones, heard for 0.96 s: as long as 36 evaluations of 0.0267 s
        (0.05, 1, "stream", [12, 240, 48]),
        (0.025, 1, "stream", [12, 24, 48, 48, 48, 48, 48, 24]),
        (0.028, 1, "stream", [12, 24, 240, 24]),
        (0.05, None, "stream", [12, 24, 48, 48, 48, 48, 48, 24]),
        (0.05, None, SpeechWindows((24,), behind=60), [24, 60, 60, 60, 60, 36]),
        (0.05, None, SpeechWindows((12, 24, 48), behind=96), [12, 96, 96, 96]),
        (0.05, 1, SpeechWindows(), [12, 24, 48, 48, 48, 48, 48, 24]),
    ],
)
def test_windows_are_longer_where_speech_is_behind_anyway(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, step: float, room: int | None, window: Window, chunks: list[int]
) -> None:
    codes = codes_of(300)
    whole = Run(bundle, codes, "whole")
    clock(monkeypatch, step)
    run = Run(bundle, codes, window, room=room)
    assert [len(chunk) // SAMPLES_PER_CODE for chunk in run.chunks] == chunks
    np.testing.assert_array_equal(run.samples, whole.samples)


@pytest.mark.parametrize(("frame", "chunks"), [(0.001, [12, 24, 48, 48, 48, 48, 48, 24]), (0.01, [12, 240, 48])])
def test_a_slow_vocoder_is_behind_as_well(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, frame: float, chunks: list[int]
) -> None:
    """The DiT alone takes 0.72 s of the 0.96 s that 48 codes are heard for."""
    clock(monkeypatch, 0.02, frame)
    run = Run(bundle, codes_of(300), "stream", room=1)
    assert [len(chunk) // SAMPLES_PER_CODE for chunk in run.chunks] == chunks


def test_one_slow_evaluation_is_not_behind(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are read from disk, or a turn that was waited for, say nothing of the machine."""
    elapsed = itertools.accumulate(itertools.cycle([0.0, 0.01, 0.0, 5.0]))  # of two evaluations: 0.01 s and 5 s
    monkeypatch.setattr(token2wav, "time", SimpleNamespace(perf_counter=lambda: next(elapsed)))
    assert max(Run(bundle, codes_of(300), "stream", room=1).dit_windows()) == 84


def test_windows_start_on_blocks_and_carry_their_own_noise(bundle: Bundle) -> None:
    noise = np.random.default_rng(7).standard_normal((400, 80)).astype(np.float32)
    codes = codes_of(200)
    run = Run(bundle, codes, "stream", noise=noise)
    graph = run.backend.graphs["dit"]
    assert isinstance(graph, FakeDit)
    starts = [0, 0, 12, 60, 108, 156]
    for call, start in zip(graph.calls[::36], starts, strict=True):
        window = call["codes"][0].tolist()
        assert start % 12 == 0
        assert window == codes[start : start + len(window)]
        np.testing.assert_array_equal(call["x"][0], noise[2 * start : 2 * (start + len(window))])
    assert [int(call["step"][0]) for call in graph.calls[:9]] == [0, 1, 2, 3, 3, 4, 5, 6, 6]


def test_vocoder_context_is_used_to_the_last_frame(bundle: Bundle) -> None:
    # One frame more on either side than is kept, and the seams show: the equality above is no accident.
    codes = codes_of(100)
    for left, right in ((35, 23), (34, 24)):
        graphs = [FakeBigVgan(80, 240, left=left, right=right) for _ in range(2)]
        whole = Run(bundle, codes, "whole", bigvgan=graphs[0]).samples
        stream = Run(bundle, codes, "stream", bigvgan=graphs[1]).samples
        assert len(stream) == len(whole)
        assert np.abs(stream - whole).max() > 1e-5


def test_a_window_goes_over_from_how_the_one_before_went_on(bundle: Bundle) -> None:
    """The frames behind a window are solved again, otherwise: the sound must not step there, and only there differ."""
    rng = np.random.default_rng(7)
    before, ahead, again = (rng.standard_normal((24, 80)).astype(np.float32) for _ in range(3))
    vocoder = FakeBigVgan(80, 240, left=2, right=2)
    made = Token2Wav(
        FakeBackend(bundle.manifest, {"bigvgan": vocoder}), bundle, bundle.voice(), NoiseStream(None, rng, 80)
    )

    def alone(*frames: NDArray[np.float32]) -> NDArray[np.float32]:
        return vocoder.run({"mel": np.ascontiguousarray(np.concatenate(frames).T[None])})["wav"][0]

    first = made.vocode(MelPiece(np.concatenate([before, ahead]), 0, 24))
    second = made.vocode(MelPiece(np.concatenate([before, again]), 24, 24))
    went_on, own = alone(before, ahead)[24 * 240 :], alone(before, again)[24 * 240 :]
    np.testing.assert_array_equal(first, alone(before, ahead)[: 24 * 240])
    np.testing.assert_array_equal(second[120:], own[120:])
    assert np.abs(went_on[:120] - own[:120]).max() > 0.01
    share = (np.arange(120) + 0.5) / 120
    np.testing.assert_allclose(second[:120], (1 - share) * went_on[:120] + share * own[:120], rtol=0, atol=1e-6)


def test_noise_decides_the_sound_and_the_seed_decides_the_noise(bundle: Bundle) -> None:
    codes = codes_of(30)
    first, again, other = (Run(bundle, codes, "stream", seed=seed).samples for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    drawn = NoiseStream(None, np.random.default_rng(3), 80).frames(0, 60)
    np.testing.assert_array_equal(Run(bundle, codes, "whole", noise=drawn).samples, first)


def test_noise_is_the_same_however_it_is_asked_for() -> None:
    once = NoiseStream(None, np.random.default_rng(5), 80).frames(0, 500)
    pieces = NoiseStream(None, np.random.default_rng(5), 80)
    asked = [(0, 7), (3, 40), (30, 41), (100, 500), (0, 500)]
    for start, stop in asked:
        np.testing.assert_array_equal(pieces.frames(start, stop), once[start:stop])
    assert abs(float(once.mean())) < 0.02
    assert abs(float(once.std()) - 1) < 0.02


@pytest.mark.parametrize("window", ["stream", "whole"])
def test_noise_that_ends_too_soon(bundle: Bundle, window: Window) -> None:
    noise = np.random.default_rng(0).standard_normal((59, 80)).astype(np.float32)
    with pytest.raises(UsageError, match=r"noise has 59 mel frames; the speech needs at least (60|4[89])"):
        Run(bundle, codes_of(30), window, noise=noise)
    assert len(Run(bundle, codes_of(29), window, noise=noise).samples) == 29 * SAMPLES_PER_CODE


@pytest.mark.parametrize(
    "noise",
    [
        np.zeros((60, 79), np.float32),
        np.zeros((1, 60, 80), np.float32),
        np.zeros(80, np.float32),
        np.zeros((60, 80), np.int64),
        np.full((60, 80), np.nan, np.float32),
        "noise",
        [[1.0, 2.0]],
    ],
    ids=["width", "batch", "vector", "integers", "nan", "string", "list"],
)
def test_wrong_noise_is_refused(noise: Any) -> None:
    with pytest.raises(UsageError, match="noise"):
        NoiseStream(noise, np.random.default_rng(0), 80)


@pytest.mark.parametrize("code", [-1, CODES + 1, 8292])
def test_codes_without_sound_are_refused(bundle: Bundle, code: int) -> None:
    with pytest.raises(OmniportError, match=f"codec token {code}"):
        Run(bundle, [1, 2, code], "stream")


@pytest.mark.parametrize(("solver", "evaluations"), [("rk4", 36), ("midpoint", 18), ("euler", 9)])
def test_solvers_differ_in_evaluations_and_a_little_in_sound(bundle: Bundle, solver: Solver, evaluations: int) -> None:
    exact, made = Run(bundle, codes_of(20), "whole"), Run(bundle, codes_of(20), "whole", solver=solver)
    assert len(made.backend.graphs["dit"].calls) == evaluations
    assert np.array_equal(made.samples, exact.samples) == (solver == "rk4")


def test_unknown_solver(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match=r"'heun'.*rk4, midpoint, fast, faster, euler"):
        Run(bundle, [1], "whole", solver="heun")  # type: ignore[arg-type]


def test_unknown_window(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match=r"'half'.*stream, whole"):
        Run(bundle, [1], "half")  # type: ignore[arg-type]


class Broken(FakeDit):
    """A DiT that overflows."""

    def compute(self, feeds: Any, cache: Any) -> dict[str, NDArray[np.float32]]:
        return {"velocity": np.full_like(feeds["x"], np.nan)}


class Short(FakeBigVgan):
    """A vocoder that loses a sample."""

    def compute(self, feeds: Any, cache: Any) -> dict[str, NDArray[np.float32]]:
        return {"wav": super().compute(feeds, cache)["wav"][:, :-1]}


def test_broken_graphs_are_named(bundle: Bundle) -> None:
    with pytest.raises(OmniportError, match=r"mel spectrogram holds .* not finite"):
        Run(bundle, [1], "whole", dit=Broken(80, 2, CODES + 1))
    with pytest.raises(OmniportError, match="479 samples for 2 mel frames"):
        Run(bundle, [1], "whole", bigvgan=Short(80, 240))


def test_time_is_counted(bundle: Bundle) -> None:
    busy = Run(bundle, codes_of(30), "stream").timer.busy
    assert busy["dit"] > 0
    assert busy["bigvgan"] > 0
