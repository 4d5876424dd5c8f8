"""Deploying: what is chosen and why, one graph at a time, going on after a crash, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from omniport.calib import deployer
from omniport.calib.calibration_file import Calibration
from omniport.calib.deployer import deploy, deploy_plan
from omniport.calib.deployment import deploy_graphs
from omniport.calib.deployment.deploy_page import render
from omniport.calib.deployment.deploy_plan import Asked, plan_deployment
from omniport.calib.deployment.deploy_record import Deployment, Validated, find_record
from omniport.calib.deployment.deploy_work import deploy_work, disk_bytes
from omniport.calib.deployment.whole_progress import STEPS, WholeProgress
from omniport.calib.quantizer import quantize
from omniport.export.planning.shapes import find_model
from omniport.runtime.backends.tensorrt import packages
from omniport.runtime.bundle.reader import Bundle, read_manifest
from omniport.runtime.errors import ExportError, UsageError
from support.calibrations import calibrate_bundle
from support.command_line import Omniport, refused

CONTEXT = 4096
NANO, AGX, RTX = "jetson-orin-nano-8gb", "jetson-agx-orin-64gb", "rtx-4090"


class Stopped(Exception):
    """What a test interrupts a deployment with."""


@pytest.fixture(autouse=True)
def no_engines(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No builder is installed, but where a test is about engines: they take half a minute."""
    if "engines" not in request.node.name:
        monkeypatch.setattr(packages, "installed", list)


@pytest.fixture(scope="module")
def deployed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny`` deployed to this CPU in FP32. Read only."""
    out = tmp_path_factory.mktemp("deployed") / "bundle"
    report = deploy(tiny_checkpoint, out, "cpu", recipe="fp32", max_context=CONTEXT, validation="none")
    assert report.did == ("graphs", "bundle", "reply")
    return out


def files_of(root: Path) -> dict[str, str]:
    """sha256 by name of the files that a bundle lists."""
    return {name: record.sha256 for name, record in read_manifest(root).files.items()}


def left_beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if path.name != out.name)


# what is chosen


@pytest.mark.parametrize(
    ("target", "ops", "kv", "builder", "here"),
    [
        (NANO, "decomposed", "concat", "tensorrt", False),
        (AGX, "decomposed", "concat", "tensorrt", False),
        ("jetson-agx-thor", "decomposed", "concat", "tensorrt", False),
        (RTX, "native", "static", "tensorrt-rtx", True),
        ("h100", "native", "static", "tensorrt", False),
    ],
)
def test_a_target_gets_graphs_that_its_tensorrt_takes(
    tiny_checkpoint: Path, target: str, ops: str, kv: str, builder: str, here: bool
) -> None:
    plan = deploy_plan(tiny_checkpoint, target)
    assert (plan.ops, plan.kv, plan.builder, plan.built_here) == (ops, kv, builder, here)
    assert plan.recipe == "fp16"
    assert plan.expected.memory_bytes <= plan.expected.usable_bytes
    if ops == "decomposed":
        assert "JetPack" in plan.reasons[0]
        assert "int8" not in plan.refused


@pytest.mark.parametrize(("jetpack", "ops"), [("6.2", "decomposed"), ("7.2", "native")])
def test_every_jetpack_takes_quantized_graphs(jetpack: str, ops: str) -> None:
    plan = plan_deployment(find_model("3b"), Asked(NANO, jetpack=jetpack))
    assert (plan.ops, plan.quantized, plan.precision, plan.token2wav) == (ops, True, "fp16", "fp16")
    assert plan.expected.memory_bytes <= plan.expected.usable_bytes
    # one graph that is not quantized lies beside the rest, and not all of them
    whole = plan_deployment(find_model("3b"), Asked(AGX, recipe="fp16")).expected.result_bytes
    assert plan.expected.peak_disk_bytes < plan.expected.result_bytes + 0.6 * whole


@pytest.mark.parametrize(
    ("recipe", "calibrated"),
    [
        ("fp16", ()),
        ("int4", ("thinker", "talker")),
        ("w8", ("audio_encoder", "vision_encoder", "thinker", "talker", "dit")),
        ("int8", ("audio_encoder", "vision_encoder", "thinker", "talker", "dit", "bigvgan")),
    ],
)
def test_only_what_a_recipe_rounds_is_calibrated(recipe: str, calibrated: tuple[str, ...]) -> None:
    plan = plan_deployment(find_model("3b"), Asked(AGX, recipe=recipe))
    assert sorted(plan.calibrated) == sorted(calibrated)


def test_what_does_not_fit_says_why_and_what_would_help() -> None:
    with pytest.raises(UsageError, match=r"smallest is edge-8gb.*larger board"):
        plan_deployment(find_model("7b"), Asked(NANO))


def test_goals_differ() -> None:
    model = find_model("7b")
    plans = {goal: plan_deployment(model, Asked(RTX, goal=goal)) for goal in ("quality", "speed", "memory")}
    works = {goal: plan.expected.work_per_second_of_speech or 0 for goal, plan in plans.items()}
    assert works["speed"] < works["quality"]
    assert plans["memory"].expected.memory_bytes < plans["quality"].expected.memory_bytes
    assert not plans["quality"].quantized


def test_a_shorter_context_is_taken_where_nothing_else_fits() -> None:
    plan = plan_deployment(find_model("3b"), Asked("jetson-orin-nx-16gb", recipe="fp16"))
    longer = plan_deployment(find_model("3b"), Asked(AGX, recipe="fp16"))
    assert plan.context <= longer.context == 8192


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Asked("rtx-4080"), "rtx-4090"),
        (Asked("all"), "one device"),
        (Asked(RTX, goal="price"), "memory"),
        (Asked(RTX, recipe="int9"), "edge-8gb"),
        (Asked(AGX, recipe="fp8"), "no fp8"),
        (Asked(RTX, jetpack="6.2"), "no Jetson"),
        (Asked(AGX, jetpack="5.1"), "6.2, 7.2"),
        (Asked(RTX, max_context=1 << 20), "32768"),
        (Asked("l4", recipe="fp32"), "smallest is fp32"),
    ],
)
def test_what_cannot_be_is_refused(asked: Asked, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan_deployment(find_model("7b"), asked)


# what is made


def test_a_bundle_is_what_export_makes(deployed: Path, tiny_bundle: Path) -> None:
    assert files_of(deployed) == files_of(tiny_bundle)
    assert (deployed / "bundle.json").read_bytes() == (tiny_bundle / "bundle.json").read_bytes()
    Bundle.open(deployed, verify=True)
    assert left_beside(deployed) == []


def test_a_cpu_is_measured(deployed: Path) -> None:
    record = find_record(deployed)
    assert record is not None
    assert record.reply is not None
    assert record.reply.backend == "ort-cpu"
    assert record.reply.first_audio_seconds is not None
    assert record.reply.first_audio_seconds > record.reply.first_token_seconds > 0
    assert record.written.keys() == record.plan.expected.weights.keys()
    # graphs of tiny are more than a trifle beside their weights: the disk that was planned is no less than was taken
    assert 0 < record.peak_disk_bytes < record.plan.expected.peak_disk_bytes


def test_a_finished_one_is_left_alone(deployed: Path, tiny_checkpoint: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in deployed.rglob("*")}
    report = deploy(tiny_checkpoint, deployed, "cpu", recipe="fp32", max_context=CONTEXT, validation="none")
    assert report.did == ()
    assert {path: path.stat().st_mtime_ns for path in deployed.rglob("*")} == before


@pytest.fixture
def calibrated(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Calibration:
    """A calibration that stands in for minutes of work."""
    made = calibrate_bundle(tiny_bundle, ["text"], tokens=4, codes=12)

    def calibrate(_: object, __: object, out: Path, graphs: Sequence[str], **___: object) -> None:
        assert "bigvgan" not in graphs, "w8 rounds nothing of it"
        out.write_bytes(made.encode())

    monkeypatch.setattr("omniport.calib.calibrator.calibrate", calibrate)
    return made


def test_quantized_graph_by_graph_is_what_quantize_makes(
    tiny_checkpoint: Path, tiny_bundle: Path, calibrated: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, plain = deploy_graphs.rewrite_graph, []

    def rewrite(*arguments: Any) -> Any:
        found = real(*arguments)
        plain.append([path.name for path in tmp_path.rglob("plain/graphs/*.onnx")])
        return found

    monkeypatch.setattr(deploy_graphs, "rewrite_graph", rewrite)
    out = tmp_path / "deployed"
    report = deploy(tiny_checkpoint, out, "cpu", recipe="w8", max_context=CONTEXT, validation="none")
    assert report.did == ("calibrate", "graphs", "bundle", "reply")
    quantize(tiny_bundle, tmp_path / "quantized", "w8", calibration=calibrated)
    assert files_of(out) == files_of(tmp_path / "quantized")
    assert read_manifest(out) == read_manifest(tmp_path / "quantized")
    assert [len(names) for names in plain] == [1] * 5  # all but the vocoder, one at a time
    assert left_beside(out) == ["quantized"]


@pytest.mark.slow
@pytest.mark.parametrize("target", [NANO, AGX])
def test_a_jetson_board_gets_a_bundle_to_copy(
    omniport: Omniport, tiny_checkpoint: Path, tmp_path: Path, target: str
) -> None:
    out = tmp_path / "bundle"
    code, text, err = omniport(
        "deploy", tiny_checkpoint, out, "--target", target, "--max-context", CONTEXT, "--validate", "none", "--json"
    )
    assert code == 0, err
    found = json.loads(text)
    assert found["next"] == "omniport start bundle"
    assert (found["engines"], found["reply"], found["validated"]) == ([], None, None)
    manifest = read_manifest(out)
    assert (manifest.kv.form, manifest.precision) == ("concat", "fp16")
    assert {graph.opset for graph in manifest.graphs.values()} == {18}
    page = (out / "deploy.html").read_text()
    assert "Nothing was run on the device" in page
    assert "omniport start builds them on the device" in page
    assert "TensorRT 10.3 of JetPack 6.2" in page


@pytest.mark.slow
@pytest.mark.skipif("tensorrt-rtx" not in packages.installed(), reason="tensorrt-rtx is not installed")
def test_an_rtx_card_gets_its_engines(omniport: Omniport, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    arguments = ("deploy", tiny_checkpoint, out, "--target", RTX, "--max-context", 1024, "--validate", "none", "--json")
    code, text, err = omniport(*arguments)
    assert code == 0, err
    found = json.loads(text)
    assert [row["graph"] for row in found["engines"]] == list(read_manifest(out).graphs)
    assert (found["did"], found["reply"]) == (["graphs", "bundle", "engines"], None)
    assert json.loads(omniport(*arguments)[1])["did"] == []
    refused(omniport("start", out, "--check-only"), "GeForce RTX 4090", "another")


@pytest.mark.slow
def test_a_validation_is_part_of_it_and_may_come_later(
    omniport: Omniport, tiny_checkpoint: Path, deployed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    shutil.copytree(deployed, out)
    code, text, err = omniport(
        "deploy", tiny_checkpoint, out, "--target", "cpu", "--recipe", "fp32", "--max-context", CONTEXT, "--json"
    )
    assert code == 0, err
    found = json.loads(text)
    assert found["did"] == ["validate"]
    assert found["validated"]["ok"]
    assert "holds" in (out / "deploy.html").read_text()


def test_a_validation_that_fails_exits_with_1(
    omniport: Omniport, tiny_checkpoint: Path, deployed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from omniport.export.validation.types import Check, ValidationReport
    from omniport.export.validation.validate import Validation

    def validate(*_: object, **__: object) -> Validation:
        check = Check.failed("thinker", "logits <b>", "far off")
        report = ValidationReport(
            ok=False, bundle="", checkpoint="", fingerprint="", backend="", precision="", emulated=[], suite="quick",
            checks=[check], environment={}, hashes={}, seconds=0.0, peak_memory_bytes=0,
        )  # fmt: skip
        return Validation(report, {})

    monkeypatch.setattr("omniport.export.validation.validate.validate", validate)
    out = tmp_path / "bundle"
    shutil.copytree(deployed, out)
    arguments = ("deploy", tiny_checkpoint, out, "--target", "cpu", "--recipe", "fp32", "--max-context", CONTEXT)
    code, _, err = omniport(*arguments)
    assert code == 1
    assert "thinker: logits" in err
    assert "logits &lt;b&gt;" in (out / "deploy.html").read_text()
    assert omniport(*arguments)[0] == 1  # it stays a failure, and is not computed again


# crashes


def interrupt(at: str) -> Callable[[str, int, int], None]:
    def progress(stage: str, _: int, __: int) -> None:
        if stage.startswith(at):
            raise Stopped

    return progress


@pytest.mark.parametrize(
    ("at", "left"),
    [
        ("calibrate", ("calibrate", "graphs", "bundle", "validate", "reply")),
        ("graphs: quantizing dit", ("graphs", "bundle", "validate", "reply")),
        ("bundle: checksums", ("bundle", "validate", "reply")),
        ("validate", ("validate", "reply")),
        ("reply", ("reply",)),
    ],
)
def test_after_a_crash_it_goes_on(
    tiny_checkpoint: Path,
    calibrated: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: str,
    left: tuple[str, ...],
) -> None:
    found = Validated(suite="quick", ok=True, checks=1, failed=(), not_run=0)
    monkeypatch.setattr(deployer._Run, "_validate", lambda _, __, record, ___: replace(record, validated=found))
    monkeypatch.setattr(deployer._Run, "_reply", lambda _, __, record, ___: record)
    out, options = tmp_path / "bundle", {"recipe": "w8", "max_context": CONTEXT}
    with pytest.raises(Stopped):
        deploy(tiny_checkpoint, out, "cpu", progress=interrupt(at), **options)
    assert out.exists() == (at in ("validate", "reply"))
    report = deploy(tiny_checkpoint, out, "cpu", **options)
    assert report.did == left
    Bundle.open(out, verify=True)
    assert left_beside(out) == []


KILLED = """
import os, signal, sys
from omniport.calib.deployment import deploy_graphs
from omniport.calib.deployer import deploy
real, made = deploy_graphs.make_graph, []
def make(*arguments):
    found = real(*arguments)
    made.append(found.spec.name)
    if len(made) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return found
deploy_graphs.make_graph = make
deploy(sys.argv[1], sys.argv[2], "cpu", recipe="fp32", max_context=4096, validation="none")
"""


@pytest.mark.slow
def test_a_killed_one_keeps_its_finished_graphs(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bundle"
    done = subprocess.run([sys.executable, "-c", KILLED, tiny_checkpoint, out], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert left_beside(out) == [".bundle.deploy"]
    made: list[str] = []
    real = deploy_graphs.make_graph
    monkeypatch.setattr(
        deploy_graphs, "make_graph", lambda plan, graph, *rest: made.append(graph.key) or real(plan, graph, *rest)
    )
    report = deploy(tiny_checkpoint, out, "cpu", recipe="fp32", max_context=CONTEXT, validation="none")
    assert report.did == ("graphs", "bundle", "reply")
    assert len(made) == len(read_manifest(tiny_bundle).graphs) - 2  # the third was not finished
    assert files_of(out) == files_of(tiny_bundle)
    assert left_beside(out) == []


def test_a_damaged_graph_is_made_again_and_other_options_begin_anew(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, made = tmp_path / "bundle", list[str]()
    with pytest.raises(Stopped):
        deploy(tiny_checkpoint, out, "cpu", recipe="fp32", max_context=CONTEXT, progress=interrupt("bundle: c"))
    data = next((tmp_path / ".bundle.deploy" / "graphs" / "thinker").rglob("*.data"))
    data.write_bytes(data.read_bytes()[:-1] + b"\xff")
    real = deploy_graphs.make_graph

    def make(plan: Any, graph: Any, *rest: Any) -> Any:
        made.append(graph.definition.name)
        return real(plan, graph, *rest)

    monkeypatch.setattr(deploy_graphs, "make_graph", make)
    with pytest.raises(Stopped):
        deploy(tiny_checkpoint, out, "cpu", recipe="fp32", max_context=CONTEXT, progress=interrupt("bundle: c"))
    assert made == ["thinker"]
    with pytest.raises(Stopped):
        deploy(tiny_checkpoint, out, "cpu", recipe="fp32", max_context=2048, progress=interrupt("graphs: writing"))
    assert not (tmp_path / ".bundle.deploy" / "graphs" / "thinker").exists()


# what is refused


def test_a_bundle_is_no_model(omniport: Omniport, tiny_bundle: Path, tmp_path: Path) -> None:
    refused(omniport("deploy", tiny_bundle, tmp_path / "out", "--target", "cpu"), "is a bundle", "omniport quantize")
    refused(omniport("deploy", "3b", tmp_path / "out", "--target", "cpu"), "names a size", "Qwen/Qwen2.5-Omni-3B")
    refused(omniport("deploy", tmp_path, tmp_path / "out", "--target", "cpu"), "error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--target", "jetson-nano"), "jetson-orin-nano-8gb"),
        (("--target", RTX, "--data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--target", RTX, "--goal", "price"), "quality"),
        ((), "--target"),
    ],
)
def test_bad_options_leave_nothing(
    omniport: Omniport, tiny_checkpoint: Path, tmp_path: Path, options: tuple[str, ...], word: str
) -> None:
    code, out, err = omniport("deploy", tiny_checkpoint, tmp_path / "a" / "out", *options)
    assert (code, out) == (2, "")
    assert word in err
    assert list(tmp_path.iterdir()) == []


def test_room_on_the_disk_is_looked_for_first(
    omniport: Omniport, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**6))  # type: ignore[attr-defined]
    refused(omniport("deploy", tiny_checkpoint, tmp_path / "out", "--target", RTX), "1 MB free", "deployment needs")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_bundle_is_not_replaced(omniport: Omniport, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    refused(omniport("deploy", tiny_checkpoint, tmp_path, "--target", RTX), "holds no bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_two_at_once_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with deploy_work(out), pytest.raises(UsageError, match="another omniport deploy"):
        deploy(tiny_checkpoint, out, RTX)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot write"):
        deploy(tiny_checkpoint, tmp_path / "file" / "out", RTX)


# on the device


def test_start_checks_beside_the_plan(omniport: Omniport, deployed: Path) -> None:
    code, text, err = omniport("start", deployed, "--check-only", "--json")
    assert code == 0, err
    found = json.loads(text)
    assert (found["built"], found["reply"]["backend"]) == ([], "ort-cpu")
    assert not any(measured == "not run" for _, _, measured in found["compared"])


def test_start_on_another_machine_is_refused(
    omniport: Omniport, deployed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "board"
    shutil.copytree(deployed, out)
    record = json.loads((out / "deploy.json").read_text())
    record["plan"] |= {"target": AGX, "title": "Jetson AGX Orin 64GB", "builder": "tensorrt"}
    (out / "deploy.json").write_text(json.dumps(record))
    monkeypatch.setattr("omniport.runtime.system.host.gpu_capability", lambda: None)
    refused(omniport("start", out), "Jetson AGX Orin 64GB", "8.7", "no GPU")
    monkeypatch.setattr("omniport.runtime.system.host.gpu_capability", lambda: "8.9")
    refused(omniport("start", out), "8.7", "8.9")


def test_start_wants_a_deployed_bundle(omniport: Omniport, tiny_bundle: Path, tmp_path: Path) -> None:
    refused(omniport("start", tiny_bundle), "deploy.json", "omniport talk")
    refused(omniport("start", tmp_path), "bundle.json")


# the command


def test_a_dry_run_makes_nothing(omniport: Omniport, tiny_checkpoint: Path, tmp_path: Path) -> None:
    code, text, _ = omniport("deploy", tiny_checkpoint, tmp_path / "out", "--target", NANO, "--dry-run")
    assert code == 0
    assert "fp16" in text
    assert "predicted, not run" in text
    code, text, _ = omniport("deploy", "3b", tmp_path / "out", "--target", RTX, "--dry-run", "--json")
    assert json.loads(text)["target"] == RTX
    assert list(tmp_path.iterdir()) == []


def test_a_page_of_a_plan_alone_says_not_run(tiny_checkpoint: Path) -> None:
    page = render(Deployment(key="", plan=deploy_plan(tiny_checkpoint, AGX)))
    assert page.count("not run") >= 10
    assert "<script" not in page


def test_the_bar_never_goes_back() -> None:
    seen: list[tuple[str, int, int]] = []
    whole = WholeProgress(lambda *told: seen.append(told), {"one": 3.0, "two": 1.0}, ["a", "b"])
    first, second = whole.stage("one", by_part=True), whole.stage("two", by_part=False)
    for part in ("a", "b"):
        for done in range(5):
            first(f"at {part}", done, 4)
    for done in (0, 5, 0, 10):
        second("x", done, 10)
    shares = [done for _, done, _ in seen]
    assert shares == sorted(shares)
    assert (shares[4], shares[9], shares[-1]) == (375, 750, STEPS)


def test_hard_links_count_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    once = disk_bytes(tmp_path)
    os.link(tmp_path / "a", tmp_path / "b")
    assert disk_bytes(tmp_path, tmp_path / "nowhere") == once >= 100_000
