"""What windows leave to each other, on a DiT that looks one block back and shows if it is given anything else."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from omniport.runtime import AudioChunk, OmniSession, SamplingConfig, SpeechWindows
from omniport.runtime.bundle.manifest import DitGeometry
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import BackendError
from omniport.runtime.speech.kept_blocks import KeptBlocks, kept_bytes, nothing_before
from omniport.runtime.speech.ode_methods import Solver
from omniport.runtime.speech.token2wav import NoiseStream, Token2Wav
from omniport.runtime.speech.windows import Window, window_codes
from support.bundles import CODES, make_bundle
from support.fake_backend import FakeBackend, FakeDit

FRAMES = 24
SAMPLES_PER_CODE = 480


class LookingDit(FakeDit):
    """Each block is drawn towards the mean of the one before it: in this call, or as an earlier one left it."""

    def __init__(self) -> None:
        super().__init__(80, 2, CODES + 1, seed=5)
        self.runs = 0
        self.fails_at: int | None = None

    def compute(self, feeds: Mapping[str, Any], cache: Any) -> dict[str, NDArray[np.float32]]:
        self.runs += 1
        if self.runs == self.fails_at:
            raise BackendError("the graph broke down")
        x, keep = feeds["x"], int(feeds["keep_block"][0])
        assert feeds["past_key_1"].shape == feeds["past_value_1"].shape == (2, FRAMES, 80)
        means = [x[0, i : i + FRAMES].mean(0) for i in range(0, x.shape[1], FRAMES)]
        before = feeds["past_key_1"][0, 0] if feeds["has_past"][0] else np.zeros(80, np.float32)
        drawn = np.repeat(np.stack([before, *means[:-1]]), FRAMES, axis=0)[None, : x.shape[1]]
        velocity = super().compute(feeds, cache)["velocity"] + np.float32(0.5) * drawn
        key = np.broadcast_to(means[keep], (2, FRAMES, 80)).copy()
        return {"velocity": velocity, "present_key_1": key, "present_value_1": -key}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    bundle = Bundle.open(make_bundle(tmp_path_factory.mktemp("kept") / "bundle"))
    return geometry(bundle, past_layers=(1,), past_width=80)


def geometry(bundle: Bundle, **changes: Any) -> Bundle:
    """The bundle with other sizes of its DiT."""
    assert bundle.manifest.dit is not None
    made = copy.copy(bundle)
    dit = msgspec.structs.replace(bundle.manifest.dit, **changes)
    made.manifest = msgspec.structs.replace(bundle.manifest, dit=dit)
    return made


class Run:
    """One utterance."""

    def __init__(
        self,
        bundle: Bundle,
        codes: list[int],
        window: Window,
        solver: Solver = "rk4",
        dit: LookingDit | None = None,
    ) -> None:
        self.dit = dit or LookingDit()
        noise = NoiseStream(None, np.random.default_rng(0), 80)
        backend = FakeBackend(bundle.manifest, {"dit": self.dit})
        self.made = Token2Wav(backend, bundle, bundle.voice(), noise, window=window, solver=solver)
        self.chunks = [chunk for code in codes for chunk in self.made.push(code)] + self.made.finish()

    @property
    def samples(self) -> NDArray[np.float32]:
        return np.concatenate([np.zeros(0, np.float32), *self.chunks])

    def windows(self, evaluations: int = 36) -> list[int]:
        """Codes of each window of the DiT."""
        return [call["codes"].shape[1] for call in self.dit.calls[::evaluations]]


def codes_of(count: int) -> list[int]:
    return np.random.default_rng(1).integers(0, CODES, count).tolist()


LENGTHS = [1, 12, 13, 24, 25, 35, 36, 37, 48, 60, 61, 95, 96, 97, 144, 200]


@pytest.mark.parametrize("count", LENGTHS)
def test_streamed_equals_whole_for_every_length(bundle: Bundle, count: int) -> None:
    codes = codes_of(count)
    whole = Run(bundle, codes, "whole").samples
    assert np.sqrt(np.mean(whole**2)) > 0.05
    for window in ("stream", SpeechWindows((12,)), SpeechWindows((48,)), SpeechWindows((24, 36))):
        streamed = Run(bundle, codes, window).samples  # type: ignore[arg-type]
        assert len(streamed) == count * SAMPLES_PER_CODE
        np.testing.assert_allclose(streamed, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("solver", "evaluations"), [("midpoint", 18), ("fast", 12), ("euler", 9)])
def test_every_solver_keeps_what_belongs_to_its_evaluations(bundle: Bundle, solver: Solver, evaluations: int) -> None:
    codes = codes_of(100)
    whole, run = Run(bundle, codes, "whole", solver), Run(bundle, codes, "stream", solver)
    np.testing.assert_allclose(run.samples, whole.samples, rtol=0, atol=1e-6)
    assert len(run.dit.calls) == evaluations * len(run.windows(evaluations))


def test_windows_cost_their_codes_and_the_look_ahead(bundle: Bundle) -> None:
    dit = bundle.manifest.dit
    assert dit is not None
    assert Run(bundle, codes_of(200), "stream").windows() == [12 + 12, 24 + 12, 48 + 12, 48 + 12, 48 + 12, 20]
    assert window_codes(48, dit) == 60
    assert window_codes(240, dit) == 252


def test_a_dit_that_looks_nowhere_is_given_nothing(bundle: Bundle) -> None:
    """What validation compares with: windows as if they stood alone."""
    blind = Run(geometry(bundle, look_back_blocks=0, look_ahead_blocks=0), codes_of(100), "stream")
    assert blind.windows() == [12, 24, 48, 16]
    assert not any(int(call["has_past"][0]) for call in blind.dit.calls)


def test_utterances_side_by_side_keep_their_own(bundle: Bundle) -> None:
    dit, noise = LookingDit(), [NoiseStream(None, np.random.default_rng(seed), 80) for seed in (0, 1)]
    backend = FakeBackend(bundle.manifest, {"dit": dit})
    made = [Token2Wav(backend, bundle, bundle.voice(), one) for one in noise]
    pieces: list[list[NDArray[np.float32]]] = [[], []]
    for code in codes_of(100):
        for place, one in enumerate(made):
            pieces[place] += one.push(code)
    for place, one in enumerate(made):
        pieces[place] += one.finish()
    first, second = (np.concatenate(chunks) for chunks in pieces)
    np.testing.assert_array_equal(first, Run(bundle, codes_of(100), "stream").samples)
    assert np.abs(first - second).max() > 1e-3


def test_nothing_outlives_a_window_that_failed(bundle: Bundle) -> None:
    """The utterance is over; the next one on the same graph begins with nothing."""
    dit = LookingDit()
    dit.fails_at = 36 + 18
    with pytest.raises(BackendError, match="broke down"):
        Run(bundle, codes_of(100), "stream", dit=dit)
    dit.calls.clear()
    np.testing.assert_array_equal(
        Run(bundle, codes_of(100), "stream", dit=dit).samples, Run(bundle, codes_of(100), "stream").samples
    )
    assert [int(call["has_past"][0]) for call in dit.calls[::36]] == [0, 1, 1, 1]


def test_bytes_are_counted(bundle: Bundle) -> None:
    assert bundle.manifest.dit is not None
    kept = Run(bundle, codes_of(100), "stream").made._kept
    assert isinstance(kept, KeptBlocks)
    assert kept.nbytes == kept_bytes(bundle.manifest.dit, 36) == 36 * 2 * 2 * 24 * 80 * 4
    assert {name: array.shape for name, array in nothing_before(bundle.manifest.dit).items()} == {
        "has_past": (1,),
        "keep_block": (1,),
        "past_key_1": (2, 24, 80),
        "past_value_1": (2, 24, 80),
    }


def test_bundles_of_before_are_given_what_they_take(tmp_path: Any) -> None:
    before = Bundle.open(make_bundle(tmp_path / "bundle"))
    assert before.manifest.dit is not None
    assert nothing_before(before.manifest.dit) == {}
    assert kept_bytes(before.manifest.dit, 36) == 0


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_reply_that_has_ended_holds_no_blocks(
    cancelled: bool, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, and not when the garbage collector comes: they are the largest of what a reply holds."""
    made: list[KeptBlocks] = []
    most = [0]

    class Watched(KeptBlocks):
        def __init__(self, dit: DitGeometry) -> None:
            super().__init__(dit)
            made.append(self)

        def take(self, evaluation: int, outputs: Mapping[str, Any]) -> None:
            super().take(evaluation, outputs)
            most[0] = max(most[0], self.nbytes)

    monkeypatch.setattr("omniport.runtime.speech.token2wav.KeptBlocks", Watched)
    with OmniSession.open(tiny_bundle, backend="ort-cpu", threads=1) as session:
        codes = SamplingConfig(max_new_tokens=60, temperature=0.0)
        events = session.reply(
            [{"role": "user", "content": "Hello"}], thinker=SamplingConfig(max_new_tokens=4), talker=codes
        )
        for event in events:
            if cancelled and isinstance(event, AudioChunk):
                events.close()
                break
        (kept,) = made
        assert most[0] > 0
        assert kept.nbytes == 0
