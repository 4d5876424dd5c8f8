"""The ODE solver of the flow-matching DiT: fourth-order Runge-Kutta by the 3/8 rule on a fixed schedule.

Because the schedule is fixed, every time at which the velocity is evaluated is known beforehand: the exporter folds the
DiT's modulations for exactly these times, and the solver names a time by its index in that table. Arithmetic follows
transformers' ``RungeKutta4ODESolver`` operation by operation, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError
from .manifest import SolverSpec

__all__ = ["METHODS", "Velocity", "rk4_schedule", "solve"]

#: solver methods this release knows, with the evaluations of one interval
METHODS: Mapping[str, int] = {"rk4-3/8": 4}

Velocity = Callable[[int, NDArray[np.float32]], NDArray[np.float32]]
"""(index into the schedule's table, state) -> derivative, of the state's shape."""

_THIRD = np.float32(1 / 3)
_TWO_THIRDS = np.float32(2 / 3)


def rk4_schedule(num_steps: int = 10, sway: float = -1.0, guidance: float = 0.5) -> SolverSpec:
    """The schedule of ``Qwen2_5OmniToken2WavDiTModel.sample``.

    Args:
        num_steps: time points; there is one interval fewer.
        sway: ``t + sway * (cos(pi/2 t) - 1 + t)`` bends the even grid towards its start (negative) or end.
        guidance: classifier-free guidance that the DiT graph applies.

    Returns:
        grid of ``num_steps`` points, and a table of ``3 * (num_steps - 1) + 1`` evaluation times: each interval's
        start, one third and two thirds; its end is the next one's start.

    Raises:
        UsageError: fewer than two time points, or a schedule that does not increase.
    """
    if num_steps < 2:
        raise UsageError(f"a solver schedule of {num_steps} time points; at least 2 were expected")
    even = _linspace(num_steps)
    # The cosine is rounded once, from float64: float32 library cosines differ in the last bit between platforms.
    cosine = np.cos((np.float32(np.pi / 2) * even).astype(np.float64)).astype(np.float32)
    grid = even + np.float32(sway) * (cosine - np.float32(1) + even)
    if not (np.diff(grid) > 0).all():
        raise UsageError(f"a sway of {sway} gives time points that do not increase; -1 to 1 was expected")
    table: list[np.float32] = []
    for start, end in pairwise(grid):
        step = end - start
        table += [start, start + step * _THIRD, start + step * _TWO_THIRDS]
    table.append(grid[-1])
    return SolverSpec(
        method="rk4-3/8",
        grid=tuple(float(t) for t in grid),
        table=tuple(float(t) for t in table),
        stages=tuple((3 * i, 3 * i + 1, 3 * i + 2, 3 * i + 3) for i in range(num_steps - 1)),
        guidance_scale=guidance,
        sway=sway,
    )


def solve(spec: SolverSpec, velocity: Velocity, initial: NDArray[np.float32]) -> NDArray[np.float32]:
    """Integrate ``dx/dt = velocity(t, x)`` over the schedule.

    Args:
        velocity: called four times an interval, in the order of ``spec.stages``.
        initial: state at ``spec.grid[0]``, any shape; left as it is.

    Returns:
        float32 state at ``spec.grid[-1]``.
    """
    state = np.asarray(initial, np.float32)
    grid = np.asarray(spec.grid, np.float32)
    for i, (t1, t2, t3, t4) in enumerate(spec.stages):
        step: np.float32 = grid[i + 1] - grid[i]
        k1 = velocity(t1, state)
        k2 = velocity(t2, state + k1 * step * _THIRD)
        toward: NDArray[np.float32] = k2 - k1 * _THIRD
        k3 = velocity(t3, state + toward * step)
        k4 = velocity(t4, state + (k1 - k2 + k3) * step)
        state = state + (k1 + (k2 + k3) * np.float32(3) + k4) * step * np.float32(0.125)
    return state


def _linspace(count: int) -> NDArray[np.float32]:
    """0 to 1 in float32 as torch computes it: the first half counted from 0, the second back from 1, rounded once."""
    step = np.float64(np.float32(1) / np.float32(count - 1))
    index = np.arange(count)
    rising = index * step
    falling = 1.0 - (count - 1 - index) * step
    return np.where(index < count // 2, rising, falling).astype(np.float32)
