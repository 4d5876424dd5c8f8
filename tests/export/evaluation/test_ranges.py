"""Measured ranges: what they hold, and that an export with them does not overflow where one without does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from omniport.cli.main import run
from omniport.export.devices.detect import find_target
from omniport.export.evaluation.half_emulation import EmulatedBackend
from omniport.export.evaluation.measure_ranges import measure_ranges, store_ranges
from omniport.export.evaluation.recording import RecordingBackend
from omniport.export.exporter import ExportReport, export_checkpoint
from omniport.export.tensorrt.build import build_bundle, require_ranges
from omniport.export.validation.checks.graphs import graph_checks
from omniport.export.validation.tolerances import LIMITS
from omniport.export.validation.types import FAIL
from omniport.export.validation.validate import validate
from omniport.runtime import OmniSession, SamplingConfig
from omniport.runtime.backends import open_backend
from omniport.runtime.bundle.activation_ranges import Ranges, encode_ranges, limit, overflowing, read_ranges
from omniport.runtime.bundle.listed_files import file_record
from omniport.runtime.bundle.manifest import encode_manifest
from omniport.runtime.bundle.reader import Bundle, read_manifest
from omniport.runtime.errors import BuildError, BundleError, CheckFailed, ExportError, UsageError
from support.checkpoints import rewritten
from support.comparison import assert_all_pass, context_of

DOWN = "model.layers.1.mlp.down_proj/MatMul:0"
MESSAGES = [{"role": "user", "content": "What can you tell me about the sea?"}]


def louder(tensors: dict[str, torch.Tensor]) -> None:
    """The thinker's residual stream leaves float16 in its second layer, as outliers of trained models threaten to."""
    weight = tensors["thinker.model.layers.1.mlp.down_proj.weight"]
    weight *= 2e4 / weight.abs().max()
    tensors["thinker.model.layers.1.mlp.up_proj.weight"] *= 10


@pytest.fixture(scope="module")
def loud(tiny_outlier_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rewritten(tiny_outlier_checkpoint, tmp_path_factory.mktemp("loud") / "checkpoint", louder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "messages.jsonl"
    path.write_text(json.dumps({"messages": MESSAGES}) + "\n")
    return path


def export(checkpoint: Path, out: Path, **options: Any) -> ExportReport:
    return export_checkpoint(checkpoint, out, graphs=("thinker",), max_context=4096, **options)


@pytest.fixture(scope="module")
def wide(loud: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wide") / "bundle"
    export(loud, out)
    return out


@pytest.fixture(scope="module")
def measured(wide: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("measured") / "ranges.json"
    path.write_bytes(encode_ranges(measure_ranges(wide, data=data, max_new_tokens=4)))
    return path


@pytest.fixture(scope="module")
def narrow(loud: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("narrow") / "bundle"
    export(loud, out, precision="fp16")
    return out


def hidden(bundle: Path) -> NDArray[np.float32]:
    """States of a few tokens with every operator rounded to float16, as a device would."""
    opened = Bundle.open(bundle)
    graph = EmulatedBackend(opened, ("thinker",), threads=1).graph("thinker")
    feeds: dict[str, Any] = {
        "inputs_embeds": opened.embedding("thinker").rows(np.arange(7))[None],
        "position_ids": np.tile(np.arange(7), (3, 1, 1)),
        "kv_positions": np.arange(7),
        "write_index": np.zeros(1, np.int64),
    }
    return graph.run(feeds, graph.new_cache(64))["hidden"]


# --- what overflows stays float32 -----------------------------------------------------------------------------------


def test_an_export_with_ranges_does_not_overflow(
    loud: Path, wide: Path, narrow: Path, measured: Path, tmp_path: Path
) -> None:
    exact = hidden(wide)
    assert float(np.std(exact)) > 0.1
    assert not np.isfinite(hidden(narrow)).all()

    kept = tmp_path / "kept"
    (row,) = export(loud, kept, precision="fp16", ranges=measured).graphs
    assert DOWN.removesuffix(":0") in row.overflowing
    assert "model.layers.1/Add_1" in row.overflowing
    assert "model.layers.0.mlp.down_proj/MatMul" not in row.overflowing
    got = hidden(kept)
    assert float(np.linalg.norm(got - exact) / np.linalg.norm(exact)) < LIMITS["graph.rel_rms", "float16"].value
    assert_all_pass(list(graph_checks(context_of(kept, loud))))

    opened = Bundle.open(kept, verify=True)
    assert opened.manifest.ranges_file == "ranges.json"
    assert overflowing(opened, "thinker") == []
    assert DOWN in opened.manifest.graphs["thinker"].float32_values


def test_validate_tells_them_apart(loud: Path, narrow: Path, measured: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    export(loud, kept, precision="fp16", ranges=measured)
    report, _ = validate(kept, loud, graphs=("thinker",))
    assert report.ok, [(c.stage, c.name, c.message) for c in report.checks if c.status == FAIL]
    report, _ = validate(narrow, loud, graphs=("thinker",))
    assert not report.ok


def test_ranges_put_into_a_bundle_show_what_overflows(narrow: Path, measured: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(narrow, tmp_path / "bundle"))
    assert overflowing(Bundle.open(bundle), "thinker") == []
    store_ranges(bundle, read_ranges(measured))
    opened = Bundle.open(bundle, verify=True)
    found = overflowing(opened, "thinker")
    assert DOWN in [layer.name for layer in found]
    assert found[0].max == max(layer.max for layer in found) > 65504
    assert all(layer.max > limit() for layer in found)
    assert not any("norm" in layer.name for layer in found), "norms are float32 and give small values"
    store_ranges(bundle, read_ranges(measured))
    assert Bundle.open(bundle, verify=True).manifest == opened.manifest


def test_ranges_stay_in_a_bundle_that_is_exported_again(
    loud: Path, narrow: Path, measured: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(narrow, tmp_path / "bundle"))
    store_ranges(bundle, read_ranges(measured))
    (row,) = export(loud, bundle, precision="fp16").graphs
    assert row.skipped  # they change nothing about the graph
    opened = Bundle.open(bundle, verify=True)
    assert opened.manifest.ranges_file == "ranges.json"
    assert (bundle / "ranges.json").read_bytes() == measured.read_bytes()
    with pytest.raises(BuildError, match="values in float16"):
        require_ranges(opened, "thinker")


@pytest.mark.parametrize("why", ["damaged", "other"])
def test_ranges_that_do_not_belong_are_left_out(
    loud: Path, narrow: Path, measured: Path, tmp_path: Path, why: str
) -> None:
    bundle = Path(shutil.copytree(narrow, tmp_path / "bundle"))
    store_ranges(bundle, read_ranges(measured))
    path = changed(read_ranges(measured), bundle / "ranges.json", kv="concat")
    if why == "other":  # whole, and about graphs with other nodes
        manifest = read_manifest(bundle)
        files = {**manifest.files, "ranges.json": file_record(path)}
        (bundle / "bundle.json").write_bytes(encode_manifest(msgspec.structs.replace(manifest, files=files)))
    export(loud, bundle, precision="fp16")
    assert Bundle.open(bundle, verify=True).manifest.ranges_file is None
    assert not (bundle / "ranges.json").exists()


def test_the_margin_counts(narrow: Path, measured: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(narrow, tmp_path / "bundle"))
    ranges, name = read_ranges(measured), "model.layers.0/Add:0"
    quiet = dict.fromkeys(ranges.graphs["thinker"], 1.0)
    for top, over in ((32752.0, []), (32753.0, [name])):
        changed = msgspec.structs.replace(ranges, graphs={"thinker": quiet | {name: top}})
        store_ranges(bundle, changed)
        assert [layer.name for layer in overflowing(Bundle.open(bundle), "thinker")] == over


def test_no_engine_is_built_of_what_would_overflow(narrow: Path, measured: Path, tmp_path: Path) -> None:
    """The command refuses before it loads a builder, and keeps nothing."""
    bundle = Path(shutil.copytree(narrow, tmp_path / "bundle"))
    store_ranges(bundle, read_ranges(measured))
    opened, target = Bundle.open(bundle), find_target("rtx-4090")
    for precision in (None, "fp16"):
        with pytest.raises(BuildError, match=r"thinker holds \d+ values in float16 .*--ranges .*ranges\.json"):
            build_bundle(opened, target, builder="tensorrt-rtx", precision=precision)
    assert not (bundle / "engines").exists()
    quiet = {graph: dict.fromkeys(values, 1.0) for graph, values in read_ranges(measured).graphs.items()}
    store_ranges(bundle, msgspec.structs.replace(read_ranges(measured), graphs=quiet))
    require_ranges(Bundle.open(bundle), "thinker")


def test_a_cache_that_would_overflow_is_refused(loud: Path, measured: Path, tmp_path: Path) -> None:
    ranges = read_ranges(measured)
    values = dict.fromkeys(ranges.graphs["thinker"], 1.0) | {"model.layers.2.self_attn/RotaryEmbedding_1:0": 1e5}
    path = tmp_path / "ranges.json"
    path.write_bytes(encode_ranges(msgspec.structs.replace(ranges, graphs={"thinker": values})))
    with pytest.raises(ExportError, match=r"TensorScatter puts a value into the KV cache.*--precision bf16"):
        export(loud, tmp_path / "out", precision="fp16", ranges=path)
    assert not (tmp_path / "out").exists()


# --- what is measured -----------------------------------------------------------------------------------------------


def test_ranges_are_those_of_the_values(wide: Path, measured: Path) -> None:
    """Against the outputs and inputs of the graph as it ran in the same conversation."""
    found = read_ranges(measured)
    assert found.fingerprint == Bundle.open(wide).manifest.source.fingerprint
    assert (found.ops, found.kv, found.samples) == ("native", "static", ("messages.jsonl:1",))
    opened = Bundle.open(wide)
    backend = RecordingBackend(open_backend("ort-cpu", opened, threads=1))
    with OmniSession(opened, backend) as session:
        list(session.reply(MESSAGES, speak=False, thinker=SamplingConfig(max_new_tokens=4)))
        calls, given = backend.graphs["thinker"].calls, backend.graphs["thinker"].given
    assert len(calls) >= 2
    values = found.graphs["thinker"]
    for key, arrays in (
        ("inputs_embeds", [call["inputs_embeds"] for call in calls]),
        ("lm_head/MatMul:0", [outputs["logits"] for outputs in given]),
        ("model.norm/RMSNormalization:0", [outputs["hidden"] for outputs in given]),
    ):
        assert values[key] == pytest.approx(max(float(np.abs(array).max()) for array in arrays), rel=1e-5)
    assert values[DOWN] > 65504
    assert all(np.isfinite(top) and top >= 0 for top in values.values())


def test_measuring_twice_gives_the_same_bytes(wide: Path, data: Path, measured: Path) -> None:
    assert encode_ranges(measure_ranges(wide, data=data, max_new_tokens=4)) == measured.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tiny_bundle", "lowered_bundle"])
def test_every_graph_is_reached_by_the_built_in_samples(kind: str, request: pytest.FixtureRequest) -> None:
    bundle: Path = request.getfixturevalue(kind)
    seen: list[str] = []
    found = measure_ranges(bundle, max_new_tokens=2, max_codes=14, progress=lambda name, *_: seen.append(name))
    assert set(found.graphs) == set(Bundle.open(bundle).manifest.graphs)
    assert {"text", "audio", "image", "video with sound"} <= set(seen)
    assert all(max(values.values()) > 0.1 for values in found.graphs.values())


def test_overflow_in_float32_is_named(loud: Path, data: Path, tmp_path: Path) -> None:
    def broken(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("up_proj", "down_proj"):
            tensors[f"thinker.model.layers.2.mlp.{name}.weight"] *= 1e25

    export(rewritten(loud, tmp_path / "checkpoint", broken), tmp_path / "bundle")
    with pytest.raises(CheckFailed, match=r"model\.layers\.2.* of thinker is not finite in FP32"):
        measure_ranges(tmp_path / "bundle", data=data, max_new_tokens=1)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_half_precision_is_not_measured(narrow: Path) -> None:
    with pytest.raises(UsageError, match=r"thinker .* is float16, in which what overflows has overflowed"):
        measure_ranges(narrow)


def changed(ranges: Ranges, path: Path, **fields: Any) -> Path:
    path.write_bytes(encode_ranges(msgspec.structs.replace(ranges, **fields)))
    return path


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"fingerprint": "0" * 64}, "measured on a checkpoint with fingerprint 000000000000"),
        ({"ops": "decomposed", "kv": "concat"}, "--ops decomposed --kv concat; this"),
        ({"graphs": {}}, "has no ranges of thinker"),
        ({"graphs": {"thinker": {"inputs_embeds": 1.0}}}, "the ranges say nothing about"),
        ({"format": "other"}, "format 'other'"),
        ({"schema_version": 2}, "version 2"),
    ],
)
def test_other_ranges_are_refused(
    loud: Path, measured: Path, tmp_path: Path, fields: dict[str, Any], match: str
) -> None:
    path = changed(read_ranges(measured), tmp_path / "ranges.json", **fields)
    with pytest.raises((ExportError, BundleError), match=match):
        export(loud, tmp_path / "out", precision="fp16", ranges=path)
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    with pytest.raises(BundleError, match="cannot read"):
        read_ranges(path)
    for text in ("{", '{"format": "omniport-ranges"}', "[]"):
        path.write_text(text)
        with pytest.raises(BundleError, match="is not a ranges file"):
            read_ranges(path)


def test_ranges_of_another_checkpoint_do_not_enter_a_bundle(tiny_bundle: Path, measured: Path) -> None:
    with pytest.raises(UsageError, match="was exported from a checkpoint with fingerprint"):
        store_ranges(tiny_bundle, read_ranges(measured))
    assert not (tiny_bundle / "ranges.json").exists()


# --- the command ----------------------------------------------------------------------------------------------------


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        run([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def test_command(
    loud: Path, wide: Path, data: Path, measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ranges.json"
    assert command("ranges", wide, out, "--data", data, "--max-new-tokens", 4, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert out.read_bytes() == measured.read_bytes()
    assert DOWN in facts["graphs"]["thinker"]["overflowing"]
    assert facts["margin"] == 2
    assert command("ranges", wide, out, "--data", data, "--max-new-tokens", 4, "--quiet") == 0
    assert "too large for FP16" in capsys.readouterr().out
    options = ("--graphs", "thinker", "--precision", "fp16", "--max-context", 4096, "--ranges", out)
    assert command("export", loud, tmp_path / "kept", *options) == 0
    captured = capsys.readouterr()
    assert "thinker: " in captured.err
    assert "stay FP32" in captured.err


def test_command_refusals(wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("ranges", wide, tmp_path) == 2
    assert "folder without a bundle" in capsys.readouterr().err
    assert command("ranges", wide, tmp_path / "no" / "ranges.json") == 2
    assert "is not a folder" in capsys.readouterr().err
    assert command("ranges", wide, tmp_path / "r.json", "--data", tmp_path / "none.jsonl") == 2
    assert "cannot read" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
