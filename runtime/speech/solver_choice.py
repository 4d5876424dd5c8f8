"""What ``auto`` solves by: the most exact of the solvers with which speech is made in time on this machine.

Every method evaluates the velocity at the beginning first, so the first evaluation of a reply tells how fast the
machine is before anything is lost, and a slow machine's first sound is as early as its solver allows. What the reply
before took is known as well: the first evaluation of a process may have waited for weights, or for a GPU that prepares
itself.
"""

from __future__ import annotations

from contextlib import suppress

from ..bundle.manifest import SolverSpec
from ..errors import UsageError
from .ode import with_method
from .ode_methods import METHODS, Solver, SolverChoice

#: from the most exact on, each at least a quarter less work than the one before; `midpoint` and `euler` are less exact
#: than others that take less time (`benchmarks.solvers`)
IN_TURN: tuple[Solver, ...] = ("rk4", "fast", "faster")
#: of the time in which speech is heard that the DiT and the vocoder may take: thinker and talker work beside them
SHARE = 0.7


def candidates(spec: SolverSpec, asked: SolverChoice, streaming: bool) -> tuple[SolverSpec, ...]:
    """The solvers that a reply chooses from, the most exact first.

    Speech that comes all at once is never late: it is solved as the reference does. A bundle of an earlier release
    lacks the time points of some.

    Raises:
        UsageError: an unknown solver, or one that is asked for by name and that the bundle lacks.
    """
    if asked != "auto":
        return (with_method(spec, asked),)
    found = []
    for name in IN_TURN if streaming else IN_TURN[:1]:
        with suppress(UsageError):
            found.append(with_method(spec, name))
    return tuple(found)


def evaluations(spec: SolverSpec) -> int:
    """How often the DiT is evaluated for a window."""
    return sum(map(len, spec.stages))


def name_of(spec: SolverSpec) -> str:
    """The name that users know."""
    return spec.method if spec.method in METHODS else "rk4"
