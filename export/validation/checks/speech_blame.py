"""Attribute wrong speech to the DiT's graph, the solver, or the runtime around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omniport.runtime.backends.base import Array, Backend
from omniport.runtime.bundle.manifest import SolverSpec
from omniport.runtime.bundle.parts import giving
from omniport.runtime.errors import OmniportError
from omniport.runtime.speech.ode import rk4_schedule, solve

from ...evaluation.metrics import compare

Floats = NDArray[np.float32]

#: correlation above which a chunk is the same sound as another piece
_SAME = 0.9


def blame_mel(
    backend: Backend,
    solver: SolverSpec,
    feeds: Mapping[str, Array],
    noise: Floats,
    wanted: Floats,
    allowed: float,
) -> str:
    """The part that gives velocities, ``solver`` or ``speech``, for a mel that differs from the reference's.

    The graph is driven once by transformers' own ``RungeKutta4ODESolver``: if that gives a wrong mel too, the graph is
    at fault; else the bundle's solver is tried on the same graph; if both are right, the runtime fed them wrongly.

    Args:
        feeds: ``codes``, ``speaker``, ``reference``. noise, wanted: float32 [1, T, 80].
        allowed: relative RMS error that counts as right.
    """

    flow = giving("velocity")

    def velocity(step: int, x: Floats) -> Floats:
        state = np.ascontiguousarray(x, np.float32)
        return backend.graph(flow.name).run({**feeds, "x": state, "step": np.asarray([step], np.int64)})[flow.output]

    def right(mel: Floats) -> bool:
        return float(compare(mel, wanted)["rel_rms"] or 0) <= allowed

    try:
        with np.errstate(all="ignore"):  # an overflow is found by its result
            if not right(_reference_solve(velocity, noise)):
                return flow.name
            return "speech" if right(solve(solver, velocity, noise)) else "solver"
    except OmniportError:
        return flow.name


def _reference_solve(velocity: Any, noise: Floats) -> Floats:
    """transformers' solver on the schedule of ``Qwen2_5OmniToken2WavDiTModel.sample``; [1, T, 80]."""
    from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni

    schedule = rk4_schedule()
    table = np.asarray(schedule.table)

    def function(time: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        step = int(np.abs(table - float(time)).argmin())
        return torch.from_numpy(velocity(step, state.numpy()))

    points = torch.tensor(schedule.grid)
    solver_class: Any = modeling_qwen2_5_omni.RungeKutta4ODESolver
    result: Floats = solver_class(function, torch.from_numpy(noise)).integrate(points)[-1].numpy()
    return result


def misplaced_chunks(chunks: Sequence[Floats], whole: Floats) -> list[str]:
    """For chunks that differ from the whole at their place: where in the whole their sound is, if it is anywhere.

    Returns:
        one sentence for each chunk that holds sound of another place, in order.
    """
    found: list[str] = []
    start = 0
    for index, chunk in enumerate(chunks):
        own = whole[start : start + len(chunk)]
        if len(own) < len(chunk) or _correlation(chunk, own) < _SAME:
            place, match = _best_place(chunk, whole)
            if match >= _SAME and place != start:
                found.append(
                    f"chunk {index} (samples {start} to {start + len(chunk)}) holds the sound of samples {place} to "
                    f"{place + len(chunk)}"
                )
        start += len(chunk)
    return found


def _correlation(a: Floats, b: Floats) -> float:
    scale = float(np.linalg.norm(a.astype(np.float64)) * np.linalg.norm(b.astype(np.float64)))
    return float(a.astype(np.float64) @ b / scale) if scale > 0 else 0.0


def _best_place(chunk: Floats, whole: Floats) -> tuple[int, float]:
    """Where in ``whole`` a chunk fits best, and its correlation there."""
    if len(chunk) > len(whole) or not len(chunk):
        return 0, 0.0
    size = 1 << (len(whole) + len(chunk) - 1).bit_length()
    spectrum = np.fft.rfft(whole.astype(np.float64), size) * np.conj(np.fft.rfft(chunk.astype(np.float64), size))
    products = np.fft.irfft(spectrum, size)[: len(whole) - len(chunk) + 1]
    sums = np.concatenate([[0.0], np.cumsum(whole.astype(np.float64) ** 2)])
    energy = np.maximum(sums[len(chunk) :] - sums[: len(sums) - len(chunk)], 1e-12)
    scores = products / np.sqrt(energy)
    best = int(scores.argmax())
    return best, _correlation(chunk, whole[best : best + len(chunk)])
