"""Quantized bundles: what is stored, what runs, what is refused, and how much memory it takes."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from omniport.calib.quantizer import quantize
from omniport.calib.weights.choices import Choice, choose, resolve
from omniport.calib.weights.rounding import rounded_rows, scales_from
from omniport.calib.weights.tensors import Stored, find_weights, row_blocks
from omniport.export.validation.types import FAIL, PASS
from omniport.export.validation.validate import validate
from omniport.runtime import Done, OmniSession, SamplingConfig
from omniport.runtime.bundle.graph_spec import GraphSpec
from omniport.runtime.bundle.integer_weights import pack_int4
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.bundle.recipes import SCHEMES, Weight, find_recipe
from omniport.runtime.errors import BundleError, ExportError, UsageError
from onnx import TensorProto, helper, numpy_helper
from support.bundles import edit, make_bundle, make_manifest
from support.command_line import Omniport
from support.onnx_graphs import make_model, put_graphs, spec, tensor

LM_PARTS = ("thinker", "talker")
MIB = 1 << 20


@pytest.fixture(scope="module")
def quantized(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``tiny`` by the recipes that need no calibration."""
    room = tmp_path_factory.mktemp("quantized")
    made = {recipe: room / recipe for recipe in ("w8", "int4")}
    for recipe, out in made.items():
        quantize(tiny_bundle, out, recipe)
    return made


def load(root: Path, graph: str) -> onnx.ModelProto:
    return onnx.load(Bundle.open(root).path(f"graphs/{graph}.onnx"))


def weights_of(root: Path, graph: str) -> dict[str, Any]:
    return {t.name: numpy_helper.to_array(t) for t in load(root, graph).graph.initializer}


def stored_file(path: Path, array: np.ndarray[Any, Any], offset: int = 0) -> Stored:
    path.write_bytes(b"x" * offset + array.tobytes())
    return Stored("w", path, offset, array.shape, array.dtype)


# what is stored


def block_of(scheme: str, rows: int) -> int:
    return {"w8": rows, "w8-16": 16, "w8-32": 32, "w8-128": 128, "int4-32": 32, "int4-128": 128}[scheme]


def oracle(weight: np.ndarray[Any, Any], scheme: str) -> np.ndarray[Any, Any]:
    """[K, N] to integers and back, channel by channel and block by block, in plain loops."""
    low, high = (-127, 127) if scheme.startswith("w8") else (-8, 7)
    block = block_of(scheme, len(weight))
    out = np.empty_like(weight)
    for start in range(0, len(weight), block):
        for column in range(weight.shape[1]):
            values = weight[start : start + block, column]
            scale = max(np.float32(values.min()) / np.float32(low), np.float32(values.max()) / np.float32(high))
            scale = weight.dtype.type(scale or 1)  # of no consequence where there are zeros only
            integers = np.clip(np.rint(values.astype(np.float32) / np.float32(scale)), low, high)
            out[start : start + block, column] = integers.astype(weight.dtype) * scale
    return out


@pytest.mark.parametrize("recipe", ["w8", "int4"])
def test_what_is_stored_dequantizes_to_the_oracle_bit_by_bit(
    recipe: str, quantized: dict[str, Path], tiny_bundle: Path
) -> None:
    record = Bundle.open(quantized[recipe]).manifest.quantization
    assert record is not None
    before, after = weights_of(tiny_bundle, "thinker"), weights_of(quantized[recipe], "thinker")
    seen = set()
    for name, scheme in record.layers["thinker"].items():
        if scheme == "none":
            assert name.startswith(("model.layers.0.self_attn.", "model.layers.0.mlp.down_proj."))
            continue
        integers, scales = after.pop(f"{name}.integers"), after.pop(f"{name}.scales")
        wide, block = integers.astype(np.float32), block_of(scheme, len(integers))
        got = wide * scales if scheme == "w8" else (wide.reshape(-1, block, wide.shape[1]) * scales[:, None])
        wanted = before.pop(name)
        assert np.abs(wanted).max() > 0.01
        np.testing.assert_array_equal(got.reshape(wanted.shape), oracle(wanted, scheme))
        seen.add(scheme)
    assert seen == ({"w8-16", "w8-32", "w8-128"} if recipe == "w8" else {"w8", "int4-32"})
    assert before.keys() == after.keys()  # biases, norms
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)


@pytest.mark.parametrize(
    ("scheme", "shape", "dtype"),
    [
        ("w8", (37, 5), np.float32),
        ("w8", (1, 3), np.float16),
        ("int4-32", (96, 7), np.float32),
        ("int4-32", (32, 1), np.float16),
        ("int4-128", (256, 3), np.float32),
    ],
)
def test_odd_sizes_in_small_pieces(
    scheme: str, shape: tuple[int, int], dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of a few rows, so that a weight is put together from many of them."""
    monkeypatch.setattr("omniport.calib.weights.tensors.BLOCK_BYTES", 128)
    array = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    array[:, 0] = 0  # a channel without a value has a scale all the same
    source = stored_file(tmp_path / "w", array, offset=64)
    choice = Choice(Weight("w", "matmul", "channels_last", shape), SCHEMES[scheme])
    read: list[int] = []
    pieces = list(rounded_rows(choice, source, read.append))
    assert len(pieces) > 1 or shape[0] <= 32
    assert sum(read) == array.nbytes
    integers = np.concatenate([rows for rows, _ in pieces]).astype(dtype)
    scales = np.concatenate([found for _, found in pieces if found is not None])
    assert scales.dtype == dtype
    assert (scales > 0).all()
    if scheme != "w8":
        scales = np.repeat(scales, SCHEMES[scheme].block, axis=0)
    np.testing.assert_array_equal(integers * scales, oracle(array, scheme))
    assert (integers[:, 0] == 0).all()


def test_convolutions_have_a_scale_for_each_output(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((6, 4, 3)).astype(np.float32)
    choice = Choice(Weight("w", "conv", "channels_first", array.shape), SCHEMES["w8"])
    ((integers, scales),) = rounded_rows(choice, stored_file(tmp_path / "w", array), lambda _: None)
    assert scales is not None
    np.testing.assert_array_equal(scales, np.abs(array).max((1, 2)) / np.float32(127))
    assert np.abs(integers * scales[:, None, None] - array).max() <= scales.max() / 2 * 1.001


def test_int4_packing_is_that_of_onnx() -> None:
    values = np.random.default_rng(0).integers(-8, 8, (4, 5))
    proto = helper.make_tensor("w", TensorProto.INT4, values.shape, values.ravel())
    unpacked = numpy_helper.to_array(proto)
    assert (unpacked.astype(int) == values).all()
    raw = TensorProto(name="w", data_type=TensorProto.INT4, dims=values.shape)
    raw.raw_data = pack_int4(values.astype(np.int8)).tobytes()
    np.testing.assert_array_equal(numpy_helper.to_array(raw).astype(int), values)


def test_scales_of_tiny_halves_are_no_zeros() -> None:
    tiny = np.asarray([0, 1e-9], np.float32)
    scales = scales_from(-tiny, tiny, "int8", np.dtype(np.float16))
    assert (scales == np.float16(2.0**-14)).all()


def test_rows_of_blocks_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omniport.calib.weights.tensors.BLOCK_BYTES", 1000)
    ranges = list(row_blocks((320, 5), 4, 32))
    assert ranges == [(start, start + 32) for start in range(0, 320, 32)]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("scheme", ["w8", "int4-32"])
def test_a_weight_that_is_not_finite_is_named(scheme: str, value: float, tmp_path: Path) -> None:
    array = np.ones((64, 4), np.float32)
    array[40, 2] = value
    choice = Choice(Weight("w", "matmul", "channels_last", array.shape), SCHEMES[scheme])
    with pytest.raises(BundleError, match=r"weight 'w'.*not finite"):
        list(rounded_rows(choice, stored_file(tmp_path / "w", array), lambda _: None))


# the graph


def fused(root: Path, graph: str, tmp_path: Path) -> Counter[str]:
    """Operators of the graph that ONNX Runtime runs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(root / "graphs" / f"{graph}.onnx"), options, providers=["CPUExecutionProvider"])
    made = onnx.load(tmp_path / "optimized.onnx", load_external_data=False)
    return Counter(node.op_type for node in made.graph.node)


@pytest.mark.parametrize("recipe", ["w8", "int4"])
@pytest.mark.parametrize("graph", LM_PARTS)
def test_onnx_runtime_fuses_every_product(recipe: str, graph: str, quantized: dict[str, Path], tmp_path: Path) -> None:
    products = sum(node.op_type == "MatMul" for node in load(quantized[recipe], graph).graph.node)
    found = fused(quantized[recipe], graph, tmp_path)
    kept = 5 if recipe == "w8" else 0  # of the first layer: attention and down_proj
    assert found["MatMulNBits"] == products - kept > 20
    assert (found["DequantizeLinear"], found["MatMul"]) == (0, kept)


def test_a_weight_of_two_products_is_stored_once(tmp_path: Path) -> None:
    value = numpy_helper.from_array(np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32), "w")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="a"),
        helper.make_node("MatMul", ["h", "w"], ["y"], name="b"),
    ]
    x, y = tensor("x", "batch", 64), tensor("y", "batch", 64)
    root = external(tmp_path / "bundle", make_model(nodes, [x], [y], [value]), spec("dit", [x], [y]))
    quantize(root, tmp_path / "out", "w8")
    model = load(tmp_path / "out", "dit")
    assert [node.op_type for node in model.graph.node].count("DequantizeLinear") == 1
    assert {t.name for t in model.graph.initializer} == {"w.integers", "w.scales"}
    assert next(node.op_type for node in model.graph.node) == "DequantizeLinear"


def external(root: Path, model: onnx.ModelProto, graph: GraphSpec) -> Path:
    """A bundle with one graph, its weights outside."""
    put_graphs(root, (model, graph))
    path = root / graph.file
    onnx.save_model(model, path, save_as_external_data=True, location="weights", size_threshold=0)
    edit(root, lambda m: m["graphs"]["dit"].update(data=["graphs/weights"]))
    edit(
        root,
        lambda m: m["files"].update(
            {f: {"size": (root / f).stat().st_size, "sha256": "0" * 64} for f in (graph.file, "graphs/weights")}
        ),
    )
    return root


# the bundle


@pytest.mark.parametrize("recipe", ["w8", "int4"])
def test_a_quantized_bundle_says_what_it_is(recipe: str, quantized: dict[str, Path], tiny_bundle: Path) -> None:
    before, after = Bundle.open(tiny_bundle).manifest, Bundle.open(quantized[recipe], verify=True).manifest
    assert (after.precision, after.schema_version) == (recipe, 3)
    assert after.quantization is not None
    assert (after.quantization.recipe, after.quantization.precision) == (recipe, "fp32")
    changed = {name for name, graph in after.graphs.items() if graph.precision != "float32"}
    assert changed == set(after.quantization.layers) == set(find_recipe(recipe).graphs)
    for name in changed:
        graph, old = after.graphs[name], before.graphs[name]
        assert graph.precision == ("int8" if recipe == "w8" else "int4")
        assert graph.compute_dtype == "float32"
        assert (graph.inputs, graph.outputs, graph.dims) == (old.inputs, old.outputs, old.dims)
        assert graph.inputs_key != old.inputs_key
    assert {n: g for n, g in after.graphs.items() if n not in changed} == {
        n: g for n, g in before.graphs.items() if n not in changed
    }
    assert not set(before.files) - set(after.files)


@pytest.mark.parametrize(("recipe", "most"), [("w8", 0.50), ("int4", 0.23)])
def test_size_of_thinker_and_talker(recipe: str, most: float, quantized: dict[str, Path], tiny_bundle: Path) -> None:
    """``tiny`` has four layers, one of which ``w8`` keeps, and a small head; with more it comes closer to 9/32."""
    size = [
        sum((r / f"graphs/{n}.onnx.data").stat().st_size for n in LM_PARTS) for r in (quantized[recipe], tiny_bundle)
    ]
    assert size[0] / size[1] < most


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w8", "int4"])
def test_a_quantized_bundle_replies_and_validates(
    recipe: str, quantized: dict[str, Path], tiny_checkpoint: Path
) -> None:
    with OmniSession.open(quantized[recipe], backend="ort-cpu", threads=1) as session:
        events = list(
            session.reply([{"role": "user", "content": "Hello"}], speak=False, thinker=SamplingConfig(max_new_tokens=4))
        )
    assert isinstance(events[-1], Done)
    graphs = ("thinker", "talker", "audio_encoder", "dit")
    report = validate(quantized[recipe], tiny_checkpoint, graphs=graphs)[0]
    assert {check.stage for check in report.checks if check.status == PASS} >= set(graphs)
    assert [(c.stage, c.name, c.message) for c in report.checks if c.status == FAIL] == []
    assert report.precision == recipe


def test_four_bits_do_not_hide_weights_swapped_between_layers(
    quantized: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Logits are far off in 4 bits anyway; how likely each token is, is not."""
    root = shutil.copytree(quantized["int4"], tmp_path / "swapped")
    path = root / "graphs" / "talker.onnx"
    model = onnx.load(path, load_external_data=False)
    names = [f"model.layers.{layer}.mlp.down_proj.weight.{part}" for layer in (1, 2) for part in ("integers", "scales")]
    swapped = dict(zip(names, names[2:] + names[:2], strict=True))
    places = [(n, i) for n in model.graph.node for i, name in enumerate(n.input) if name in swapped]
    assert len(places) == 4
    for node, i in places:
        node.input[i] = swapped[node.input[i]]
    onnx.save(model, path)
    entry = {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    edit(root, lambda m: m["files"].update({"graphs/talker.onnx": entry}))
    checks = validate(root, tiny_checkpoint, graphs=("talker",))[0].checks
    wrong = [check for check in checks if check.stage == "talker" and check.status == FAIL]
    assert len(wrong) >= 5
    assert all("kl is" in check.message for check in wrong)


@pytest.mark.slow
def test_engines_of_quantized_decoders_build(tiny_half_bundles: dict[str, Path], tmp_path: Path) -> None:
    """FP16 with INT8 and INT4 weights, for SM89: built, not run."""
    pytest.importorskip("tensorrt_rtx")
    from omniport.export.devices.catalog import TARGETS
    from omniport.export.tensorrt.build import build_bundle

    quantize(tiny_half_bundles["fp16"], tmp_path / "int4", "int4")
    report = build_bundle(Bundle.open(tmp_path / "int4"), TARGETS["rtx-4090"], graphs=LM_PARTS)
    assert [row.graph for row in report.graphs if row.built] == list(LM_PARTS)


def test_the_same_bytes_again(quantized: dict[str, Path], tiny_bundle: Path, tmp_path: Path) -> None:
    quantize(tiny_bundle, tmp_path / "again", "int4")
    assert (tmp_path / "again" / "bundle.json").read_bytes() == (quantized["int4"] / "bundle.json").read_bytes()


def test_keep_and_graph_recipes(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "notes").mkdir(parents=True)
    shutil.copytree(tiny_bundle, out, dirs_exist_ok=True)
    (out / "notes" / "mine.txt").write_text("kept")
    report = quantize(
        tiny_bundle,
        out,
        "w8",
        keep=(r"^thinker/lm_head", r"layers\.1\.self_attn\.q"),
        graph_recipes={"dit": "none", "bigvgan": "w8", "talker": "int4", "audio_encoder": "fp32"},
    )
    manifest = Bundle.open(out, verify=True).manifest
    assert {name: graph.precision for name, graph in manifest.graphs.items()} == {
        "audio_encoder": "float32",
        "vision_encoder": "int8",
        "thinker": "int8",
        "talker": "int4",
        "dit": "float32",
        "bigvgan": "int8",
    }
    assert manifest.quantization is not None
    kept = {g: [n for n, s in rows.items() if s == "none"] for g, rows in manifest.quantization.layers.items()}
    assert len([name for name in kept["thinker"] if name.startswith("model.layers.0.")]) == 5
    assert kept["thinker"][5:] == ["model.layers.1.self_attn.q_proj.weight", "lm_head.weight"]
    assert "lm_head.weight" in weights_of(out, "thinker")
    assert manifest.quantization.keep == (r"^thinker/lm_head", r"layers\.1\.self_attn\.q")
    assert (out / "notes" / "mine.txt").read_text() == "kept"
    assert {row.name: row.bytes_after < row.bytes_before for row in report.graphs}["bigvgan"]


# what is refused


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"recipe": "int3"}, UsageError, "no recipe 'int3'; known: int8, w8"),
        ({"keep": ("lm_haed",)}, UsageError, "'lm_haed' matches no weight; .*audio_encoder/"),
        ({"keep": ("(",)}, UsageError, "not a regular expression"),
        ({"graph_recipes": {"dit": "int3"}}, UsageError, "dit=int3: no recipe 'int3'"),
        ({"graph_recipes": {"dit": "fp16"}}, UsageError, "computes in float32.*--precision fp16 --token2wav fp16"),
        ({"graph_recipes": {"decoder": "w8"}}, UsageError, "no graph 'decoder'"),
        ({"keep": (".",)}, UsageError, "nothing to do"),
    ],
)
def test_options_that_fit_nothing(
    options: dict[str, Any], error: type[Exception], words: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        quantize(tiny_bundle, tmp_path / "out", **{"recipe": "w8", **options})
    assert list(tmp_path.iterdir()) == []


def test_places_that_are_refused(quantized: dict[str, Path], tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="quantized already"):
        quantize(quantized["w8"], tmp_path / "out", "int4")
    for out in (tiny_bundle, tiny_bundle / "inside", tiny_bundle.parent):
        with pytest.raises(UsageError, match="one inside the other"):
            quantize(tiny_bundle, out, "w8")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ExportError, match="holds no bundle"):
        quantize(tiny_bundle, tmp_path / "mine", "w8")
    with pytest.raises(BundleError, match=r"bundle\.json"):
        quantize(tmp_path / "nothing", tmp_path / "out", "w8")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda root: edit(root, lambda m: m["graphs"]["thinker"].update(data=[])), "does not list for graph"),
        (lambda root: edit(root, lambda m: m["graphs"]["thinker"].update(file="graphs/dit.onnx.data")), "ONNX"),
    ],
)  # fmt: skip
def test_damaged_bundles(change: Callable[[Path], object], words: str, tiny_bundle: Path, tmp_path: Path) -> None:
    root = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, root)
    change(root)
    with pytest.raises(BundleError, match=words):
        quantize(root, tmp_path / "out", "int4")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_data_file_that_ends_early(tiny_bundle: Path, tmp_path: Path) -> None:
    """Listed with the size it has: only reading shows it."""
    root = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, root)
    file = "graphs/talker.onnx.data"
    (root / file).write_bytes((root / file).read_bytes()[:100_000])
    edit(root, lambda m: m["files"][file].update(size=100_000))
    with pytest.raises(BundleError, match="ends before weight"):
        quantize(root, tmp_path / "out", "int4")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_blocks_that_do_not_fit_fall_back_to_channels() -> None:
    weights = {
        "thinker": [
            Weight("mlp.a", "matmul", "channels_last", (48, 8)),
            Weight("mlp.b", "matmul", "channels_last", (64, 8)),
        ]
    }
    chosen = choose(resolve(find_recipe("int4"), {}, {"thinker": "float32"}), weights)
    assert [choice.scheme.name for choice in chosen["thinker"]] == ["w8", "int4-32"]
    halves = [Weight("mlp.b", "matmul", "channels_last", (64, 8), dtype) for dtype in ("float32", "float16")]
    chosen = choose(resolve(find_recipe("w8"), {}, {"thinker": "float16"}), {"thinker": halves})
    assert [choice.scheme.name for choice in chosen["thinker"]] == ["w8-32", "w8"]


def test_weights_with_other_readers_are_left_alone() -> None:
    import onnx_ir as ir

    value = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="a"),
        helper.make_node("Add", ["h", "w"], ["y"], name="b"),
    ]
    model = make_model(nodes, [tensor("x", 64, 64)], [tensor("y", 64, 64)], [value])
    assert find_weights(ir.from_proto(model)) == ()


def test_records_of_quantization_are_checked(tmp_path: Path) -> None:
    record = {"recipe": "w8", "precision": "fp32", "layers": {"encoder": {}}}
    root = make_bundle(tmp_path / "b")
    edit(root, lambda m: m.update(quantization=record))
    with pytest.raises(BundleError, match="graph 'encoder'"):
        Bundle.open(root)
    edit(root, lambda m: m.update(schema_version=1, quantization={**record, "layers": {}}))
    with pytest.raises(BundleError, match="version 1 has no quantization"):
        Bundle.open(root)
    assert make_manifest().quantization is None


# the command


def test_the_command(tiny_bundle: Path, tmp_path: Path, omniport: Omniport) -> None:
    out = tmp_path / "out"
    options = ("--recipe", "int4", "--graph-recipe", "dit=w8", "--keep", "lm_head", "--json")
    code, text, _ = omniport("quantize", tiny_bundle, out, *options)
    assert code == 0
    report = json.loads(text)
    assert {row["name"]: row["precision"] for row in report["graphs"]}["dit"] == "int8"
    assert next(row for row in report["graphs"] if row["name"] == "thinker")["weights"]["none"] == 1
    code, text, _ = omniport("quantize", tiny_bundle, out, "--recipe", "w8", "--quiet")
    assert code == 0
    assert "vision_encoder   int8" in text
    for bad in ("dit", "dit=", "=w8", "decoder=w8"):
        code, text, errors = omniport("quantize", tiny_bundle, out, "--recipe", "w8", "--graph-recipe", bad)
        assert (code, text) == (2, "")
        assert "GRAPH=RECIPE was expected" in errors
    assert omniport("quantize", tiny_bundle, out, "--recipe", "int3")[0] == 2
    assert Bundle.open(out).manifest.precision == "w8"


# memory


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc, which only Linux has")
def test_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    """2 and 12 products of 16.8 MB: the high-water mark of a process that quantizes, above its start."""
    peaks = {}
    for layers in (2, 12):
        root = deep(tmp_path / str(layers), layers)
        code = (
            "import sys; from pathlib import Path; from omniport.calib.quantizer import quantize; "
            "from omniport.runtime.system.host import resident_memory; before = resident_memory(); "
            "quantize(Path(sys.argv[1]), Path(sys.argv[2]), 'w8'); print(resident_memory('VmHWM') - before)"
        )
        command = [sys.executable, "-c", code, str(root), str(tmp_path / f"out-{layers}")]
        peaks[layers] = int(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
    assert 16 * MIB < peaks[2] < 200 * MIB
    assert peaks[12] - peaks[2] < 20 * MIB


def deep(root: Path, layers: int) -> Path:
    rng = np.random.default_rng(0)
    values = [numpy_helper.from_array(rng.standard_normal((2048, 2048), np.float32), f"w{i}") for i in range(layers)]
    names = ["x", *(f"h{i}" for i in range(layers - 1)), "y"]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]], name=f"n{i}") for i in range(layers)]
    x, y = tensor("x", "batch", 2048), tensor("y", "batch", 2048)
    return external(root, make_model(nodes, [x], [y], values), spec("dit", [x], [y]))
