"""The solver against known answers, its order, and the reference class."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import msgspec
import numpy as np
import pytest
from omniport.cli.main import app
from omniport.runtime.errors import UsageError
from omniport.runtime.speech.ode import rk4_schedule, solve, with_method
from omniport.runtime.speech.ode_methods import METHODS, Method, Solver
from typer.testing import CliRunner


def even_schedule(intervals: int):
    """The 3/8 rule on an even grid: no sway."""
    return rk4_schedule(intervals + 1, sway=0.0)


def test_linear_system_reaches_its_known_answer() -> None:
    # y' = A y with A a rotation plus decay: y(1) = e^-0.5 * rotation by 2 rad
    matrix = np.array([[-0.5, -2.0], [2.0, -0.5]], np.float32)
    start = np.array([1.0, 0.5], np.float32)
    end = solve(rk4_schedule(), lambda _, y: matrix @ y, start)
    c, s = math.cos(2), math.sin(2)
    expected = math.exp(-0.5) * np.array([c * 1.0 - s * 0.5, s * 1.0 + c * 0.5])
    np.testing.assert_allclose(end, expected, atol=2e-4)
    assert np.abs(end - start).max() > 0.5
    assert start.tolist() == [1.0, 0.5]


def error_of(intervals: int) -> float:
    """Error at t = 1 of y' = 6 t y (stiff enough that float32 rounding stays far below the method's error)."""
    spec = even_schedule(intervals)
    end = solve(spec, lambda k, y: np.float32(6 * spec.table[k]) * y, np.ones(1, np.float32))
    return abs(float(end[0]) - math.exp(3)) / math.exp(3)


def test_order_of_accuracy_is_four() -> None:
    # The order shows as the step shrinks and before float32 rounding does.
    errors = [error_of(n) for n in (10, 20, 40)]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(3.7 <= order <= 4.3 for order in orders), (errors, orders)


def test_cubic_in_time_is_exact() -> None:
    # Both Simpson-like rules of order four integrate t^3 exactly; a wrong weight does not.
    spec = rk4_schedule(4, sway=-1.0)
    end = solve(spec, lambda k, y: np.full_like(y, 4 * spec.table[k] ** 3), np.zeros(3, np.float32))
    np.testing.assert_allclose(end, 1.0, rtol=3e-7)


def test_default_schedule_has_28_times_used_in_order_nine_middles_and_those_of_others() -> None:
    spec = rk4_schedule()
    assert (len(spec.grid), len(spec.stages), len(spec.table)) == (10, 9, 28 + 9 + 11 + 8)
    assert len(set(spec.table)) == 56
    assert list(spec.table[:28]) == sorted(spec.table[:28])
    np.testing.assert_allclose(spec.table[28:37], [(a + b) / 2 for a, b in pairwise(spec.grid)], atol=1e-7)
    assert spec.grid[0] == 0.0
    assert spec.grid[-1] == 1.0
    seen: list[int] = []
    solve(spec, lambda k, y: (seen.append(k), np.zeros_like(y))[1], np.ones((1, 4, 2), np.float32))
    assert seen == [k for stage in spec.stages for k in stage]
    for i, stage in enumerate(spec.stages):
        assert spec.table[stage[0]] == spec.grid[i]
        assert spec.table[stage[3]] == spec.grid[i + 1]


@pytest.mark.parametrize(("solver", "intervals"), [("fast", 4), ("faster", 3)])
def test_few_steps_cross_intervals_of_their_own_with_order_three(
    solver: Solver, intervals: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = with_method(rk4_schedule(), solver)
    assert [len(stage) for stage in spec.stages] == [3] * intervals
    assert (spec.grid[0], spec.grid[-1], len(spec.grid)) == (0, 1, intervals + 1)
    assert spec.grid[1] < 0.25, "the first interval is short: there the noise becomes a sound"
    errors = []
    for count in (20, 40, 80):
        even = tuple(np.linspace(0, 1, count + 1).tolist())
        monkeypatch.setitem(METHODS, solver, replace(METHODS[solver], grid=even))
        spec = with_method(rk4_schedule(), solver)
        assert len(spec.grid) == count + 1
        end = solve(spec, lambda k, y, spec=spec: np.float32(6 * spec.table[k]) * y, np.ones(1, np.float32))
        errors.append(abs(float(end[0]) - math.exp(3)))
    for before, after in pairwise(errors):
        assert math.log2(before / after) == pytest.approx(3, abs=0.25), errors


@pytest.mark.parametrize(("solver", "order", "evaluations"), [("midpoint", 2, 18), ("euler", 1, 9)])
def test_cheaper_solvers_have_their_order(solver: Solver, order: int, evaluations: int) -> None:
    spec = with_method(rk4_schedule(), solver)
    assert sum(map(len, spec.stages)) == evaluations
    errors = []
    for intervals in (40, 80, 160):
        spec = with_method(even_schedule(intervals), solver)
        end = solve(spec, lambda k, y, spec=spec: np.float32(3 * spec.table[k]) * y, np.ones(1, np.float32))
        errors.append(abs(float(end[0]) - math.exp(1.5)))
    for before, after in pairwise(errors):
        assert math.log2(before / after) == pytest.approx(order, abs=0.25), errors


def test_the_reference_method_is_the_schedule_itself() -> None:
    spec = rk4_schedule()
    assert with_method(spec, "rk4") is spec


def test_a_bundle_without_middles_solves_by_euler_and_says_what_midpoint_lacks() -> None:
    spec = rk4_schedule()
    old = msgspec.structs.replace(spec, table=spec.table[:28])
    assert with_method(old, "euler").stages == tuple((3 * i,) for i in range(9))
    with pytest.raises(UsageError, match="Export it again"):
        with_method(old, "midpoint")
    with pytest.raises(UsageError, match=r"solver 'fast'.*Export it again"):
        with_method(msgspec.structs.replace(spec, table=spec.table[:37]), "fast")
    with pytest.raises(UsageError, match="rk4, midpoint, fast, faster, euler"):
        with_method(old, "heun")  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [2, 5, 10, 16, 33])
def test_schedule_equals_the_reference_to_rounding(steps: int) -> None:
    torch = pytest.importorskip("torch", reason="the reference needs the export extra")
    times = torch.linspace(0, 1, steps, dtype=torch.float32)
    times += -1.0 * (torch.cos(torch.pi / 2 * times) - 1 + times)
    spec = rk4_schedule(steps)
    # Two units in the last place of 1: torch's cosine and linspace are rounded by the instruction set that they use.
    np.testing.assert_allclose(spec.grid, times.numpy(), rtol=0, atol=2 * np.finfo(np.float32).eps)


def test_solution_equals_the_reference_class() -> None:
    torch = pytest.importorskip("torch", reason="the reference needs the export extra")
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import RungeKutta4ODESolver

    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((8, 8)).astype(np.float32)
    start = rng.standard_normal((1, 6, 8)).astype(np.float32)
    spec = rk4_schedule()
    asked: list[float] = []

    def field(t: float, x: np.ndarray) -> np.ndarray:
        return np.tanh(x @ matrix) * np.float32(1 + t)

    def reference_field(t, x):
        asked.append(float(t))
        return torch.from_numpy(field(float(t), x.numpy()))

    grid = torch.tensor(spec.grid, dtype=torch.float32)
    expected = RungeKutta4ODESolver(reference_field, torch.from_numpy(start)).integrate(grid)[-1].numpy()
    found = solve(spec, lambda k, x: field(spec.table[k], x), start)
    assert asked == [spec.table[k] for stage in spec.stages for k in stage]
    assert np.sqrt(np.mean(expected**2)) > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_bad_schedules_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 2"):
        rk4_schedule(1)
    with pytest.raises(UsageError, match="do not increase"):
        rk4_schedule(10, sway=-40.0)


def test_the_table_and_the_names_are_one() -> None:
    assert get_args(Solver) == tuple(METHODS)


def test_a_method_is_added_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ralston's method, by its entry alone: the schedule has its points, and it solves with its order."""

    def ralston(velocity, stages, state, step):
        k1 = velocity(stages[0], state)
        k2 = velocity(stages[1], state + k1 * step * 0.75)
        return state + (k1 + k2 * 2) * step * (1 / 3)

    before = rk4_schedule()
    monkeypatch.setitem(METHODS, "ralston", Method((0, 0.75), ralston))
    spec = rk4_schedule()
    assert (spec.table[:37], spec.table[46:]) == (before.table[:37], before.table[37:])
    assert with_method(spec, "ralston").stages == tuple((3 * i, 37 + i) for i in range(9))  # type: ignore[arg-type]
    test_cheaper_solvers_have_their_order("ralston", 2, 18)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="Export it again"):
        with_method(before, "ralston")  # type: ignore[arg-type]


def test_the_command_line_offers_every_method() -> None:
    assert "|".join(METHODS) in CliRunner().invoke(app, ["run", "--help"]).output
