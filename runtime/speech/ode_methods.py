"""The methods that solve the DiT's ODE: a new one is added here and nowhere else.

A method needs its name in ``Solver``, a function that crosses one interval, and an entry in ``METHODS`` that says at
which points of an interval it evaluates the velocity. The session, the command line and the benchmark take them from
here, and so does the export, which folds the DiT's modulations for the times of all of them: a bundle that was exported
before knows the points of its time only.

Nothing here imports numpy, so that the command line can list the names at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    State = NDArray[np.float32]
    Velocity = Callable[[int, State], State]
    """(index into the schedule's table, state) -> derivative, of the state's shape"""

#: by the names that users give them: the reference's with 36 evaluations, 18, 12, 9 and 9
Solver = Literal["rk4", "midpoint", "fast", "faster", "euler"]
#: what may be asked for: ``auto`` is one of them, see `solver_choice`
SolverChoice = Literal["auto", "rk4", "midpoint", "fast", "faster", "euler"]


@dataclass(frozen=True)
class Method:
    """One way to cross an interval.

    Attributes:
        points: where the velocity is evaluated, in order: 0 is the interval's start, 1 its end.
        advance: (velocity, table index of each point, state, length of the interval) -> state at its end.
        grid: ends of the intervals, from 0 to 1; None: the bundle's.
    """

    points: tuple[float, ...]
    advance: Callable[[Velocity, tuple[int, ...], State, np.float32], State]
    grid: tuple[float, ...] | None = None


def _rk4(velocity: Velocity, stages: tuple[int, ...], state: State, step: np.float32) -> State:
    """The 3/8 rule, operation by operation as transformers' ``RungeKutta4ODESolver``."""
    t1, t2, t3, t4 = stages
    k1 = velocity(t1, state)
    k2 = velocity(t2, state + k1 * step * (1 / 3))
    toward: State = k2 - k1 * (1 / 3)
    k3 = velocity(t3, state + toward * step)
    k4 = velocity(t4, state + (k1 - k2 + k3) * step)
    return state + (k1 + (k2 + k3) * 3 + k4) * step * 0.125


def _midpoint(velocity: Velocity, stages: tuple[int, ...], state: State, step: np.float32) -> State:
    """The velocity half a step ahead."""
    start, middle = stages
    half = state + velocity(start, state) * step * 0.5
    return state + velocity(middle, half) * step


def _ralston3(velocity: Velocity, stages: tuple[int, ...], state: State, step: np.float32) -> State:
    """Ralston's third order, whose bound on the error of an interval is the least of its order."""
    start, middle, late = stages
    k1 = velocity(start, state)
    k2 = velocity(middle, state + k1 * step * 0.5)
    k3 = velocity(late, state + k2 * step * 0.75)
    return state + (k1 * 2 + k2 * 3 + k3 * 4) * step * (1 / 9)


def _euler(velocity: Velocity, stages: tuple[int, ...], state: State, step: np.float32) -> State:
    return state + velocity(stages[0], state) * step


METHODS: Mapping[Solver, Method] = {
    "rk4": Method((0, 1 / 3, 2 / 3, 1), _rk4),
    "midpoint": Method((0, 0.5), _midpoint),
    # intervals found by `benchmarks.solvers --search` on a trained DiT
    "fast": Method((0, 0.5, 0.75), _ralston3, (0, 0.1179, 0.4629, 0.8152, 1)),
    "faster": Method((0, 0.5, 0.75), _ralston3, (0, 0.2142, 0.7588, 1)),
    "euler": Method((0,), _euler),
}
CHOICES: tuple[SolverChoice, ...] = ("auto", *METHODS)
