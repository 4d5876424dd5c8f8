"""Check the runtime's ODE solver against transformers', and trace a wrong mel to the solver or to a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from omniport.runtime.backends.base import Array, Backend
from omniport.runtime.bundle.manifest import Manifest, SolverSpec
from omniport.runtime.bundle.parts import giving
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import OmniportError
from omniport.runtime.speech.kept_blocks import nothing_before
from omniport.runtime.speech.ode import rk4_schedule, solve
from omniport.runtime.speech.token2wav import NoiseStream, Token2Wav

from ...evaluation.metrics import compare
from ...evaluation.recording import RecordedGraph, ScriptedBackend
from ..comparison import array_check
from ..reference_speech import Floats, Solve
from ..types import Check

_CODES = 15
#: schedule of ``Qwen2_5OmniToken2WavDiTModel.sample``
_POINTS, _SWAY = 10, -1.0


def known_flow_check(bundle: Bundle) -> Check:
    """A flow given by a formula, through ``Token2Wav`` and through the reference's solver from the same noise."""
    manifest = bundle.manifest
    dit, vocoder, solver = manifest.dit, manifest.vocoder, manifest.solver
    assert dit is not None
    assert vocoder is not None
    assert solver is not None
    table, hop = solver.table, vocoder.hop
    solved, voiced = giving("velocity").name, giving("wav").name
    noise = np.random.default_rng(5).standard_normal((_CODES * dit.repeats, dit.mel_dim)).astype(np.float32)

    def velocity(feeds: Mapping[str, Array]) -> dict[str, Floats]:
        time = torch.tensor(table[int(feeds["step"][0])], dtype=torch.float32)
        return {"velocity": _flow(time, torch.from_numpy(np.asarray(feeds["x"], np.float32))).numpy()}

    backend = ScriptedBackend(
        {solved: velocity, voiced: lambda feeds: {"wav": np.zeros((1, hop * feeds["mel"].shape[2]), np.float32)}}
    )
    stream = NoiseStream(noise, np.random.default_rng(0), dit.mel_dim)
    try:
        vocal = Token2Wav(backend, bundle, bundle.voice(), stream, window="whole")
        for code in range(_CODES):
            vocal.push(code)
        vocal.finish()
    except (OmniportError, IndexError, ValueError) as error:
        return Check.failed("solver", "a known flow", f"the solver broke down: {error}")
    got = backend.graph(voiced).calls[0]["mel"][0].T
    times = torch.linspace(0, 1, _POINTS)
    times = times + _SWAY * (torch.cos(torch.pi / 2 * times) - 1 + times)
    wanted = _reference_solve(_flow, noise, times)
    return array_check("solver", "a known flow", got, wanted, rule="solver.rel_rms")


def _flow(time: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Depends on time, and not linearly on the state, so that every weight and every time point of the rule counts."""
    return 3 * torch.cos(5 * time) - 2 * (1 + time) * x + torch.sin(3 * x)


def _reference_solve(
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], noise: Floats, times: torch.Tensor
) -> Floats:
    """transformers' solver, from the noise at the first time to the state at the last."""
    from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as modeling

    solver_class: Any = modeling.RungeKutta4ODESolver
    result: Floats = solver_class(function, torch.from_numpy(noise)).integrate(times)[-1].numpy()
    return result


def trajectory_checks(
    name: str, graph: RecordedGraph, mel: Floats, solve: Solve, manifest: Manifest
) -> Iterator[Check]:
    """The solver over the reference DiT's velocities: when and where it asked for them, and what it made of them.

    Args:
        graph: what stood for the DiT. mel: float32 [80, T], what came out.
    """
    solver = manifest.solver
    assert solver is not None
    steps = [int(call["step"][0]) for call in graph.calls]
    if not all(0 <= step < len(solver.table) for step in steps):
        message = f"the solver asks for steps {steps} of a table of {len(solver.table)}"
        yield Check.failed("solver", f"{name}: times", message)
        return
    times = np.asarray([solver.table[step] for step in steps], np.float32)
    yield array_check("solver", f"{name}: times", times, solve.times, rule="solver.rel_rms")
    states = np.concatenate([call["x"] for call in graph.calls])
    title = f"{name}: states and mel over the reference's velocities"
    if states.shape != solve.x.shape or mel.shape != solve.mel.shape:
        message = (
            f"{states.shape} states and a mel of {mel.shape}; the reference has {solve.x.shape} and {solve.mel.shape}"
        )
        yield Check.failed("solver", title, message)
        return
    got = np.concatenate([states, mel.T[None]])
    yield array_check("solver", title, got, np.concatenate([solve.x, solve.mel.T[None]]), rule="solver.rel_rms")


def whole_feeds(bundle: Bundle, codes: Sequence[int]) -> dict[str, Array]:
    """Inputs of the part that gives velocities, but ``x`` and ``step``, for all codes of a reply at once."""
    assert bundle.manifest.dit is not None
    return {
        "codes": np.asarray([codes], np.int64),
        **bundle.voice().feeds(),
        **nothing_before(bundle.manifest.dit),
    }


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
        feeds: all inputs but ``x`` and ``step``. noise, wanted: float32 [1, T, 80].
        allowed: relative RMS error that counts as right.
    """
    flow, schedule = giving("velocity"), rk4_schedule()

    def velocity(step: int, x: Floats) -> Floats:
        state = np.ascontiguousarray(x, np.float32)
        return backend.graph(flow.name).run({**feeds, "x": state, "step": np.asarray([step], np.int64)})[flow.output]

    def timed(time: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        step = int(np.abs(np.asarray(schedule.table) - float(time)).argmin())
        return torch.from_numpy(velocity(step, state.numpy()))

    def right(mel: Floats) -> bool:
        return float(compare(mel, wanted)["rel_rms"] or 0) <= allowed

    try:
        with np.errstate(all="ignore"):  # an overflow is found by its result
            if not right(_reference_solve(timed, noise, torch.tensor(schedule.grid))):
                return flow.name
            return "speech" if right(solve(solver, velocity, noise)) else "solver"
    except OmniportError:
        return flow.name
