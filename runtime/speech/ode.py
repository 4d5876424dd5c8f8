"""ODE solvers of the flow-matching DiT on a fixed schedule.

Fourth-order Runge-Kutta by the 3/8 rule, as in the reference, and two cheaper ones over the same intervals.

Because the schedule is fixed, every time at which the velocity is evaluated is known beforehand: the exporter folds the
DiT's modulations for exactly these times, and the solver names a time by its index in that table. Arithmetic follows
transformers' ``RungeKutta4ODESolver`` operation by operation, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import SolverSpec
from ..errors import UsageError

#: methods that a bundle's schedule may be made for, with the evaluations of one interval
METHODS: Mapping[str, int] = {"rk4-3/8": 4}

Solver = Literal["rk4", "midpoint", "euler"]
#: modes by the names that users give them: the reference's, half as many evaluations, a quarter
SOLVERS: tuple[Solver, ...] = ("rk4", "midpoint", "euler")

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
        grid of ``num_steps`` points, and a table of evaluation times: each interval's start, one third and two thirds
        (its end is the next one's start), the end of all, and behind them the middle of each interval, which the
        ``midpoint`` mode asks for.

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
    table += [_middle(start, end) for start, end in pairwise(grid)]
    return SolverSpec(
        method="rk4-3/8",
        grid=tuple(float(t) for t in grid),
        table=tuple(float(t) for t in table),
        stages=tuple((3 * i, 3 * i + 1, 3 * i + 2, 3 * i + 3) for i in range(num_steps - 1)),
        guidance_scale=guidance,
        sway=sway,
    )


def with_method(spec: SolverSpec, solver: Solver) -> SolverSpec:
    """The same schedule solved another way.

    Raises:
        UsageError: an unknown mode, or a bundle whose DiT was exported without the time points that it needs.
    """
    if solver not in SOLVERS:
        raise UsageError(f"solver is {solver!r}; {', '.join(SOLVERS)} was expected")
    if solver == "rk4":
        return spec
    starts = [_index(spec, np.float32(start), solver) for start in spec.grid[:-1]]
    stages: tuple[tuple[int, ...], ...] = tuple((start,) for start in starts)
    if solver == "midpoint":
        middles = [_middle(np.float32(a), np.float32(b)) for a, b in pairwise(spec.grid)]
        stages = tuple((start, _index(spec, middle, solver)) for start, middle in zip(starts, middles, strict=True))
    return msgspec.structs.replace(spec, method=solver, stages=stages)


def _middle(start: np.float32, end: np.float32) -> np.float32:
    return np.float32(start + (end - start) * np.float32(0.5))


def _index(spec: SolverSpec, time: np.float32, solver: str) -> int:
    """Place of a time in the table."""
    for index, known in enumerate(spec.table):
        if np.float32(known) == time:
            return index
    raise UsageError(
        f"solver {solver!r} evaluates the DiT at t = {float(time):.6g}, which is none of the {len(spec.table)} time "
        "points that this bundle was exported with: bundles of earlier releases have those of rk4 and euler only. "
        "Export it again, or use another solver"
    )


def solve(spec: SolverSpec, velocity: Velocity, initial: NDArray[np.float32]) -> NDArray[np.float32]:
    """Integrate ``dx/dt = velocity(t, x)`` over the schedule.

    Args:
        velocity: called at each interval's ``spec.stages``, in their order.
        initial: state at ``spec.grid[0]``, any shape; left as it is.

    Returns:
        float32 state at ``spec.grid[-1]``.
    """
    state = np.asarray(initial, np.float32)
    grid = np.asarray(spec.grid, np.float32)
    advance = _ADVANCE[spec.method]
    for i, stages in enumerate(spec.stages):
        state = advance(velocity, stages, state, grid[i + 1] - grid[i])
    return state


def _rk4(
    velocity: Velocity, stages: tuple[int, ...], state: NDArray[np.float32], step: np.float32
) -> NDArray[np.float32]:
    """The 3/8 rule."""
    t1, t2, t3, t4 = stages
    k1 = velocity(t1, state)
    k2 = velocity(t2, state + k1 * step * _THIRD)
    toward: NDArray[np.float32] = k2 - k1 * _THIRD
    k3 = velocity(t3, state + toward * step)
    k4 = velocity(t4, state + (k1 - k2 + k3) * step)
    return state + (k1 + (k2 + k3) * np.float32(3) + k4) * step * np.float32(0.125)


def _midpoint(
    velocity: Velocity, stages: tuple[int, ...], state: NDArray[np.float32], step: np.float32
) -> NDArray[np.float32]:
    """The velocity half a step ahead."""
    start, middle = stages
    half = state + velocity(start, state) * step * np.float32(0.5)
    return state + velocity(middle, half) * step


def _euler(
    velocity: Velocity, stages: tuple[int, ...], state: NDArray[np.float32], step: np.float32
) -> NDArray[np.float32]:
    return state + velocity(stages[0], state) * step


_ADVANCE = {"rk4-3/8": _rk4, "midpoint": _midpoint, "euler": _euler}


def _linspace(count: int) -> NDArray[np.float32]:
    """0 to 1 in float32 as torch computes it: the first half counted from 0, the second back from 1, rounded once."""
    step = np.float64(np.float32(1) / np.float32(count - 1))
    index = np.arange(count)
    rising = index * step
    falling = 1.0 - (count - 1 - index) * step
    return np.where(index < count // 2, rising, falling).astype(np.float32)
