"""What ``auto`` solves by, on machines of several speeds."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.concurrency.timing import Pace
from omniport.runtime.speech import token2wav
from omniport.runtime.speech.ode_methods import SolverChoice
from omniport.runtime.speech.solver_choice import IN_TURN, SHARE, candidates
from omniport.runtime.speech.token2wav import NoiseStream, Token2Wav
from support.bundles import CODES, make_bundle
from support.fake_backend import FakeBackend, FakeDit

EVALUATIONS = {"rk4": 36, "fast": 12, "faster": 9}
#: of an evaluation for a code with which a window of 48 codes and those around it takes as long as it is heard for
JUST_IN_TIME = 48 / 50 / 84 / 36


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(make_bundle(tmp_path_factory.mktemp("choice") / "bundle"))


class TimedDit(FakeDit):
    """Takes so many seconds for each code, and so many more the first time."""

    def __init__(self, clock: list[float], seconds: float, first: float) -> None:
        super().__init__(80, 2, CODES + 1)
        self.clock, self.seconds, self.first = clock, seconds, first

    def compute(self, feeds: Mapping[str, Any], cache: Any) -> dict[str, NDArray[np.float32]]:
        self.clock[0] += self.first + self.seconds * feeds["codes"].shape[1]
        self.first = 0.0
        return super().compute(feeds, cache)


def say(
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    solver: SolverChoice = "auto",
    *,
    first: float = 0.0,
    pace: Pace | None = None,
    window: Any = "stream",
    count: int = 150,
) -> tuple[str, int, NDArray[np.float32]]:
    """(solver in use, evaluations, samples) of an utterance whose evaluations take ``seconds`` for a code."""
    now = [0.0]
    monkeypatch.setattr(token2wav, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    dit = TimedDit(now, seconds, first)
    noise = NoiseStream(None, np.random.default_rng(0), 80)
    backend = FakeBackend(bundle.manifest, {"dit": dit})
    made = Token2Wav(backend, bundle, bundle.voice(), noise, window=window, solver=solver, pace=pace)
    codes = np.random.default_rng(1).integers(0, CODES, count).tolist()
    chunks = [chunk for code in codes for chunk in made.push(code)] + made.finish()
    return made.solver, len(dit.calls), np.concatenate(chunks)


@pytest.mark.parametrize(
    ("work", "wanted"),
    [(0.5, "rk4"), (0.95, "rk4"), (1.2, "fast"), (3.0, "fast"), (3.5, "faster"), (100.0, "faster")],
)
def test_the_most_exact_that_is_in_time(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, work: float, wanted: SolverChoice
) -> None:
    """``work``: seconds of the reference's solver for a second of speech."""
    named = say(bundle, monkeypatch, 0.0, wanted)
    chosen = say(bundle, monkeypatch, work * JUST_IN_TIME)
    assert chosen[0] == wanted
    assert chosen[1] == named[1], "the first evaluation was done twice"
    assert chosen[1] % EVALUATIONS[wanted] == 0
    assert np.sqrt(np.mean(named[2] ** 2)) > 0.05
    np.testing.assert_array_equal(chosen[2], named[2])


def test_the_reply_before_tells_what_a_slow_first_evaluation_does_not(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    pace = Pace()
    quick = 0.5 * JUST_IN_TIME
    assert say(bundle, monkeypatch, quick, first=5.0, pace=pace)[0] == "faster"
    assert pace.evaluation == pytest.approx(quick)
    assert say(bundle, monkeypatch, quick, first=5.0, pace=pace)[0] == "rk4"


def test_a_machine_that_has_become_slow_is_known_one_reply_later(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    pace = Pace(evaluation=0.1 * JUST_IN_TIME)
    assert say(bundle, monkeypatch, 2 * JUST_IN_TIME, pace=pace)[0] == "rk4"
    assert say(bundle, monkeypatch, 2 * JUST_IN_TIME, pace=pace)[0] == "fast"


def test_a_slow_vocoder_counts(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation, frames = 0.5 * JUST_IN_TIME, 2 * 48 + 2 * 34
    room = SHARE * 48 / 50 - evaluation * 36 * 84
    assert room > 0
    for share, wanted in ((0.9, "rk4"), (1.1, "fast")):
        pace = Pace(evaluation=evaluation * 0.999, frame=share * room / frames)
        assert say(bundle, monkeypatch, evaluation, pace=pace)[0] == wanted


def test_speech_that_comes_at_once_is_never_late(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    assert say(bundle, monkeypatch, 100 * JUST_IN_TIME, window="whole")[:2] == ("rk4", 36)


def test_a_bundle_of_an_earlier_release_has_the_reference_s_solver(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    solver = bundle.manifest.solver
    assert solver is not None
    earlier = copy.copy(bundle)
    times = solver.table[: max(map(max, solver.stages)) + 1]
    earlier.manifest = msgspec.structs.replace(bundle.manifest, solver=msgspec.structs.replace(solver, table=times))
    assert say(earlier, monkeypatch, 100 * JUST_IN_TIME)[0] == "rk4"


def test_candidates_are_less_and_less_work(bundle: Bundle) -> None:
    assert bundle.manifest.solver is not None
    work = [sum(map(len, spec.stages)) for spec in candidates(bundle.manifest.solver, "auto", True)]
    assert work == [EVALUATIONS[name] for name in IN_TURN]
    assert all(later <= 0.75 * before for before, later in pairwise(work))
    assert math.isinf(Pace().evaluation)
