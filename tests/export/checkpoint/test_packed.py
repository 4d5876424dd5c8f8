"""GPTQ and AWQ checkpoints: what is read, what the graph holds, what runs and builds, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from omniport.cli import main
from omniport.export.checkpoint.checkpoint import Checkpoint
from omniport.export.devices.catalog import TARGETS
from omniport.export.evaluation.reference_modules import load_reference
from omniport.export.exporter import export_checkpoint
from omniport.export.models.decoder_stack import decoder_cases
from omniport.export.models.model_parts import MODEL_PARTS
from omniport.export.tensorrt.build import build_bundle
from omniport.export.tensorrt.builder_api import too_old_for
from omniport.export.tensorrt.onnx_file import open_onnx
from omniport.export.validation.types import PASS
from omniport.export.validation.validate import validate
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import BuildError, CheckpointError, ExportError
from onnx import numpy_helper
from support.checkpoints import rewritten
from support.packed_checkpoints import packed_checkpoint

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "awq": ("awq", {"config": {"version": "gemm", "zero_point": True}}),
    "gptq": ("gptq", {"symmetric": True, "config": {"sym": True, "desc_act": False, "checkpoint_format": "gptq"}}),
    "gptq-desc-act": ("gptq", {"shuffled": True, "config": {"desc_act": True}}),
    "gptq-v2-one-group": ("gptq", {"group": -1, "version": 2, "config": {"checkpoint_format": "gptq_v2"}}),
    "gptq-8": ("gptq", {"bits": 8, "symmetric": True, "config": {"sym": True}}),
    "gptq-8-desc-act": ("gptq", {"bits": 8, "group": 64, "shuffled": True, "config": {"desc_act": True}}),
    "awq-64": ("awq", {"group": 64, "symmetric": True}),
}
Meant = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def made(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Meant]]:
    """Makes, once, a packed copy of ``tiny`` of a kind; with what its packed weights stand for."""
    room, kept = tmp_path_factory.mktemp("packed"), dict[str, Meant]()

    def make(kind: str) -> tuple[Path, Meant]:
        if kind not in kept:
            method, options = KINDS[kind]
            kept[kind] = packed_checkpoint(tiny_checkpoint, room / kind, method, **options)
        return room / kind, kept[kind]

    return make


@pytest.fixture(scope="module")
def exported(made: Callable[[str], tuple[Path, Meant]]) -> Callable[[str, str], Path]:
    """Exports, once, the thinker of a kind, with zero points kept or separate."""

    def export(kind: str, zero_points: str) -> Path:
        checkpoint, _ = made(kind)
        out = checkpoint.with_name(f"{kind}-{zero_points}")
        if not out.exists():
            export_checkpoint(checkpoint, out, max_context=512, graphs=["thinker"], zero_points=zero_points)
        return out

    return export


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_read_as_what_they_stand_for(kind: str, made: Callable[[str], tuple[Path, Meant]]) -> None:
    path, meant = made(kind)
    ckpt = Checkpoint.open(path)
    assert len(meant) == 28
    assert meant.keys() <= set(ckpt.keys())
    assert not any(key.endswith(("qweight", "qzeros", "scales", "g_idx")) for key in set(ckpt.keys()))
    for key, value in meant.items():
        assert ckpt.shape(key) == value.shape
        assert value.std() > 0.01
        np.testing.assert_array_equal(ckpt.read(key), value)
        np.testing.assert_array_equal(ckpt.read(key, 3, 21), value[3:21])


def dequantized(graph: onnx.GraphProto, name: str) -> np.ndarray[Any, Any]:
    """[K, N] in the checkpoint's order, from what a graph holds."""
    tensors = {t.name: t for t in graph.initializer if t.name.startswith((f"{name}.", "packed."))}
    arrays = {key.removeprefix(f"{name}."): numpy_helper.to_array(t) for key, t in tensors.items()}
    integers = arrays["integers"].astype(np.int64)
    block = len(integers) // len(arrays["scales"])
    zeros = arrays.get("zero_points", np.zeros_like(arrays["scales"])).astype(np.int64)
    value = (integers - zeros.repeat(block, 0)).astype(np.float32) * arrays["scales"].repeat(block, 0)
    if "offsets" in arrays:
        value += arrays["offsets"].repeat(len(integers) // len(arrays["offsets"]), 0)
    product = next(n for n in graph.node if n.name == f"{name.removesuffix('.weight')}/MatMul")
    source = next(n for n in graph.node if product.input[0] in n.output)
    if source.op_type == "Gather" and source.input[1] in arrays:
        ordered, value = value, np.empty_like(value)
        value[arrays[source.input[1]]] = ordered
    return value


@pytest.mark.parametrize(
    ("kind", "zero_points", "scheme"),
    [
        ("awq", "keep", "int4-32-zp"),
        ("awq", "separate", "int4-32-offsets"),
        ("gptq", "keep", "int4-32"),
        ("gptq-desc-act", "keep", "int4-32-zp"),
        ("gptq-desc-act", "separate", "int4-32-offsets"),
        ("gptq-v2-one-group", "keep", "int4-"),
        ("gptq-8", "keep", "w8-32"),
        ("gptq-8-desc-act", "keep", "w8-64-zp"),
        ("gptq-8-desc-act", "separate", "w8-64-offsets"),
        ("awq-64", "keep", "int4-64"),
    ],
)
def test_the_graph_holds_the_same_integers_and_scales_and_runs(
    kind: str,
    zero_points: str,
    scheme: str,
    made: Callable[[str], tuple[Path, Meant]],
    exported: Callable[[str, str], Path],
) -> None:
    checkpoint, meant = made(kind)
    bundle = Bundle.open(exported(kind, zero_points), verify=True)
    manifest = bundle.manifest
    assert (manifest.precision, manifest.kv.dtype) == (KINDS[kind][0], "float32")
    precision = "int8" if scheme.startswith("w8") else "int4"
    assert (manifest.graphs["thinker"].precision, manifest.graphs["thinker"].compute) == (precision, "float32")
    assert manifest.quantization is not None
    counts = Counter(manifest.quantization.layers["thinker"].values())
    assert counts.pop("none") == 1  # the head
    assert sum(counts.values()) == 28
    assert all(name.startswith(scheme) for name in counts)
    model = onnx.load(bundle.path("graphs/thinker.onnx"))
    assert model.opset_import[0].version == 24
    for key, value in meant.items():
        name = key.removeprefix("thinker.")
        got = dequantized(model.graph, name)
        np.testing.assert_array_equal(got.T, value)
    assert parity(checkpoint, bundle) < 1e-5


def parity(checkpoint: Path, bundle: Bundle) -> float:
    """Relative RMS of the thinker's logits against transformers, every operator on its own: nothing is fused."""
    ckpt, rng = Checkpoint.open(checkpoint), np.random.default_rng(3)
    width = bundle.manifest.thinker.hidden_size
    embeds = rng.standard_normal((1, 9, width)).astype(np.float32)
    _, case = decoder_cases(MODEL_PARTS["thinker"], "x", embeds, np.tile(np.arange(9), (3, 1, 1)), 16)
    with torch.no_grad():
        wanted = case.reference(load_reference(ckpt, "thinker")).numpy()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(bundle.path("graphs/thinker.onnx"), options, providers=["CPUExecutionProvider"])
    feeds: dict[str, Any] = {
        "inputs_embeds": embeds,
        "position_ids": np.tile(np.arange(9), (3, 1, 1)),
        "kv_positions": np.arange(9),
        "write_index": np.zeros(1, np.int64),
    }
    for spec in session.get_inputs():
        if spec.name.startswith("past_"):
            held = 16 if bundle.manifest.kv.form == "static" else 0
            feeds[spec.name] = np.zeros((1, spec.shape[1], held, spec.shape[3]), np.float32)
    got = session.run(["logits"], feeds)[0]
    assert np.abs(wanted).max() > 0.1
    return float(np.sqrt(((got - wanted) ** 2).mean() / (wanted**2).mean()))


@pytest.mark.parametrize("kind", ["awq", "gptq", "gptq-8", "gptq-8-desc-act"])
def test_onnx_runtime_fuses_them_and_validation_passes(
    kind: str, made: Callable[[str], tuple[Path, Meant]], exported: Callable[[str, str], Path], tmp_path: Path
) -> None:
    checkpoint, _ = made(kind)
    bundle = exported(kind, "keep")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # it warns that the optimized graph is for this machine only
    ort.InferenceSession(bundle / "graphs/thinker.onnx", options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx", load_external_data=False)
    counts = Counter(node.op_type for node in optimized.graph.node)
    assert counts["MatMulNBits"] == 28
    assert counts["DequantizeLinear"] == 0
    fused = [list(node.input) for node in optimized.graph.node if node.op_type == "MatMulNBits"]
    assert {bool([*inputs, ""][3]) for inputs in fused} == {kind in ("awq", "gptq-8-desc-act")}  # the zero points
    report, _ = validate(bundle, checkpoint, graphs=["thinker"])
    assert report.ok, [(c.stage, c.name, c.message) for c in report.checks if c.status == "fail"]
    errors = [c.figures["rel_rms"] for c in report.checks if c.status == PASS and "logits" in c.name]
    assert len(errors) > 3
    assert max(errors) < 0.15  # the limit is 0.5; what is left is what MatMulNBits rounds of the other factor


def test_products_of_one_tensor_share_its_order_and_its_sums(exported: Callable[[str, str], Path]) -> None:
    """q, k and v are packed in one order, gate and up in another: four Gathers a layer, not seven."""
    model = onnx.load(exported("gptq-desc-act", "separate") / "graphs/thinker.onnx", load_external_data=False)
    counts = Counter(node.op_type for node in model.graph.node if "layers.0." in node.name)
    assert counts["ReduceSum"] == 4
    assert sum(node.op_type == "Gather" and "_proj/" in node.name for node in model.graph.node) == 16
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)


def test_weights_are_put_together_from_small_pieces(made: Callable[[str], tuple[Path, Meant]]) -> None:
    for kind in ("awq", "gptq-desc-act"):
        weight = Checkpoint.open(made(kind)[0]).packed["thinker.model.layers.0.mlp.down_proj.weight"]
        pieces = list(weight.integers(rows=24))
        assert len(pieces) > 10
        np.testing.assert_array_equal(np.concatenate(pieces), np.concatenate(list(weight.integers())))


def test_scales_stay_what_they_are_in_half_precision(
    made: Callable[[str], tuple[Path, Meant]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, _ = made("gptq")
    arguments = ["export", str(checkpoint), str(tmp_path / "half"), "--precision", "fp16", "--graphs", "thinker"]
    assert json.loads(output(capsys, *arguments, "--json"))["graphs"][0]["weights"] == {"int4-32": 28, "none": 1}
    bundle = Bundle.open(tmp_path / "half")
    assert bundle.manifest.graphs["thinker"].compute == "float16"
    assert bundle.manifest.kv.dtype == "float16"
    tensors = {t.name: t for t in onnx.load(bundle.path("graphs/thinker.onnx")).graph.initializer}
    stored = Checkpoint.open(checkpoint).read("thinker.model.layers.1.mlp.up_proj.scales")
    got = numpy_helper.to_array(tensors["model.layers.1.mlp.up_proj.weight.scales"])
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got, stored)
    with pytest.raises(CheckpointError, match=r"are float16 and would be rounded to bfloat16.*--precision fp32"):
        export_checkpoint(checkpoint, tmp_path / "brain", precision="bf16", graphs=["thinker"])
    assert not (tmp_path / "brain").exists()
    shown = " ".join(output(capsys, "inspect", str(tmp_path / "half")).split())
    assert "gptq, from fp16: thinker 28 int4-32, 1 none" in shown


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command prints that succeeds."""
    with pytest.raises(SystemExit) as stopped:
        main.run(list(arguments))
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_a_second_export_takes_over_what_is_there(
    made: Callable[[str], tuple[Path, Meant]], exported: Callable[[str, str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(exported("awq", "keep"), out)
    before = Bundle.open(out).manifest
    again = {"max_context": 512, "graphs": ["thinker"]}
    assert export_checkpoint(made("awq")[0], out, **again).graphs[0].skipped  # type: ignore[arg-type]
    assert Bundle.open(out).manifest.quantization == before.quantization
    changed = export_checkpoint(made("awq")[0], out, zero_points="separate", **again)  # type: ignore[arg-type]
    assert not changed.graphs[0].skipped


def test_tensorrt_refuses_zero_points_and_builds_the_rest(exported: Callable[[str, str], Path]) -> None:
    pytest.importorskip("tensorrt_rtx")
    card = TARGETS["rtx-4090"]
    with pytest.raises(BuildError, match=r"28 weights have zero points.*--zero-points separate"):
        build_bundle(Bundle.open(exported("awq", "keep")), card)
    for kind, zero_points in (("gptq", "keep"), ("gptq-desc-act", "separate"), ("gptq-8", "keep")):
        (row,) = build_bundle(Bundle.open(exported(kind, zero_points)), card).graphs
        assert row.record.dtype == ("int8" if kind == "gptq-8" else "int4")
        assert row.record.layers["DEQUANTIZE"] == 28


@pytest.mark.parametrize(("kind", "zero_points"), [("gptq", "keep"), ("awq", "separate")])
def test_lowered_graphs_hold_what_the_parser_of_jetpack_6_takes(
    kind: str, zero_points: str, made: Callable[[str], tuple[Path, Meant]], tmp_path: Path
) -> None:
    """Opset 21 for INT4 in blocks, operators of opset 18, and the same numbers."""
    checkpoint, meant = made(kind)
    lowered: dict[str, Any] = {"ops": "decomposed", "kv": "concat", "zero_points": zero_points}
    export_checkpoint(checkpoint, tmp_path / "b", max_context=512, graphs=["thinker"], **lowered)
    bundle = Bundle.open(tmp_path / "b")
    path = bundle.path("graphs/thinker.onnx")
    model = onnx.load(path)
    onnx.checker.check_model(path)
    assert bundle.manifest.graphs["thinker"].opset == model.opset_import[0].version == 21
    assert too_old_for(open_onnx(path).needs(), 21, "10.3.0") == []
    for key, value in meant.items():
        np.testing.assert_array_equal(dequantized(model.graph, key.removeprefix("thinker.")).T, value)
    assert parity(checkpoint, bundle) < 1e-5
    pytest.importorskip("tensorrt_rtx")
    (row,) = build_bundle(bundle, TARGETS["rtx-4090"]).graphs
    assert row.record.layers["DEQUANTIZE"] == 28


# what is refused

DOWN = "thinker.model.layers.0.mlp.down_proj"


def void(_: object) -> None:
    """For callbacks that return something."""


def broken(
    checkpoint: Path, out: Path, weights: Callable[[dict[str, torch.Tensor]], Any], **settings: Any
) -> pytest.ExceptionInfo[CheckpointError]:
    """The error of exporting a packed checkpoint with its weights and its quantization_config changed."""

    def change(config: dict[str, Any]) -> None:
        config["quantization_config"] |= settings

    rewritten(checkpoint, out / "broken", lambda tensors: void(weights(tensors)), change)
    with pytest.raises(CheckpointError) as caught:
        export_checkpoint(out / "broken", out / "bundle", graphs=["thinker"])
    assert sorted(path.name for path in out.iterdir()) == ["broken"]
    return caught


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 8}, "do not go together .*of 8 bits"),
        ({"bits": 3}, "of 3 bits; 4 and 8 are read.*unquantized checkpoint.*w8"),
        ({"bits": 8, "quant_method": "awq"}, "a awq checkpoint of 8 bits; 4 are read"),
        ({"quant_method": "bitsandbytes"}, "by 'bitsandbytes'; omniport reads gptq and awq"),
        ({"checkpoint_format": "marlin"}, "packed as 'marlin'; of GPTQ, gptq and gptq_v2"),
        ({"quant_method": "awq", "version": "gemv"}, "packed as 'gemv'; of AWQ, gemm"),
        ({"group_size": 64}, "groups of 32 rows, while quantization_config says 64"),
        ({"group_size": "big"}, "group_size 'big'"),
        ({"quant_method": "awq"}, r"shapes that do not go together"),
    ],
)
def test_formats_that_are_not_read(
    settings: dict[str, Any], message: str, made: Callable[[str], tuple[Path, Meant]], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "changed"
    shutil.copytree(made("gptq")[0], checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] |= settings
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parts_that_do_not_go_together(made: Callable[[str], tuple[Path, Meant]], tmp_path: Path) -> None:
    checkpoint, _ = made("gptq-desc-act")
    cases: list[tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = [
        (lambda t: t.pop(f"{DOWN}.scales"), f"{DOWN}.scales is missing"),
        (lambda t: t.pop(f"{DOWN}.qweight"), f"{DOWN}.qweight is missing"),
        (lambda t: t.update({f"{DOWN}.scales": t[f"{DOWN}.scales"][:, :8]}), "do not go together"),
        (lambda t: t.update({f"{DOWN}.qzeros": t[f"{DOWN}.qzeros"][:1]}), "do not go together"),
        (lambda t: t.update({f"{DOWN}.qweight": t[f"{DOWN}.qweight"].float()}), "is float32, expected int32"),
        (lambda t: t.update({f"{DOWN}.weight": torch.zeros(128, 320)}), "stored twice"),
        (lambda t: t[f"{DOWN}.g_idx"].__setitem__(0, 99), "names groups 0 to 99, expected 0 to 9"),
        (lambda t: t[f"{DOWN}.g_idx"].fill_(0), "groups of 0 to 320 rows"),
        (lambda t: t[f"{DOWN}.qzeros"].fill_(-1), "take for 0 or for 16"),
        (lambda t: t[f"{DOWN}.scales"].fill_(float("nan")), "not finite"),
        (lambda t: t.update({f"{DOWN}.bias": torch.ones(128)}), f"does not have: {DOWN}.bias"),
    ]
    for i, (weights, message) in enumerate(cases):
        (tmp_path / str(i)).mkdir()
        broken(checkpoint, tmp_path / str(i), weights).match(message)


def test_biases_of_zeros_are_nothing(made: Callable[[str], tuple[Path, Meant]], tmp_path: Path) -> None:
    """Packers write them for layers that have none."""
    rewritten(made("gptq")[0], tmp_path / "c", lambda t: t.update({f"{DOWN}.bias": torch.zeros(128)}))
    export_checkpoint(tmp_path / "c", tmp_path / "out", max_context=512, graphs=["thinker"])
    assert (tmp_path / "out" / "bundle.json").exists()


def test_packed_weights_without_a_configuration_and_the_other_way_round(
    made: Callable[[str], tuple[Path, Meant]], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = {"bits": 4, "group_size": 32, "desc_act": False}
    rewritten(made("gptq")[0], tmp_path / "bare", config=lambda c: c.pop("quantization_config"))
    with pytest.raises(CheckpointError, match=r"qweight is packed, but config.json has no quantization_config"):
        Checkpoint.open(tmp_path / "bare")
    (tmp_path / "bare" / "quantize_config.json").write_text(json.dumps(config))  # as older checkpoints have it
    assert len(Checkpoint.open(tmp_path / "bare").packed) == 28
    described = {"quant_method": "awq", **config}
    rewritten(tiny_checkpoint, tmp_path / "floats", config=lambda c: c.update(quantization_config=described))
    with pytest.raises(CheckpointError, match="describes a awq checkpoint, but no weight is packed"):
        Checkpoint.open(tmp_path / "floats")


def test_options_that_do_not_go_together(made: Callable[[str], tuple[Path, Meant]], tmp_path: Path) -> None:
    lowered: dict[str, Any] = {"ops": "decomposed", "kv": "concat"}
    with pytest.raises(ExportError, match=r"INT8 weights in blocks, .* from 10\.16 on.*--recipe w8"):
        export_checkpoint(made("gptq-8")[0], tmp_path / "out", **lowered)
    with pytest.raises(ExportError, match=r"has zero points, .*add --zero-points separate"):
        export_checkpoint(made("awq")[0], tmp_path / "out", **lowered)
    with pytest.raises(ExportError, match="no --zero-points 'drop'; known: keep, separate"):
        export_checkpoint(made("gptq")[0], tmp_path / "out", zero_points="drop")
    assert not (tmp_path / "out").exists()


class Reader:
    """A checkpoint of one packed weight, whose rows are made when they are read."""

    def __init__(self, method: str, rows: int, columns: int, group: int) -> None:
        self.method, self.rows, self.columns, self.group = method, rows, columns, group

    def __contains__(self, key: str) -> bool:
        return self.method == "gptq" or not key.endswith("g_idx")

    def dtype(self, key: str) -> str:
        return "float16" if key.endswith("scales") else "int32"

    def shape(self, key: str) -> tuple[int, ...]:
        groups = self.rows // self.group
        packed = (self.rows // 8, self.columns) if self.method == "gptq" else (self.rows, self.columns // 8)
        shapes = {"qweight": packed, "qzeros": (groups, self.columns // 8), "scales": (groups, self.columns)}
        return shapes.get(key.rpartition(".")[2], (self.rows,))

    def read(self, key: str, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        shape = self.shape(key)
        if key.endswith("g_idx"):
            return np.arange(self.rows, dtype=np.int32) % (self.rows // self.group)
        size = (shape[0] if stop is None else stop) - start
        return np.full((size, *shape[1:]), 0x77777777, np.int32)


@pytest.mark.parametrize(("method", "share"), [("awq", 0.0), ("gptq", 1.0)])
def test_memory_of_unpacking(method: str, share: float) -> None:
    """A few pieces; with scattered groups (``gptq`` here), also a byte for each integer."""
    import tracemalloc

    from omniport.export.checkpoint.packed import find_packed, packed_format

    rows, columns = 16384, 2048
    raw = {"quantization_config": {"quant_method": method, "bits": 4, "group_size": 128}}
    reader = Reader(method, rows, columns, 128)
    keys = {f"m.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")}
    (weight,) = find_packed(packed_format(raw, Path("none")), keys, reader).values()
    tracemalloc.start()
    try:
        count = sum(piece.size for piece in weight.integers())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == rows * columns
    pieces = 1024 * columns * 5  # packed, its fields, and what they become
    assert peak < pieces + share * rows * columns, peak / (rows * columns)
