"""Bundles to engines: the real builder, the files it leaves, what a rerun does, what can be proven elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
from omniport.cli.main import app
from omniport.export.devices.catalog import TARGETS
from omniport.export.devices.detect import find_target, gpu_target
from omniport.export.tensorrt.build import build_bundle, builder_version, choose_builder
from omniport.export.tensorrt.build_check import build_memory, check_bundle, memory_needed
from omniport.export.tensorrt.profiles import Limits
from omniport.runtime.bundle.engines import ENGINES_FILE, find_engine, list_engines, verify_engine
from omniport.runtime.bundle.graph_spec import DimRange
from omniport.runtime.bundle.parts import PARTS
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import BackendError, BuildError, BundleError, ExportError, UsageError
from omniport.runtime.system.files import path_lock
from omniport.runtime.system.host import Gpu
from support.bundles import edit
from support.onnx_graphs import (
    cache_model,
    make_model,
    matmul,
    plain_model,
    put_graphs,
    spec,
    tensor,
    weight,
)
from typer.testing import CliRunner

from benchmarks.build_matrix import fp8_model

pytest.importorskip("tensorrt_rtx")

CARD = TARGETS["rtx-4090"]
FOLDER = "engines/tensorrt-rtx-rtx-4090-fp32"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Two graphs of one matrix product each."""
    return put_graphs(tmp_path / "bundle", plain_model("dit"), plain_model("bigvgan"))


def build(root: Path, **options: Any) -> set[str]:
    """Graphs that were built."""
    return {row.graph for row in build_bundle(Bundle.open(root), CARD, **options).graphs if row.built}


def files(root: Path) -> set[str]:
    """Everything under ``engines``, folders included."""
    return {path.relative_to(root).as_posix() for path in (root / "engines").rglob("*")}


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from omniport.cli.main import run; run()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# the six graphs of tiny


@pytest.fixture(scope="module")
def built_tiny(tiny_half_bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny`` in FP16 with an engine of every graph for SM89."""
    root = tmp_path_factory.mktemp("built") / "bundle"
    shutil.copytree(tiny_half_bundles["fp16"], root)
    seen: list[tuple[str, int, int]] = []
    report = build_bundle(Bundle.open(root), CARD, precision="fp16", progress=lambda *step: seen.append(step))
    assert [row.graph for row in report.graphs if row.built] == list(PARTS)
    for name in PARTS:
        shares = [done / total for stage, done, total in seen if stage == f"building {name}"]
        assert shares == sorted(shares)
        assert shares[-1] > 0.5
    return root


@pytest.mark.slow
def test_all_graphs_of_tiny_build(built_tiny: Path) -> None:
    bundle = Bundle.open(built_tiny, verify=True)
    decoders = {"thinker": bundle.manifest.thinker, "talker": bundle.manifest.talker}
    version = builder_version("tensorrt-rtx")
    for name, graph in bundle.manifest.graphs.items():
        engine = find_engine(bundle, name, builder="tensorrt-rtx", version=version, capability="8.9")
        verify_engine(engine)
        record = engine.record
        assert record.target == "rtx-4090"
        assert record.dtype == "float16"
        assert record.weights_bytes > 100_000
        assert record.build_seconds > 0
        dynamic = {t.name for t in graph.inputs if any(isinstance(dim, str) for dim in t.shape)}
        assert set(record.profiles[0].inputs) == dynamic
        if (decoder := decoders.get(name)) is not None:
            assert record.layers["KV_CACHE_UPDATE"] == 2 * decoder.num_layers
            assert record.layers["ROTARY_EMBEDDING"] == 2 * decoder.num_layers
            assert record.layers["ATTENTION_INPUT"] == record.layers["ATTENTION_OUTPUT"] == decoder.num_layers
            assert record.fixed_dims == {"capacity": 4096}
            assert record.profiles[0].dims["new_tokens"] == DimRange(1, 1, 512)
    assert len(list_engines(bundle).usable) == 6
    with pytest.raises(BackendError, match=r"omniport build .* --target this --builder tensorrt-rtx --graphs thinker"):
        find_engine(bundle, "thinker", builder="tensorrt-rtx", version=version, capability="8.6")


@pytest.mark.slow
def test_a_second_build_does_nothing_and_imports_no_builder(built_tiny: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (built_tiny / "engines").rglob("*")}
    code = (
        "import sys\nfrom omniport.cli.main import run\ntry:\n    run()\n"
        "finally:\n    print('imported', 'tensorrt_rtx' in sys.modules, 'onnx' in sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "build", str(built_tiny), "--target", "rtx-4090", "--json"]
    spent = os.times().children_user
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert os.times().children_user - spent < 2  # processor seconds: the clock also counts what else the machine does
    assert "imported False" in done.stderr
    assert not any(row["built"] for row in json.loads(done.stdout)["engines"])
    assert {path: path.stat().st_mtime_ns for path in (built_tiny / "engines").rglob("*")} == before


@pytest.mark.slow
@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_builds_leave_nothing(
    tiny_half_bundles: dict[str, Path], tmp_path: Path, name: signal.Signals
) -> None:
    """The vocoder compiles for some 15 s: the signal comes in the middle of it."""
    root = tmp_path / "bundle"
    shutil.copytree(tiny_half_bundles["fp16"], root)
    code = "from omniport.cli.main import run; run()"
    command = [sys.executable, "-c", code, "build", str(root), "--target", "rtx-4090", "--graphs", "bigvgan"]
    # a shell's background job ignores SIGINT and hands that down; a terminal's does not
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, preexec_fn=heed, **pipes) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith("building bigvgan"):
                break
        time.sleep(0.5)
        assert (root / "engines").exists()
        child.send_signal(name)
        _, errors = child.communicate(timeout=60)
    assert child.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[name], errors
    assert "Traceback" not in errors
    assert not (root / "engines").exists()


# what is built again


def test_tf32_is_asked_for_by_the_variable_too(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build(bundle) == {"dit", "bigvgan"}
    monkeypatch.setenv("OMNIPORT_TF32", "1")
    assert build(bundle) == {"dit", "bigvgan"}
    assert all("TF32" in engine.record.flags for engine in list_engines(Bundle.open(bundle)).usable)
    assert build_bundle(Bundle.open(bundle), TARGETS["rtx-4090"], tf32=True).graphs[0].built is False


def test_only_what_changed_is_built_again(bundle: Path) -> None:
    assert build(bundle) == {"dit", "bigvgan"}
    assert build(bundle) == set()
    before = {path: path.stat().st_mtime_ns for path in (bundle / FOLDER).iterdir()}
    inputs, outputs = (tensor("x", "batch", 8),), (tensor("y", "batch", 8),)
    other = make_model([matmul()], inputs, outputs, [weight(shape=(8, 8), dtype="float32")])
    other.graph.node.append(onnx.helper.make_node("Neg", ["y"], ["z"], name="layers.0/Neg"))
    other.graph.output[0].name = "z"
    put_graphs(bundle, (other, spec("dit", inputs, (tensor("z", "batch", 8),))), plain_model("bigvgan"))
    assert list_engines(Bundle.open(bundle)).unusable.keys() == {f"{FOLDER}/dit.engine"}
    assert build(bundle) == {"dit"}
    assert (bundle / FOLDER / "bigvgan.engine").stat().st_mtime_ns == before[bundle / FOLDER / "bigvgan.engine"]
    assert not list_engines(Bundle.open(bundle)).unusable


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / FOLDER / "dit.engine").unlink(),
        lambda root: (root / FOLDER / "dit.engine").write_bytes(b"short"),
        lambda root: (root / FOLDER / "dit.json").write_bytes(b"{}"),
        lambda root: (root / FOLDER / "dit.json").unlink(),
        lambda root: edit(root, lambda m: m["graphs"]["dit"]["dims"]["batch"].update(max=5)),
    ],
    ids=["no engine", "cut off", "no record", "changed record", "another range"],
)
def test_what_is_damaged_or_asked_differently_is_built_again(bundle: Path, change: Any) -> None:
    build(bundle)
    change(bundle)
    assert build(bundle) == {"dit"}
    assert build(bundle) == set()


def test_options_and_versions_are_part_of_what_an_engine_is_made_from(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build(bundle, graphs=["dit"]) == {"dit"}
    assert build(bundle, graphs=["dit"], force=True) == {"dit"}
    assert build(bundle) == {"bigvgan"}
    monkeypatch.setattr("omniport.export.tensorrt.build.builder_version", lambda builder: "99.0")
    assert build(bundle, graphs=["dit"]) == {"dit"}


def test_engines_for_several_machines_live_side_by_side(bundle: Path) -> None:
    build(bundle)
    report = build_bundle(Bundle.open(bundle), TARGETS["rtx-5090"], graphs=["dit"])
    assert report.graphs[0].record.compute_capability == "12.0"
    assert len(list_engines(Bundle.open(bundle)).usable) == 3
    assert build(bundle) == set()


# failures leave things as they were


def test_engines_before_a_failure_stay_and_the_failed_one_leaves_nothing(tmp_path: Path) -> None:
    root = put_graphs(tmp_path / "bundle", plain_model("dit"), cache_model("Identity"))
    with pytest.raises(BuildError, match="thinker: the cache output"):
        build(root)
    assert files(root) == {ENGINES_FILE, FOLDER, f"{FOLDER}/dit.engine", f"{FOLDER}/dit.json"}
    alone = put_graphs(tmp_path / "alone", cache_model("Identity"))
    with pytest.raises(BuildError):
        build(alone)
    assert not (alone / "engines").exists()


def test_a_failed_rebuild_keeps_the_engine_that_was_there(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(bundle)
    before = {path: path.read_bytes() for path in (bundle / "engines").rglob("*") if path.is_file()}

    def fail(*_: Any) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("omniport.export.tensorrt.engine_builder._compile", fail)
    with pytest.raises(BuildError, match=r"cannot write into .*engines.*No space left.*Free some space"):
        build(bundle, force=True)
    assert {path: path.read_bytes() for path in (bundle / "engines").rglob("*") if path.is_file()} == before


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the size of files")
def test_a_file_system_that_is_full(bundle: Path) -> None:
    """Writing fails in the middle of the engine, inside the builder's own thread."""
    code = (
        "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "from omniport.cli.main import run; run()"
    )
    command = [sys.executable, "-c", code, "build", str(bundle), "--target", "rtx-4090"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (bundle / "engines").exists()


def test_a_disk_with_too_little_room(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 10))  # type: ignore[attr-defined]
    with pytest.raises(ExportError, match="MB free"):
        build(bundle)
    assert not (bundle / "engines").exists()


def test_two_builds_into_one_bundle_take_turns(bundle: Path) -> None:
    (bundle / "engines").mkdir()
    lock = path_lock(bundle / "engines")
    assert lock is not None
    with pytest.raises(BuildError, match="another build is writing"):
        build(bundle)
    os.close(lock)
    assert build(bundle) == {"dit", "bigvgan"}


def test_the_listing_never_names_an_engine_that_is_being_replaced(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(bundle)
    seen: list[tuple[str, set[str]]] = []
    move = os.replace

    def watched(source: Path, target: Path) -> None:
        listed = json.loads((bundle / ENGINES_FILE).read_text())["engines"]
        seen.append((Path(target).name, {Path(name).name for name in listed}))
        move(source, target)

    monkeypatch.setattr("os.replace", watched)
    build(bundle, graphs=["dit"], force=True)
    # out of the listing, the engine, its record, into the listing
    assert seen == [
        ("engines.json", {"bigvgan.engine", "dit.engine"}),
        ("dit.engine", {"bigvgan.engine"}),
        ("dit.json", {"bigvgan.engine"}),
        ("engines.json", {"bigvgan.engine"}),
    ]
    assert len(list_engines(Bundle.open(bundle)).usable) == 2


def test_what_killed_builds_left_is_removed(bundle: Path) -> None:
    (bundle / FOLDER).mkdir(parents=True)
    (bundle / FOLDER / ".bigvgan.engine.partial").write_bytes(b"half")
    (bundle / "engines" / ".engines.json.partial").write_bytes(b"half")
    build(bundle, graphs=["dit"])
    assert files(bundle) == {ENGINES_FILE, FOLDER, f"{FOLDER}/dit.engine", f"{FOLDER}/dit.json"}


def test_nothing_is_written_through_a_link(bundle: Path) -> None:
    outside = bundle.parent / "outside"
    outside.mkdir()
    (bundle / "engines").symlink_to(outside)
    with pytest.raises(BundleError, match="link that leaves the bundle"):
        build(bundle)
    assert not list(outside.iterdir())


def test_a_graph_that_is_not_the_listed_one(bundle: Path) -> None:
    path = bundle / "graphs" / "dit.onnx"
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"graphs/dit\.onnx .* not the file that bundle\.json lists"):
        build(bundle)
    assert not (bundle / "engines").exists()


# who builds


def test_the_bundle_decides_the_precision(bundle: Path) -> None:
    build(bundle, precision="fp32", graphs=["dit"])
    with pytest.raises(UsageError, match=r"is fp32.*omniport export CHECKPOINT OUT --precision fp16"):
        build(bundle, precision="fp16")
    with pytest.raises(UsageError, match=r"omniport quantize .* --recipe int8"):
        build(bundle, precision="int8")
    with pytest.raises(UsageError, match="has no graph thinker; it has dit, bigvgan"):
        build(bundle, graphs=["thinker"])


@pytest.mark.parametrize("name", ["jetson-orin-nano-8gb", "jetson-agx-thor", "h100", "h200"])
def test_device_targets_say_what_to_run_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = find_target(name)
    line = f"omniport build BUNDLE --target {name} --builder tensorrt"
    monkeypatch.setattr("omniport.runtime.system.host.gpu_capability", lambda: None)
    with pytest.raises(
        BackendError, match=rf"built on the device.*this machine has none\. Run there: {line}\. Add --ch"
    ):
        choose_builder(target, "auto")
    with pytest.raises(BackendError, match=f"tensorrt-rtx does not build for {name}.*{line}"):
        choose_builder(target, "tensorrt-rtx")
    monkeypatch.setattr("omniport.runtime.system.host.gpu_capability", lambda: "8.9")
    with pytest.raises(BackendError, match=r"this machine's has 8\.9"):
        choose_builder(target, "tensorrt")
    monkeypatch.setattr("omniport.runtime.system.host.gpu_capability", lambda: target.capability)
    monkeypatch.setattr("omniport.runtime.backends.tensorrt.packages.installed", lambda: ["tensorrt-rtx"])
    with pytest.raises(BackendError, match=r"pip install 'omniport\[trt\]'"):
        choose_builder(target, "auto")
    monkeypatch.setattr("omniport.runtime.backends.tensorrt.packages.installed", lambda: ["tensorrt", "tensorrt-rtx"])
    assert choose_builder(target, "auto") == "tensorrt"


def test_cards_are_built_for_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omniport.runtime.system.host.gpu_capability", lambda: None)
    assert choose_builder(CARD, "auto") == "tensorrt-rtx"
    with pytest.raises(BackendError, match=r"TensorRT needs a GPU of compute capability 8\.9"):
        choose_builder(CARD, "tensorrt")
    monkeypatch.setattr("omniport.runtime.backends.tensorrt.packages.installed", list)
    with pytest.raises(BackendError, match=r"pip install 'omniport\[rtx\]'"):
        choose_builder(CARD, "auto")
    monkeypatch.setattr("omniport.runtime.system.host.gpu_capability", lambda: CARD.capability)
    monkeypatch.setattr("omniport.runtime.backends.tensorrt.packages.installed", lambda: ["tensorrt"])
    assert choose_builder(CARD, "auto") == "tensorrt"


def test_the_machines_own_gpu(bundle: Path) -> None:
    this = gpu_target(Gpu("NVIDIA GeForce RTX 3090", "8.6", int(23.7 * (1 << 30)), False, 0.0))
    report = build_bundle(Bundle.open(bundle), this, graphs=["dit"])
    assert report.graphs[0].path == bundle / "engines/tensorrt-rtx-this-fp32/dit.engine"
    found = find_engine(Bundle.open(bundle), "dit", builder="tensorrt-rtx", version=report.version, capability="8.6")
    assert found.record.target == "this"


# what can be proven without the target


def test_check_proves_and_keeps_nothing(tmp_path: Path) -> None:
    root = put_graphs(tmp_path / "bundle", plain_model("dit"), cache_model())
    report = check_bundle(Bundle.open(root), TARGETS["jetson-orin-nano-8gb"])
    assert report.ok
    found = {row.graph: row for row in report.graphs}
    assert {row.compiled_for for row in report.graphs} == {"8.6"}
    assert all(row.engine_bytes > 0 for row in report.graphs)
    assert "needs JetPack 7.2 (TensorRT 10.16)" in found["thinker"].note
    assert "TensorScatter (10.15)" in found["thinker"].note
    assert report.command == f"omniport build {root} --target jetson-orin-nano-8gb --builder tensorrt"
    assert not (root / "engines").exists()


def test_check_finds_what_a_target_lacks(tmp_path: Path) -> None:
    root = put_graphs(tmp_path / "bundle", fp8_model())
    orin = check_bundle(Bundle.open(root), TARGETS["jetson-agx-orin-64gb"])
    assert not orin.ok
    assert "dit uses fp8, which jetson-agx-orin-64gb (SM87) lacks" in orin.graphs[0].problem
    hopper = check_bundle(Bundle.open(root), TARGETS["h100"])
    assert hopper.ok
    assert hopper.graphs[0].compiled_for == "8.9"
    assert check_bundle(Bundle.open(root), TARGETS["jetson-agx-thor"]).graphs[0].note.startswith("needs JetPack 7.2 ")


def test_check_finds_graphs_that_no_release_of_the_target_parses(tmp_path: Path) -> None:
    root = put_graphs(tmp_path / "bundle", cache_model())
    old = replace(TARGETS["jetson-orin-nano-8gb"], jetpacks=TARGETS["jetson-orin-nano-8gb"].jetpacks[:1])
    report = check_bundle(Bundle.open(root), old)
    assert not report.ok
    assert "TensorRT 10.3 of JetPack 6.2 does not parse TensorScatter (10.15)" in report.graphs[0].problem
    assert "--ops decomposed --kv concat" in report.graphs[0].problem


def test_check_adds_up_the_memory(tmp_path: Path) -> None:
    root = put_graphs(tmp_path / "bundle", cache_model())
    bundle = Bundle.open(root)
    size = (root / "graphs" / "thinker.onnx").stat().st_size
    # keys and values of one layer, one head of 8, 64 tokens, float32
    assert memory_needed(bundle, ["thinker"], Limits()) == size + 2 * 1 * 1 * 8 * 64 * 4
    assert (
        memory_needed(bundle, ["thinker"], Limits(max_context=65)) - memory_needed(bundle, ["thinker"], Limits()) == 64
    )
    kv = msgspec.structs.replace(bundle.manifest.kv, form="concat")
    grows = Bundle(root, msgspec.structs.replace(bundle.manifest, kv=kv), {})
    assert memory_needed(grows, ["thinker"], Limits()) == size + 2 * 2 * 1 * 1 * 8 * 64 * 4  # read here, written there
    tight = replace(CARD, memory_bytes=(1 << 29) + 100)
    report = check_bundle(bundle, tight)
    assert not report.fits
    assert not report.ok
    assert report.graphs[0].problem == ""


def test_check_knows_what_building_takes(tmp_path: Path) -> None:
    bundle = Bundle.open(put_graphs(tmp_path / "bundle", plain_model()))
    size = (bundle.root / "graphs" / "dit.onnx").stat().st_size
    assert build_memory(bundle, ["dit"]) == 2 * size + 950_000_000
    usable = (2 << 30) + 600_000_000
    orin = replace(TARGETS["jetson-orin-nano-8gb"], memory_bytes=usable)
    report = check_bundle(bundle, orin)
    assert report.fits
    assert not report.builds_there
    assert not report.ok
    assert check_bundle(bundle, replace(TARGETS["rtx-4090"], memory_bytes=usable)).ok  # built elsewhere


# the command


def test_command_builds_and_inspect_shows(bundle: Path) -> None:
    runner = CliRunner()
    built = runner.invoke(app, ["build", str(bundle), "--target", "rtx-4090", "--json"])
    assert built.exit_code == 0, built.output
    report = json.loads(built.stdout)
    assert report["builder"] == "tensorrt-rtx"
    assert [row["graph"] for row in report["engines"]] == ["dit", "bigvgan"]
    assert all(row["built"] and row["engine_bytes"] > 0 and row["layers"] for row in report["engines"])
    again = runner.invoke(app, ["build", str(bundle), "--target", "rtx-4090"])
    assert again.stdout.count("unchanged") == 2
    shown = json.loads(runner.invoke(app, ["inspect", str(bundle), "--json"]).stdout)
    assert set(shown["engines"]) == {f"{FOLDER}/dit.engine", f"{FOLDER}/bigvgan.engine"}
    assert shown["engines"][f"{FOLDER}/dit.engine"]["compute_capability"] == "8.9"
    table = runner.invoke(app, ["inspect", str(bundle)])
    assert "rtx-4090, 8.9" in table.stdout
    engine = bundle / FOLDER / "dit.engine"
    engine.write_bytes(bytes(engine.stat().st_size))
    assert runner.invoke(app, ["inspect", str(bundle)]).exit_code == 0
    broken = runner.invoke(app, ["inspect", str(bundle), "--verify"])
    assert isinstance(broken.exception, BundleError)
    assert f"omniport build {bundle} --target rtx-4090 --builder tensorrt-rtx --graphs dit --force" in str(
        broken.exception
    )
    engine.unlink()
    shown = json.loads(runner.invoke(app, ["inspect", str(bundle), "--json"]).stdout)
    assert set(shown["unusable_engines"]) == {f"{FOLDER}/dit.engine"}


def test_command_checks(tmp_path: Path) -> None:
    root = put_graphs(tmp_path / "bundle", fp8_model())
    good = CliRunner().invoke(app, ["build", str(root), "--target", "h200", "--check", "--json"])
    assert good.exit_code == 0, good.output
    assert json.loads(good.stdout)["graphs"][0]["compiled_for"] == "8.9"
    bad = CliRunner().invoke(app, ["build", str(root), "--target", "rtx-3090", "--check"])
    assert bad.exit_code == 1
    assert "lacks" in bad.stdout
    assert "Nothing was run" in bad.stdout


def test_without_onnx_the_command_says_what_to_install(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["build", str(bundle), "--target", "rtx-4090"])
    assert isinstance(result.exception, ExportError)
    assert "pip install 'omniport[rtx]'" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--target", "rtx-9090"), "no target named 'rtx-9090'; known:"),
        (("--target", "rtx-4090", "--graphs", "decoder"), "no graph named decoder"),
        (("--target", "rtx-4090", "--precision", "fp16"), "the bundle decides"),
        (("--target", "jetson-agx-thor"), "Run there: omniport build"),
        (("--target", "rtx-4090", "--precision", "fp4"), "fp4"),
        (("--target", "rtx-4090", "--max-pixels", "783"), "at least 784 was expected"),
        (("--target", "rtx-4090", "--max-codes", "83"), "at least 84 was expected"),
    ],
)
def test_bad_usage_is_exit_code_two(bundle: Path, arguments: tuple[str, ...], says: str) -> None:
    done = run("build", bundle, *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (bundle / "engines").exists()
