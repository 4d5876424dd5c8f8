"""Plans: shapes and sizes against real bundles, rates against what was measured and published, the command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omniport.calib.quantizer import quantize
from omniport.cli.main import app
from omniport.export.planning.machines import Machine, Rates, cpu_machine, find_machines, measure_rates
from omniport.export.planning.plan import RecipePlan, TargetPlan, make_plan
from omniport.export.planning.shapes import ModelShape, find_model, shape_of_bundle, shape_of_config
from omniport.export.planning.weights import RECIPES, graph_bytes
from omniport.export.synthetic.geometries import SIZES, geometry_config
from omniport.export.tensorrt.build_check import memory_needed
from omniport.export.tensorrt.onnx_file import open_onnx
from omniport.export.tensorrt.profiles import Limits
from omniport.runtime.backends.tensorrt.kv_cache import GrowingTrtCache, StaticTrtCache
from omniport.runtime.bundle.manifest import DitGeometry
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import CheckpointError, UsageError
from support.fake_device import FakeDriver
from typer.testing import CliRunner

from benchmarks import plan as plan_bench
from benchmarks.harness import RESULTS

RATES = Rates(bandwidth=30e9, products=2e11)


def machine(name: str) -> Machine:
    return cpu_machine(RATES, memory=24 << 30) if name == "cpu" else find_machines(name)[0]


def planned(model: ModelShape | str, target: str, context: int = 4096) -> TargetPlan:
    return make_plan(find_model(model) if isinstance(model, str) else model, machine(target), context)


def row(plan: TargetPlan, recipe: str) -> RecipePlan:
    return next(row for row in plan.recipes if row.recipe.name == recipe)


@pytest.fixture(scope="module")
def bundles(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``tiny`` in FP32 and by every recipe that needs no data."""
    room = tmp_path_factory.mktemp("planned")
    # a copy: quantize links what it does not change, and onnx's checker refuses files with several links
    shutil.copytree(tiny_bundle, room / "fp32")
    for recipe in ("w8", "int4"):
        quantize(room / "fp32", room / recipe, recipe)
    return {name: room / name for name in ("fp32", "w8", "int4")}


# --- shapes and sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "weights", "thinker", "talker"),
    [("3b", 5.07e9, 3_085_938_688, 367_302_528), ("7b", 10.02e9, 7_070_619_136, 1_321_081_728)],
)
def test_published_sizes_need_no_files(size: str, weights: float, thinker: int, talker: int) -> None:
    """Parameters of the graphs: the decoders' by hand, without their token tables."""
    model = find_model(size)
    assert model.graphs["thinker"].parameters == thinker
    assert model.graphs["talker"].parameters == talker
    total = sum(graph.parameters for graph in model.graphs.values())
    assert total == pytest.approx(weights, rel=0.001)
    assert model.max_context == 32768


@pytest.mark.parametrize("recipe", ["fp32", "w8", "int4"])
@pytest.mark.parametrize("source", ["bundle", "checkpoint"])
def test_sizes_are_those_of_the_files(
    bundles: dict[str, Path], tiny_checkpoint: Path, recipe: str, source: str
) -> None:
    """Weights by graph within 1 %, from the bundle itself and from config.json alone."""
    model = find_model(str(bundles[recipe] if source == "bundle" else tiny_checkpoint))
    bundle = Bundle.open(bundles[recipe])
    for name, shape in model.graphs.items():
        size = open_onnx(bundle.path(bundle.manifest.graphs[name].file)).weights_bytes
        assert graph_bytes(shape, RECIPES[recipe], "fp32") == pytest.approx(size, rel=0.01), name


def test_half_precision_bundles(tiny_half_bundles: dict[str, Path]) -> None:
    for precision, root in tiny_half_bundles.items():
        bundle, model = Bundle.open(root), find_model(str(root))
        for name, shape in model.graphs.items():
            size = open_onnx(bundle.path(bundle.manifest.graphs[name].file)).weights_bytes
            recipe = replace(RECIPES[precision], token2wav="fp16" if precision == "fp16" else "fp32")
            chosen = recipe.graph_precision(name, precision)
            # norms stay in FP32, which tiny layers notice
            assert graph_bytes(shape, recipe, chosen) == pytest.approx(size, rel=0.05), name


def test_a_bundle_and_its_checkpoint_multiply_alike(bundles: dict[str, Path], tiny_checkpoint: Path) -> None:
    exported, stored = find_model(str(bundles["fp32"])), find_model(str(tiny_checkpoint))
    for name in ("thinker", "talker", "dit", "bigvgan"):
        assert exported.graphs[name].operations(8) == pytest.approx(stored.graphs[name].operations(8), rel=0.02), name
    assert exported.solvers == stored.solvers == {"rk4": 36, "fast": 12, "faster": 9}
    for dit in (exported.dit, stored.dit):
        assert (dit.past_layers, dit.past_width, dit.block_size, dit.look_ahead_codes) == ((0, 3), 128, 24, 12)


def test_the_solver_is_the_most_exact_that_is_in_time() -> None:
    model = find_model("3b")
    assert list(model.solvers) == ["rk4", "fast", "faster"]
    chosen = []
    for target in ("rtx-4090", "jetson-agx-orin-64gb", "jetson-orin-nano-8gb"):
        alone = {
            name: row(planned(replace(model, solvers={name: count}), target), "fp16").speed
            for name, count in model.solvers.items()
        }
        speed = row(planned(model, target), "fp16").speed
        assert speed is not None
        in_time = [name for name, by_itself in alone.items() if by_itself is not None and by_itself.real_time]
        assert speed == alone[in_time[0] if in_time else "faster"]
        chosen.append(speed.solver)
    assert chosen == ["rk4", "fast", "faster"]


def test_windows_count_what_they_solve_and_hold() -> None:
    model = find_model("3b")
    assert (model.dit.past_layers, model.dit.past_width) == ((0, 20), 1024)
    before = replace(model, dit=DitGeometry())
    new, old = (row(planned(shape, "rtx-4090"), "fp16") for shape in (model, before))
    assert new.memory is not None
    assert old.memory is not None
    # 2 layers, keys and values, 2 rows, a block of 24 frames, 1024 wide, 36 evaluations
    held, less = 36 * 2 * 2 * 2 * 24 * 1024 * 4, 2 * 2 * 24 * (3 * 2048 + 8 * 1024) * 4
    assert new.memory.activations == old.memory.activations + held - less
    assert new.speed is not None
    assert old.speed is not None
    assert 0.6 < (new.speed.speech or 0) / (old.speed.speech or 1) < 1
    assert new.speed.first_audio == old.speed.first_audio


# --- memory and speed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["static", "concat"])
def test_caches_are_counted_as_the_runtime_allocates_them(form: str, tiny_bundle: Path, lowered_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle if form == "static" else lowered_bundle)
    kinds = {"static": StaticTrtCache, "concat": GrowingTrtCache}
    graphs = [bundle.manifest.graphs[name] for name in ("thinker", "talker")]
    allocated = sum(kinds[form](FakeDriver(), 0, graph, 512).nbytes for graph in graphs)
    memory = row(planned(shape_of_bundle(bundle), "rtx-4090", 512), "fp32").memory
    assert memory is not None
    assert memory.caches == allocated
    long, short = (memory_needed(bundle, ["thinker", "talker"], Limits(max_context=most)) for most in (512, 256))
    assert long - short == allocated // 2


def test_memory_adds_up_and_grows_with_the_context() -> None:
    short, long = (row(planned("3b", "rtx-4090", context), "fp16").memory for context in (1024, 8192))
    assert short is not None
    assert long is not None
    assert long.caches == 8 * short.caches
    # keys and values of 36 layers with 2 heads of 128, and of 24 with 2 of 64, in FP16
    assert short.caches == 2 * 2 * 1024 * (36 * 2 * 128 + 24 * 2 * 64)
    assert short.total == sum(short.weights.values()) + short.caches + short.activations + short.runtime
    on_board = row(planned("3b", "jetson-orin-nano-8gb", 1024), "fp16").memory
    assert on_board is not None
    assert on_board.caches == 2 * short.caches  # TensorRT 10.3 takes a cache that grows alone: read here, written there
    assert short.mapped == 2 * (151936 * 2048 + 8448 * 2048)


def test_what_fits_and_what_can_be_built() -> None:
    nano = planned("3b", "jetson-orin-nano-8gb")
    assert not row(nano, "fp16").fits
    assert row(nano, "w8").fits
    assert not row(nano, "w8").works
    assert not row(nano, "w8").builds, "twice the thinker does not fit, and the board builds for itself"
    assert row(nano, "int4").works
    card = planned("3b", "rtx-2080")
    assert row(card, "w8").works, "engines for a card are built elsewhere"
    assert "has no bf16" in row(card, "bf16").problem
    assert planned("7b", "jetson-orin-nano-8gb").best == ""


def test_dit_and_vocoder_are_fp32_unless_asked_otherwise() -> None:
    found = {}
    for token2wav in ("fp32", "fp16"):
        plan = make_plan(find_model("3b"), machine("jetson-agx-orin-64gb"), token2wav=token2wav)
        found[token2wav] = row(plan, "fp16")
        assert plan.recipes[0].memory == make_plan(find_model("3b"), machine("jetson-agx-orin-64gb")).recipes[0].memory
    wide, narrow = found["fp32"].memory, found["fp16"].memory
    assert wide is not None
    assert narrow is not None
    for name in ("dit", "bigvgan"):
        assert wide.weights[name] == pytest.approx(2 * narrow.weights[name], rel=0.05)
    assert wide.weights["thinker"] == narrow.weights["thinker"]
    assert found["fp16"].recipe.command.endswith("--precision fp16 --token2wav fp16")
    assert found["fp32"].recipe.command.endswith("--precision fp16")
    with pytest.raises(UsageError, match="--token2wav bf16: expected fp32 or fp16"):
        make_plan(find_model("3b"), machine("jetson-agx-orin-64gb"), token2wav="bf16")


def test_the_best_recipe_loses_least_of_those_that_speak() -> None:
    assert planned("3b", "rtx-4090").best == "fp16"
    assert planned("3b", "jetson-orin-nano-8gb").best == "int4"
    seven = planned("7b", "rtx-3090")
    assert row(seven, seven.best).speed is not None


def test_fewer_bytes_are_read_sooner() -> None:
    plan = planned("3b", "jetson-agx-orin-64gb")
    rates = {name: speed.decode for name in ("fp32", "fp16", "w8", "int4") if (speed := row(plan, name).speed)}
    assert rates["fp32"] < rates["fp16"] < rates["w8"] < rates["int4"]
    slower = row(planned("3b", "jetson-agx-orin-64gb", 32768), "fp16").speed
    assert slower is not None
    assert slower.decode < rates["fp16"]
    assert (slower.codes or 0) > 50


def test_published_rates_are_met() -> None:
    """GPUs within 15 %: nine figures by others, of which three were fitted to."""
    rows = [found for found in plan_bench.published() if not found["device"].startswith("Snapdragon")]
    assert len(rows) == 9
    for found in rows:
        assert abs(found["deviation"]) < 0.15, found


def measured() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Of every bundle of ``small`` on a CPU: recipe, what was measured, and what the rates beside it predict."""
    results = json.loads((RESULTS / "plan.json").read_text())
    assert set(results["bundles"]) == {"fp32", "w8", "int4"}
    model = shape_of_config(geometry_config(SIZES["small"]), "small")
    for recipe, found in results["bundles"].items():
        says = plan_bench.predicted(model, recipe, found)
        assert len(says["decode"]) == 4
        yield recipe, found, says


def test_measured_memory_is_met() -> None:
    for recipe, found, says in measured():
        assert says["memory"] == pytest.approx(found["peak"], rel=plan_bench.MEMORY_LIMIT), recipe


def test_measured_decode_rates_are_met() -> None:
    for recipe, _, says in measured():
        for case, (*_, deviation) in says["decode"].items():
            assert abs(deviation) < plan_bench.DECODE_LIMIT, (recipe, case)


def test_this_machine_is_measured() -> None:
    rates = measure_rates(1)
    assert 1e8 < rates.bandwidth < 1e13
    assert 1e8 < rates.products < 1e15


# --- the command ---------------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments])


def test_json_of_one_target() -> None:
    result = run("3b", "--target", "jetson-orin-nx-16gb", "--json")
    assert result.exit_code == 0
    (plan,) = json.loads(result.stdout)
    found = {recipe["recipe"]: recipe for recipe in plan["recipes"]}
    assert set(found) == set(RECIPES)
    assert found["fp8"]["problem"]
    assert "memory" not in found["fp8"]
    assert found["int4"]["memory"]["weights"]["thinker"] < found["fp16"]["memory"]["weights"]["thinker"]
    assert plan["best"] in found


def test_tables() -> None:
    one = run("7b", "--target", "h100", "--context", "1024")
    assert one.exit_code == 0
    assert "Best: fp16, which speaks in real time" in one.stdout
    everything = run("7b")
    assert everything.exit_code == 0
    assert "jetson-orin-nano-8gb" in everything.stdout
    nothing = run("7b", "--target", "jetson-orin-nano-8gb")
    assert "Nothing fits" in nothing.stdout


def test_bandwidth_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omniport.export.planning.machines.measure_rates", lambda: RATES)
    slow, fast = (
        json.loads(run("3b", "--target", "cpu", "--bandwidth", rate, "--json").stdout)[0] for rate in ("5", "50")
    )
    rates = [plan["recipes"][0]["decode_tokens_per_second"] for plan in (slow, fast)]
    assert rates[1] > 5 * rates[0]


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_sweep(tmp_path: Path, kind: str) -> None:
    picture = tmp_path / f"sweep.{kind}"
    assert run("3b", "--target", "l4", "--sweep", str(picture)).exit_code == 0
    assert picture.read_bytes()[:5] == {"png": b"\x89PNG\r", "svg": b"<?xml"}[kind]


def test_no_torch_is_needed() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'onnx')))\n"
        "from omniport.cli.main import run; run(['plan', '3b', '--target', 'l4', '--json'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["target"] == "l4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["3b", "--target", "jetson-xavier"], r"no target named 'jetson-xavier'; known: .*rtx-4090.*this, cpu, all"),
        (["3b", "--context", "-5"], r"--context -5: 1 to 32768 was expected"),
        (["3b", "--context", "40000"], r"--context 40000: 1 to 32768 was expected"),
        (["5b"], r"5b is no folder: give a bundle, a checkpoint's folder, or one of 3b, 7b"),
        (["3b", "--sweep", "map.pdf"], r"--sweep map.pdf: a file that ends in .png or .svg"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    from omniport.cli.main import run as main

    with pytest.raises(SystemExit) as stopped:
        main(["plan", *arguments])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_folders_that_are_no_model(tmp_path: Path, tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match=r"holds neither bundle.json nor config.json"):
        find_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_omni", "thinker_config": {"text_config": {}}}')
    with pytest.raises(CheckpointError, match="lacks 'hidden_size'"):
        find_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="llama"):
        find_model(str(tmp_path))
    context = Bundle.open(tiny_bundle).manifest.kv.max_context + 1
    with pytest.raises(UsageError, match=f"--context {context}"):
        planned(str(tiny_bundle), "l4", context)
