"""Compare the ODE solvers: speed, and distance of the mel spectrogram from the reference method's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Backend
from ..bundle.manifest import SolverSpec
from ..bundle.parts import giving
from ..bundle.reader import Bundle
from ..errors import UsageError
from ..speech.ode import solve, with_method
from ..speech.ode_methods import METHODS
from .results import Figure
from .roofline import Clock, alternate, spread
from .workloads import Sizes


def measure_solvers(bundle: Bundle, backend: Backend, sizes: Sizes, rounds: int, clock: Clock) -> tuple[Figure, ...]:
    """Every mode over the same codes and noise: seconds, and the mel's distance from ``rk4``.

    ``mel_distance``: RMS of the difference over RMS of the mel about its mean. ``mel_error_db``: RMS of the difference
    in dB of amplitude, which is what a log-mel is measured in.
    """
    count = min(sizes.codes)
    spec = bundle.manifest.solver
    assert spec is not None
    mels: dict[str, NDArray[np.float32]] = {}
    figures = []
    for mode in METHODS:
        try:
            schedule = with_method(spec, mode)
        except UsageError:  # a bundle of an earlier release, whose DiT lacks this mode's time points
            continue

        def run(mode: str = mode, schedule: SolverSpec = schedule) -> None:
            mels[mode] = _mel(bundle, backend, schedule, count)

        seconds, _ = alternate(run, None, rounds, 0, clock=clock)
        figures.append(
            Figure(
                name=mode,
                size=count,
                of="codes",
                count=1,
                unit="solution",
                seconds=spread(seconds),
                values={"evaluations": sum(map(len, schedule.stages))} | _distance(mels[mode], mels["rk4"]),
            )
        )
    return tuple(figures)


def _distance(mel: NDArray[np.float32], wanted: NDArray[np.float32]) -> dict[str, float]:
    rms = float(np.sqrt(np.mean((mel - wanted).astype(np.float64) ** 2)))
    return {"mel_distance": rms / float(np.std(wanted.astype(np.float64))), "mel_error_db": rms * 20 / math.log(10)}


def _mel(bundle: Bundle, backend: Backend, schedule: SolverSpec, count: int) -> NDArray[np.float32]:
    """Mel frames of fixed codes and noise."""
    geometry = bundle.manifest.dit
    assert geometry is not None
    rng = np.random.default_rng(0)
    feeds: dict[str, NDArray[Any]] = {
        "codes": rng.integers(0, geometry.num_embeds, (1, count)),
        **bundle.voice().feeds(),
    }
    noise = rng.standard_normal((1, count * geometry.repeats, geometry.mel_dim), np.float32)
    graph = backend.graph(giving("velocity").name)

    def velocity(step: int, x: NDArray[np.float32]) -> NDArray[np.float32]:
        return graph.run({**feeds, "x": x, "step": np.asarray([step], np.int64)})["velocity"]

    return solve(schedule, velocity, noise)
