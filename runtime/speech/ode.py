"""Solve the DiT's ODE on a fixed schedule, by one of the methods of `ode_methods`.

Because the schedule is fixed, every time at which the velocity is evaluated is known beforehand: the exporter folds the
DiT's modulations for exactly these times, and the solver names a time by its index in that table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import SolverSpec
from ..errors import UsageError
from .ode_methods import CHOICES, METHODS, Method, Solver

if TYPE_CHECKING:
    from .ode_methods import Velocity

#: methods that a bundle's schedule may be made for, as bundle.json names them
SCHEDULED: Mapping[str, Method] = {"rk4-3/8": METHODS["rk4"]}


def rk4_schedule(num_steps: int = 10, sway: float = -1.0, guidance: float = 0.5) -> SolverSpec:
    """The schedule of ``Qwen2_5OmniToken2WavDiTModel.sample``.

    Args:
        num_steps: time points; there is one interval fewer.
        sway: ``t + sway * (cos(pi/2 t) - 1 + t)`` bends the even grid towards its start (negative) or end.
        guidance: classifier-free guidance that the DiT graph applies.

    Returns:
        grid of ``num_steps`` points, and a table of evaluation times: each interval's start, one third and two thirds
        (its end is the next one's start), the end of all, and behind them the points that other methods ask for: the
        middle of each interval, and the times of methods with a grid of their own.

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
    reference = METHODS["rk4"].points
    table = [*_times(grid, reference[:-1]), grid[-1]]
    shared = {point for method in METHODS.values() if method.grid is None for point in method.points}
    for point in sorted(shared - set(reference)):
        table += _times(grid, (point,))
    for method in METHODS.values():
        if method.grid is not None:
            table += [time for time in _times(np.asarray(method.grid, np.float32), method.points) if time not in table]
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
        UsageError: an unknown method, or a bundle whose DiT was exported without the time points that it needs.
    """
    if solver not in METHODS:
        raise UsageError(f"solver is {solver!r}; {', '.join(CHOICES)} was expected")
    if METHODS[solver] is SCHEDULED.get(spec.method):
        return spec
    method, points = METHODS[solver], METHODS[solver].points
    grid = np.asarray(method.grid or spec.grid, np.float32)
    indices = [_index(spec, time, solver) for time in _times(grid, points)]
    stages = tuple(tuple(indices[i : i + len(points)]) for i in range(0, len(indices), len(points)))
    return msgspec.structs.replace(spec, method=solver, grid=tuple(map(float, grid)), stages=stages)


def _times(grid: NDArray[np.float32], points: Sequence[float]) -> Iterator[np.float32]:
    """The times of these points of every interval."""
    for start, end in pairwise(grid):
        for point in points:
            yield end if point == 1 else np.float32(start + (end - start) * np.float32(point))


def _index(spec: SolverSpec, time: np.float32, solver: str) -> int:
    """Index of a time in the table."""
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
    method = SCHEDULED.get(spec.method) or METHODS[cast("Solver", spec.method)]
    for i, stages in enumerate(spec.stages):
        state = method.advance(velocity, stages, state, grid[i + 1] - grid[i])
    return state


def _linspace(count: int) -> NDArray[np.float32]:
    """0 to 1 in float32 as torch computes it: the first half counted from 0, the second back from 1, rounded once."""
    step = np.float64(np.float32(1) / np.float32(count - 1))
    index = np.arange(count)
    rising = index * step
    falling = 1.0 - (count - 1 - index) * step
    return np.where(index < count // 2, rising, falling).astype(np.float32)
