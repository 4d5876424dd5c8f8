"""Quantizing with a calibration: smoothing, rounded activations, FP8; on weights whose activations have outliers."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from msgspec.structs import replace as restruct
from numpy.typing import NDArray
from omniport.calib.calibration_file import Calibration, Site
from omniport.calib.quantizer import quantize
from omniport.calib.report.layer_loss import layer_losses
from omniport.calib.report.recorded_calls import Calls
from omniport.calib.weights.choices import Choice, choose
from omniport.calib.weights.rounding import rounded_rows
from omniport.calib.weights.scales import smoothing
from omniport.calib.weights.smoothing_pass import Factors, SmoothPass
from omniport.calib.weights.tensors import Stored, find_weights
from omniport.cli import main
from omniport.export.devices.catalog import TARGETS
from omniport.export.evaluation.half_emulation import open_graph
from omniport.export.tensorrt.build import build_bundle
from omniport.runtime.backends.onnxruntime.backend import OrtBackend
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.bundle.recipes import SCHEMES, Weight, find_recipe
from omniport.runtime.errors import BuildError, UsageError
from omniport.runtime.generation.decoder import Decoder
from onnx import numpy_helper
from support.calibrations import calibrate_bundle

from benchmarks.speech_loss import measure_speech

Array = NDArray[Any]
DECODERS = ("thinker", "talker")
PLAIN = ("audio_encoder", "vision_encoder", "dit")


@pytest.fixture(scope="module")
def calibration(tiny_outlier_bundle: Path) -> Calibration:
    return calibrate_bundle(tiny_outlier_bundle)


@pytest.fixture(scope="module")
def quantized(
    tiny_outlier_bundle: Path, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """By recipe; ``w8-alone`` and ``int4-alone`` without the calibration."""
    room = tmp_path_factory.mktemp("quantized")
    made = {}
    for name in ("int8", "int8-plain", "w8", "w8-alone", "int4", "int4-alone", "fp8"):
        recipe, _, alone = name.partition("-alone") if name.endswith("-alone") else (name, "", "")
        used = None if name.endswith("-alone") else calibration
        made[name] = room / name
        quantize(tiny_outlier_bundle, made[name], recipe or alone, calibration=used)
    return made


def sqnr(got: Array, wanted: Array) -> float:
    energy = float((wanted.astype(np.float64) ** 2).sum())
    assert energy > 1
    return 10 * float(np.log10(energy / ((got.astype(np.float64) - wanted) ** 2).sum()))


def logits(bundle: Bundle, graph: Any, name: str) -> Array:
    """[12, vocabulary]: a prompt of 20 random tokens, and 12 steps after it."""
    table = bundle.embedding("thinker" if name == "thinker" else "talker")
    rows = table.rows(np.random.default_rng(0).integers(0, table.vocab_size, 32))
    decoder = Decoder(graph, graph.new_cache(32))
    found = []
    for start, stop in [(0, 20), *((n, n + 1) for n in range(20, 32))]:
        positions = np.repeat(np.arange(start, stop)[None], 3, axis=0)
        found.append(decoder.forward(rows[start:stop], positions)[0])
    return np.asarray(found[1:])


def logits_of(root: Path, name: str) -> Array:
    bundle = Bundle.open(root)
    return logits(bundle, OrtBackend(bundle, threads=1).graph(name), name)


# what is lost


@pytest.mark.parametrize("graph", DECODERS)
def test_what_smoothing_saves(graph: str, quantized: dict[str, Path], tiny_outlier_bundle: Path) -> None:
    """Measured (thinker, talker): int8 25.8 and 22.1 dB, plain 0.5 and 0.4; w8 30.5 and 27.9; int4 15.2 and 13.7."""
    wanted = logits_of(tiny_outlier_bundle, graph)
    loss = {name: sqnr(logits_of(root, graph), wanted) for name, root in quantized.items()}
    assert loss["int8"] > 18
    assert loss["int8"] > loss["int8-plain"] + 10
    assert loss["w8"] > 25
    assert loss["w8"] > loss["w8-alone"] + 10
    assert loss["int4"] > loss["int4-alone"] + 1
    assert loss["fp8"] > 13


def test_graphs_of_the_default_recipe_keep_twenty_decibels(
    quantized: dict[str, Path], tiny_outlier_bundle: Path
) -> None:
    """Measured: mel 41 dB, samples 29, audio encoder 27."""
    (found,) = measure_speech({"base": tiny_outlier_bundle, "int8": quantized["int8"]}, 1, 24).values()
    assert found.keys() == {"mel", "wave"}
    assert all(20 < value < 60 for value in found.values()), found
    feeds = {"mel": np.random.default_rng(0).standard_normal((1, 128, 200), np.float32), "frames": np.array([200])}
    runs = [
        OrtBackend(Bundle.open(root), threads=1).graph("audio_encoder").run(feeds)
        for root in (tiny_outlier_bundle, quantized["int8"])
    ]
    for name, wanted in runs[0].items():
        assert 20 < sqnr(runs[1][name], wanted) < 60


# the graph


@pytest.mark.parametrize(("graph", "muls"), [("thinker", 1), ("talker", 2)])
def test_smoothing_alone_changes_nothing(
    graph: str, muls: int, tiny_outlier_bundle: Path, calibration: Calibration, tmp_path: Path
) -> None:
    """Everything but rounding: folded into norms and projections, but for the head, whose input is an output as well,
    and the talker's first product, whose input is the graph's."""
    bundle = Bundle.open(tiny_outlier_bundle)
    model = whole(bundle, graph, tmp_path)
    before = Counter(node.op_type for node in model.graph)
    choices = choose(find_recipe("int8"), {graph: find_weights(model)})[graph]
    factors = smoothing(calibration, graph, choices)
    assert len(factors) == len(choices)
    assert max(f.max() / f.min() for f in factors.values()) > 10

    def read(name: str) -> Array:
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        return tensor.numpy()

    smooth = SmoothPass(choices, factors, read)
    smooth(model)
    for name, found in smooth.factors.items():
        value = model.graph.initializers[name]
        array = read(name) * (1 if found.rows is None else found.rows[:, None])
        value.const_value = ir.tensor(array / (1 if found.columns is None else found.columns), name=name)
    after = Counter(node.op_type for node in model.graph)
    assert after - before == Counter({"Mul": muls})
    assert sum(found.columns is not None for found in smooth.factors.values()) == 8  # v_proj and up_proj of 4 layers
    got = logits(bundle, open_graph(model, bundle.manifest.graphs[graph], tmp_path, 1), graph)
    assert sqnr(got, logits_of(tiny_outlier_bundle, graph)) > 90


def whole(bundle: Bundle, graph: str, room: Path) -> ir.Model:
    """A graph with its weights in memory; of a copy, as onnx reads no file that has other hard links."""
    for file in (bundle.manifest.graphs[graph].file, *bundle.manifest.graphs[graph].data):
        shutil.copy(bundle.path(file), room)
    return ir.from_proto(onnx.load(room / f"{graph}.onnx"))


def test_query_heads_of_a_key_head_share_factors(
    tiny_outlier_bundle: Path, calibration: Calibration, tmp_path: Path
) -> None:
    model = whole(Bundle.open(tiny_outlier_bundle), "thinker", tmp_path)
    choices = choose(find_recipe("int8"), {"thinker": find_weights(model)})["thinker"]
    smooth = SmoothPass(choices, smoothing(calibration, "thinker", choices), lambda name: _array(model, name))
    smooth(model)
    geometry = Bundle.open(tiny_outlier_bundle).manifest.thinker
    rows = smooth.factors["model.layers.1.self_attn.o_proj.weight"].rows
    assert rows is not None
    heads = rows.reshape(geometry.num_kv_heads, -1, geometry.head_dim)
    assert heads.shape[1] > 1
    assert (heads == heads[:, :1]).all()
    columns = smooth.factors["model.layers.1.self_attn.v_proj.weight"].columns
    assert columns is not None
    np.testing.assert_array_equal(columns, heads[:, 0].reshape(-1))


def _array(model: ir.Model, name: str) -> Array:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


@pytest.mark.parametrize("graph", [*DECODERS, *PLAIN])
def test_onnx_runtime_multiplies_integers(graph: str, quantized: dict[str, Path], tmp_path: Path) -> None:
    path = quantized["int8"] / f"graphs/{graph}.onnx"
    made = onnx.load(path, load_external_data=False)
    products = sum(node.op_type == "MatMul" for node in made.graph.node)
    found = optimized(path, tmp_path)
    narrow = {"thinker": 5, "talker": 6}.get(graph, 0)  # four down_proj, the head, and the talker's first product
    assert found["MatMulIntegerToFloat"] == products - narrow > 10
    assert found["MatMulNBits"] == narrow
    assert found["DequantizeLinear"] == found["MatMul"] == 0


def test_onnx_runtime_convolves_integers(
    quantized: dict[str, Path], calibration: Calibration, tmp_path: Path, tiny_outlier_bundle: Path
) -> None:
    """Convolutions of the residual blocks, their biases floats in the file; the residual stream is not rounded."""
    made = onnx.load(quantized["int8"] / "graphs/bigvgan.onnx", load_external_data=False)
    values = {t.name: numpy_helper.to_array(t) for t in made.graph.initializer if not t.external_data}
    readers = {name: node for node in made.graph.node for name in node.input}
    rounded = 0
    for node in made.graph.node:
        after = readers.get(node.output[0])
        if ".convs" in node.name and after is not None and (node.op_type, after.op_type) == ("Conv", "QuantizeLinear"):
            weight = node.name.replace("/Conv", ".weight")
            site = calibration.site("bigvgan", weight, output=True)
            assert site is not None
            assert values[after.input[1]] == pytest.approx(site.record.clips["mse"] / 127, rel=1e-5)
            assert node.input[2] == weight.replace(".weight", ".bias")
            rounded += 1
    found = optimized(quantized["int8"] / "graphs/bigvgan.onnx", tmp_path)
    assert found["QLinearConv"] == found["QuantizeLinear"] == found["DequantizeLinear"] == rounded == 66
    plain = optimized(tiny_outlier_bundle / "graphs/bigvgan.onnx", tmp_path)
    assert found["Conv"] == plain["Conv"] - rounded
    assert found["Add"] == plain["Add"]


def test_a_report_sees_what_rounding_the_output_costs(
    quantized: dict[str, Path], tiny_outlier_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mel = 1.5 * np.random.default_rng(0).standard_normal((1, 80, 12), np.float32) - 5
    bundles = (Bundle.open(tiny_outlier_bundle), Bundle.open(quantized["int8"]))
    whole = layer_losses(*bundles, "bigvgan", Calls([{"mel": mel}]), 1)
    monkeypatch.setattr("omniport.calib.report.layer_loss._File.given", lambda _, output: output)
    raw = layer_losses(*bundles, "bigvgan", Calls([{"mel": mel}]), 1)
    assert len(whole) == len(raw) == 66
    assert all(row.scheme == "w8a8-out" for row in whole)
    assert whole[0].output_db is not None
    assert raw[0].output_db is not None
    assert 25 < whole[0].output_db < raw[0].output_db - 0.3


def optimized(path: Path, room: Path) -> Counter[str]:
    """Operators of a graph as ONNX Runtime runs it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(room / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(room / "optimized.onnx", load_external_data=False).graph.node)


def test_what_is_rounded_to_what(quantized: dict[str, Path], calibration: Calibration) -> None:
    """Scales of the graph are those of the calibration; zero points are zero."""
    made = onnx.load(quantized["int8"] / "graphs/dit.onnx")
    values = {t.name: numpy_helper.to_array(t) for t in made.graph.initializer}
    rounds = {node.output[0]: node for node in made.graph.node if node.op_type == "QuantizeLinear"}
    widens = {node.output[0]: node for node in made.graph.node if node.op_type == "DequantizeLinear"}
    seen = 0
    for node in made.graph.node:
        if node.op_type != "MatMul" or node.input[0] not in widens:
            continue
        other, weight = widens[node.input[0]], widens[node.input[1]]
        assert rounds[other.input[0]].input[1:] == other.input[1:]
        assert (values[other.input[2]].dtype, values[other.input[2]]) == (np.int8, 0)
        site = calibration.site("dit", weight.input[0].removesuffix(".integers"))
        assert site is not None
        assert values[other.input[1]] == pytest.approx(site.record.clips["mse"] / 127, rel=1e-5)
        seen += 1
    assert seen == len([n for n in made.graph.node if n.op_type == "MatMul"]) > 20


def test_products_of_a_half_bundle_share_what_they_round(
    tiny_half_bundles: dict[str, Path], tiny_bundle: Path, tmp_path: Path
) -> None:
    calibration = without_outputs(calibrate_bundle(tiny_bundle))
    quantize(tiny_half_bundles["fp16"], tmp_path / "out", "int8", calibration=calibration)
    made = onnx.load(tmp_path / "out/graphs/thinker.onnx", load_external_data=False)
    readers = Counter(name for node in made.graph.node if node.op_type == "MatMul" for name in node.input)
    shared = [node for node in made.graph.node if node.op_type == "DequantizeLinear" and readers[node.output[0]] == 3]
    assert len(shared) == 4  # q, k and v of 4 layers
    scales = {t.name: t.data_type for t in made.graph.initializer}
    assert {scales[node.input[1]] for node in shared} == {onnx.TensorProto.FLOAT16}
    record = Bundle.open(tmp_path / "out").manifest.quantization
    assert record is not None
    assert set(record.layers["bigvgan"].values()) == {"none", "w8a8"}
    made = onnx.load(tmp_path / "out/graphs/bigvgan.onnx", load_external_data=False)
    read = {name: node.op_type for node in made.graph.node for name in node.input}
    assert all(read[n.output[0]] != "QuantizeLinear" for n in made.graph.node if n.name.endswith("convs1.0/Conv"))


# what is stored


def test_factors_come_before_rounding(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    array = rng.standard_normal((64, 6)).astype(np.float32)
    rows, columns = (rng.uniform(0.1, 10, n).astype(np.float32) for n in (64, 6))
    (tmp_path / "w").write_bytes(array.tobytes())
    source = Stored("w", tmp_path / "w", 0, array.shape, array.dtype)
    for scheme in ("w8", "int4-32", "fp8"):
        choice = Choice(Weight("w", "matmul", "channels_last", array.shape), SCHEMES[scheme])
        ((numbers, scales),) = rounded_rows(choice, source, lambda _: None, Factors(rows, columns))
        assert scales is not None
        wide = numbers.astype(np.float32) * (np.repeat(scales, 32, 0) if scheme == "int4-32" else scales)
        wanted = array * rows[:, None] / columns
        least = {"w8": 40, "int4-32": 17, "fp8": 28}[scheme]
        assert least < sqnr(wide, wanted) < least + 12
    assert numbers.dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(np.abs(numbers.astype(np.float32)).max(axis=0), 448)


def test_the_bundle_says_by_which_calibration(
    quantized: dict[str, Path], tiny_outlier_bundle: Path, calibration: Calibration, tmp_path: Path
) -> None:
    records = {name: Bundle.open(root).manifest.quantization for name, root in quantized.items()}
    assert {name for name, record in records.items() if record is not None and not record.calibration} == {
        "w8-alone",
        "int4-alone",
    }
    precisions = {g: s.precision for g, s in Bundle.open(quantized["fp8"]).manifest.graphs.items()}
    assert set(precisions.values()) == {"fp8", "float32"}
    quantize(tiny_outlier_bundle, tmp_path / "again", "int8", calibration=calibration)
    assert (tmp_path / "again/bundle.json").read_bytes() == (quantized["int8"] / "bundle.json").read_bytes()


# what is refused


def without(calibration: Calibration, graph: str, change: Callable[[Site], Site | None]) -> Calibration:
    """The calibration with the first site of a graph changed or taken out."""
    first, *rest = calibration.graphs[graph]
    changed = change(first)
    sites = {**calibration.graphs, graph: (*([changed] if changed else []), *rest)}
    return Calibration(calibration.header, sites)


def without_outputs(calibration: Calibration) -> Calibration:
    """The calibration as an older release wrote it."""
    sites = {graph: tuple(site for site in row if not site.record.output) for graph, row in calibration.graphs.items()}
    return Calibration(calibration.header, sites)


def _drop(*names: str) -> Callable[[Site], Site]:
    return lambda site: replace(site, arrays={k: v for k, v in site.arrays.items() if k not in names})


CHANGES: Mapping[str, tuple[Callable[[Calibration], Calibration | None], str]] = {
    "none": (lambda _: None, "w8a8 of audio_encoder/.* needs a calibration.*--calib"),
    "other": (
        lambda c: Calibration(restruct(c.header, fingerprint="f" * 64), c.graphs),
        "calibration is of another checkpoint",
    ),
    "older": (without_outputs, "w8a8-out of bigvgan/resblocks.* older release.*--keep bigvgan/resblocks"),
    "site": (lambda c: without(c, "thinker", lambda _: None), "of thinker/.*q_proj.weight needs a range.*graph-recipe"),
    "factors": (lambda c: without(c, "thinker", _drop("smooth")), "smooth of .* was expected"),
    "width": (
        lambda c: without(
            c, "dit", lambda s: replace(s, arrays={k: v[:-1] for k, v in s.arrays.items() if k != "hist"} | {"hist": s})
        ),
        "absmax of .* was expected",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_calibrations_that_do_not_fit(
    what: str, calibration: Calibration, tiny_outlier_bundle: Path, tmp_path: Path
) -> None:
    change, words = CHANGES[what]
    with pytest.raises(UsageError, match=words):
        quantize(tiny_outlier_bundle, tmp_path / "out", "int8", calibration=change(calibration))
    assert list(tmp_path.iterdir()) == []


def test_the_command(
    tiny_outlier_bundle: Path, calibration: Calibration, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "it.calib").write_bytes(calibration.encode())
    (tmp_path / "bad.calib").write_bytes(b"no")
    command = ["quantize", str(tiny_outlier_bundle), str(tmp_path / "out"), "--recipe", "int8"]
    for more, code, words in (
        ([], 2, "needs a calibration"),
        (["--calib", str(tmp_path / "bad.calib")], 2, "cannot read the calibration"),
        (["--calib", str(tmp_path / "it.calib"), "--quiet"], 0, ""),
    ):
        with pytest.raises(SystemExit) as stopped:
            main.run([*command, *more])
        assert (stopped.value.code, words in " ".join(capsys.readouterr().err.split())) == (code, True)
        assert (tmp_path / "out").exists() == (code == 0)
    assert Bundle.open(tmp_path / "out", verify=True).manifest.precision == "int8"


# engines


def test_engines_of_integer_products(tiny_half_bundles: dict[str, Path], tiny_bundle: Path, tmp_path: Path) -> None:
    """Built, not run: the talker in INT8 for SM86 and in FP8 for SM89; SM86 has no FP8."""
    pytest.importorskip("tensorrt_rtx")
    calibration = calibrate_bundle(tiny_bundle, ("text",))
    for recipe, target in (("int8", "rtx-3090"), ("fp8", "rtx-4090")):
        quantize(
            tiny_half_bundles["fp16"],
            tmp_path / recipe,
            recipe,
            calibration=calibration,
            graph_recipes=dict.fromkeys(("audio_encoder", "vision_encoder"), "none"),
        )
        report = build_bundle(Bundle.open(tmp_path / recipe), TARGETS[target], graphs=["talker"])
        assert [row.built for row in report.graphs] == [True]
    with pytest.raises(BuildError, match=r"fp8"):
        build_bundle(Bundle.open(tmp_path / "fp8"), TARGETS["rtx-3090"], graphs=["talker"])
    shutil.rmtree(tmp_path / "fp8")
