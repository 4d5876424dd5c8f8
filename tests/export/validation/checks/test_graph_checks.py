"""Checks of graphs, KV cache and layers: clean bundles pass in every precision, every check finds a planted fault."""

from __future__ import annotations

import errno
import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from omniport.export.evaluation.half_emulation import EmulatedBackend, EmulateHalfPass
from omniport.export.evaluation.metrics import compare
from omniport.export.models.signals import picture, voice
from omniport.export.validation.checks import decoding as decode_module
from omniport.export.validation.checks.decoding import decode_checks
from omniport.export.validation.checks.graphs import graph_checks
from omniport.export.validation.checks.layer_trace import trace_layers
from omniport.export.validation.comparison import array_check
from omniport.export.validation.reference import Reference
from omniport.export.validation.types import FAIL, NOT_RUN, PASS, Check
from omniport.runtime.backends import open_backend
from omniport.runtime.backends.base import Backend, Graph
from omniport.runtime.backends.onnxruntime.backend import OrtGraph
from omniport.runtime.backends.onnxruntime.kv_cache import OrtCache
from omniport.runtime.bundle.manifest import FileRecord
from omniport.runtime.bundle.parts import PARTS
from omniport.runtime.bundle.reader import Bundle, read_manifest
from omniport.runtime.errors import BackendError, BundleError, UsageError
from omniport.runtime.generation.decoder import Decoder
from omniport.runtime.system.files import cache_folder
from onnx import TensorProto, helper, numpy_helper
from support.comparison import assert_all_pass, context_of
from torch import nn

HALF_GRAPHS = ("thinker", "audio_encoder")
COPIED = "in-place optimization not activated"
Change = Callable[[onnx.GraphProto, Path], None]


def failed(checks: Sequence[Check]) -> list[str]:
    return [f"{check.stage}: {check.name}" for check in checks if check.status == FAIL]


def planted(bundle: Path, out: Path, graph: str, change: Change) -> Path:
    """A copy of the bundle with one graph changed; bundle.json lists the changed files as if they were right."""
    shutil.copytree(bundle, out)
    path = out / "graphs" / f"{graph}.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model.graph, path.parent)
    path.write_bytes(model.SerializeToString())
    manifest = read_manifest(out)
    spec = manifest.graphs[graph]
    changed = {name: (out / name).read_bytes() for name in (spec.file, *spec.data)}
    records = {n: FileRecord(size=len(c), sha256=hashlib.sha256(c).hexdigest()) for n, c in changed.items()}
    manifest = msgspec.structs.replace(manifest, files=manifest.files | records)
    (out / "bundle.json").write_bytes(msgspec.json.encode(manifest))
    return out


def edit_weight(
    graph: onnx.GraphProto, folder: Path, name: str, change: Callable[[NDArray[Any]], NDArray[Any]]
) -> None:
    """Change one weight's values in the data file."""
    tensor = next(t for t in graph.initializer if t.name == name)
    where = {entry.key: entry.value for entry in tensor.external_data}
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    with (folder / where["location"]).open("r+b") as file:
        file.seek(int(where["offset"]))
        array = np.frombuffer(file.read(int(where["length"])), dtype).reshape(tensor.dims)
        changed = np.ascontiguousarray(change(array), dtype)
        assert changed.shape == array.shape
        assert not np.array_equal(changed, array)
        file.seek(int(where["offset"]))
        file.write(changed.tobytes())


def reverse(name: str) -> Change:
    """The weight's rows in reverse order."""
    return lambda graph, folder: edit_weight(graph, folder, name, lambda w: w[::-1])


# clean bundles


def test_every_graph_passes(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    lines: list[str] = []
    context = context_of(tiny_bundle, tiny_checkpoint)
    context.progress = lines.append
    checks = list(graph_checks(context))
    assert_all_pass(checks)
    for graph in PARTS:
        mine = [check for check in checks if check.stage == graph]
        assert len(mine) >= 4, graph
        assert any(check.name in line for line in lines for check in mine)
    for check in checks:
        assert ("kl" in check.limits) == check.name.endswith("logits")


def test_the_reference_is_loaded_once(
    tiny_bundle: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results come from the cache the second time: the part is not even loaded."""
    assert_all_pass(list(graph_checks(context_of(tiny_bundle, tiny_checkpoint, ("bigvgan",)))))
    monkeypatch.setattr(Reference, "part", lambda self, graph: pytest.fail(f"{graph} was loaded again"))
    assert_all_pass(list(graph_checks(context_of(tiny_bundle, tiny_checkpoint, ("bigvgan",)))))


@pytest.mark.parametrize("graph", ["thinker", "talker"])
def test_the_cache_passes(graph: str, tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    checks = list(decode_checks(context_of(tiny_bundle, tiny_checkpoint, (graph,))))
    assert_all_pass(checks)
    names = "\n".join(check.name for check in checks)
    for way in ("in one piece", "in chunks", "token by token", "two turns", "cut back"):
        assert f"{way}" in names
    assert names.count("against one piece") == names.count("against reference") - 1
    assert all(("hidden_rel_rms" in check.figures) == (graph == "thinker") for check in checks)


@pytest.mark.parametrize("graph", ["thinker", "talker"])
def test_every_layer_passes(graph: str, tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    context = context_of(tiny_bundle, tiny_checkpoint)
    checks = list(trace_layers(context, graph))
    assert_all_pass(checks)
    geometry = context.bundle.manifest.thinker if graph == "thinker" else context.bundle.manifest.talker
    assert geometry is not None
    layers = [f"layer {i}, hidden state" for i in range(geometry.num_layers)]
    ends = (["final norm, hidden state"], []) if graph == "thinker" else ([], ["projection, hidden state"])
    assert [check.name for check in checks] == [*ends[1], *layers, *ends[0]]


def test_tracing_needs_a_decoder(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="thinker and talker"):
        list(trace_layers(context_of(tiny_bundle, tiny_checkpoint, ("dit",))))


def test_real_inputs_are_signals() -> None:
    sound, image = voice(1.0), picture(120, 160)
    assert sound.shape == (16000,)
    assert 0.05 < float(sound.std()) < 0.5
    assert image.shape == (120, 160, 3)
    assert float(image.std()) > 30


# half precision


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_passes(
    precision: str, tiny_half_bundles: dict[str, Path], tiny_checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    context = context_of(tiny_half_bundles[precision], tiny_checkpoint, HALF_GRAPHS)
    checks = [*graph_checks(context), *decode_checks(context)]
    trace = list(trace_layers(context))
    assert_all_pass(checks)
    assert_all_pass(trace)
    assert {check.stage for check in checks} == set(HALF_GRAPHS)
    rounded = [check for check in checks if "rounded to FP16" in check.name]
    assert len(rounded) == (len(HALF_GRAPHS) if precision == "fp16" else 0)
    unrounded = [check for check in checks if check.name.endswith("without roundings")]
    weights = [check for check in checks if check.name.startswith("weights in")]
    assert {check.stage for check in unrounded} == {check.stage for check in weights} == set(HALF_GRAPHS)
    rest = [check for check in checks if check not in (*unrounded, *weights)]
    errors = [float(check.figures["rel_rms"] or 0) for check in rest if not check.name.endswith("against one piece")]
    assert min(errors) > 1e-4, "this is not half precision"
    assert max(float(check.figures["rel_rms"] or 0) for check in unrounded) < 1e-5, "these are rounded"
    assert COPIED not in capfd.readouterr().err


def test_emulation_is_bfloat16(tiny_half_bundles: dict[str, Path], tiny_bundle: Path) -> None:
    """The cache holds BF16 values only; the states, of a float32 norm, are near the float32 graph's; emulated graphs
    are named."""
    opened = Bundle.open(tiny_half_bundles["bf16"])
    with pytest.raises(BackendError, match="bfloat16"):
        open_backend("ort-cpu", opened)
    emulated = EmulatedBackend(opened, threads=1)
    assert set(emulated.emulated) == set(PARTS) - {"dit", "bigvgan"}
    rng = np.random.default_rng(0)
    width = opened.manifest.thinker.embedding_size
    feeds: dict[str, NDArray[Any]] = {
        "inputs_embeds": rng.standard_normal((1, 5, width), np.float32),
        "position_ids": np.tile(np.arange(5), (3, 1, 1)),
        "kv_positions": np.arange(5),
        "write_index": np.zeros(1, np.int64),
    }
    graph = emulated.graph("thinker")
    cache = graph.new_cache(4096)
    hidden = graph.run(feeds, cache)["hidden"]
    assert isinstance(cache, OrtCache)
    written = np.concatenate([value.numpy()[:, :, :5].ravel() for value in cache.values.values()])
    assert float(np.std(written)) > 0.1
    np.testing.assert_array_equal(written.astype(ml_dtypes.bfloat16).astype(np.float32), written)
    assert float(np.std(hidden)) > 0.1
    plain = open_backend("ort-cpu", Bundle.open(tiny_bundle), threads=1).graph("thinker")
    exact = plain.run(feeds, plain.new_cache(4096))["hidden"]
    assert 1e-3 < float(np.linalg.norm(hidden - exact) / np.linalg.norm(exact)) < 5e-2


@pytest.mark.parametrize(
    ("kind", "numpy_type"), [("BFLOAT16", ml_dtypes.bfloat16), ("FLOAT16", np.float16)], ids=["bf16", "fp16"]
)
def test_emulation_rounds_every_operator(kind: str, numpy_type: Any) -> None:
    """A hand-made graph: cast, constant, sum, product, matrix product, a transpose that must not be rounded again."""
    import onnxruntime

    code = getattr(TensorProto, kind)
    weight = np.random.default_rng(1).standard_normal((6, 4)).astype(numpy_type)
    shift = np.asarray(0.3, numpy_type)
    node = helper.make_node
    nodes = [
        node("Cast", ["x"], ["half"], to=code),
        node("Constant", [], ["shift"], value=numpy_helper.from_array(shift)),
        node("Add", ["half", "shift"], ["sum"]),
        node("Mul", ["sum", "sum"], ["square"]),
        node("MatMul", ["square", "weight"], ["product"]),
        node("Transpose", ["product"], ["turned"], perm=[1, 0]),
        node("Cast", ["turned"], ["y"], to=TensorProto.FLOAT),
    ]
    borders = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [5, 6]), ("y", [4, 5]))]
    graph = helper.make_graph(nodes, "g", borders[:1], borders[1:], [numpy_helper.from_array(weight, "weight")])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    EmulateHalfPass(getattr(ir.DataType, kind))(model)
    onnx.checker.check_model(ir.to_proto(model))
    rounds = [n for n in model.graph if n.op_type == "Cast" and (n.name or "").endswith("/round")]
    assert len(rounds) == 4
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(2).standard_normal((5, 6)).astype(np.float32)
    (got,) = session.run(None, {"x": x})

    def half(array: NDArray[Any]) -> NDArray[np.float32]:
        return np.asarray(array, np.float32).astype(numpy_type).astype(np.float32)

    total = half(half(x) + half(shift))
    wanted = half(half(total * total) @ half(weight)).T
    assert float(np.abs(wanted).max()) > 0.5
    np.testing.assert_allclose(got, wanted, rtol=2 * float(ml_dtypes.finfo(numpy_type).eps), atol=1e-6)
    np.testing.assert_array_equal(half(got), got)


def test_fp16_overflow_is_found(tiny_half_bundles: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path) -> None:
    """One layer's up projection is scaled until its product overflows, its down projection scaled back."""

    def overflow(graph: onnx.GraphProto, folder: Path) -> None:
        edit_weight(graph, folder, "model.layers.1.mlp.up_proj.weight", lambda w: w * np.float16(2.0**15))
        edit_weight(graph, folder, "model.layers.1.mlp.down_proj.weight", lambda w: w * np.float16(2.0**-10))

    bundle = planted(tiny_half_bundles["fp16"], tmp_path / "bundle", "thinker", overflow)
    found = failed(list(graph_checks(context_of(bundle, tiny_checkpoint, ("thinker",)))))
    assert "thinker: multimodal prompt, logits, rounded to FP16 after every operation" in found


# planted faults


@pytest.mark.parametrize("graph", PARTS)
def test_a_changed_weight_is_found(graph: str, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A square weight is transposed: every shape still fits. The talker has none: rows in reverse order."""

    def change(proto: onnx.GraphProto, folder: Path) -> None:
        stored = [t for t in proto.initializer if len(t.dims) >= 2 and t.external_data]
        # with a single token the query has no say
        square = [t.name for t in stored if t.dims[0] == t.dims[1] and "q_proj" not in t.name]
        name = square[0] if square else next(t.name for t in stored if "o_proj" in t.name)
        assert square or graph == "talker"
        edit_weight(proto, folder, name, lambda w: np.swapaxes(w, 0, 1) if square else w[::-1])

    bundle = planted(tiny_bundle, tmp_path / "bundle", graph, change)
    other = "dit" if graph == "bigvgan" else "bigvgan"
    checks = list(graph_checks(context_of(bundle, tiny_checkpoint, (graph, other))))
    assert {check.stage for check in checks if check.status == PASS} == {other}
    assert {check.stage for check in checks if check.status == FAIL} == {graph}
    assert all("furthest off at" in check.message for check in checks if check.status == FAIL)


def test_weights_swapped_between_layers_are_found(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    def swap(graph: onnx.GraphProto, folder: Path) -> None:
        for node in graph.node:
            for i, name in enumerate(node.input):
                if name in ("layers.0.fc1.weight", "layers.1.fc1.weight"):
                    node.input[i] = name.replace("0", "x").replace("1.fc", "0.fc").replace("x", "1")

    bundle = planted(tiny_bundle, tmp_path / "bundle", "audio_encoder", swap)
    checks = list(graph_checks(context_of(bundle, tiny_checkpoint, ("audio_encoder",))))
    assert len(failed(checks)) == len(checks)


def shift_writes(graph: onnx.GraphProto, only_later: bool) -> None:
    """KV written one slot off: always, or only if the cache holds something already."""
    one = numpy_helper.from_array(np.ones(1, np.int64), "planted/one")
    graph.initializer.append(one)
    if only_later:
        step = helper.make_node("Min", ["write_index", "planted/one"], ["planted/step"])
    else:
        step = helper.make_node("Identity", ["planted/one"], ["planted/step"])
    nodes = [step, helper.make_node("Add", ["write_index", "planted/step"], ["planted/index"])]
    for node in graph.node:
        if node.op_type == "TensorScatter":
            node.input[2] = "planted/index"
    for node in reversed(nodes):
        graph.node.insert(0, node)


@pytest.mark.parametrize("graph", ["thinker", "talker"])
@pytest.mark.parametrize("only_later", [False, True])
def test_kv_written_one_slot_off_is_found(
    graph: str, only_later: bool, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = planted(tiny_bundle, tmp_path / "bundle", graph, lambda g, _: shift_writes(g, only_later))
    context = context_of(bundle, tiny_checkpoint, (graph,))
    checks = list(decode_checks(context))
    status = {check.name: check.status for check in checks}
    assert {check.stage for check in checks} == {graph}
    assert status["token by token, against reference"] == FAIL
    assert status["two turns on one cache, against reference"] == FAIL
    assert status["cut back, then rewritten in one piece, against reference"] == FAIL
    assert status["in one piece, against reference"] == (PASS if only_later else FAIL)
    if only_later:  # what a check of prefill alone does not see
        assert not failed(list(graph_checks(context)))
        assert status["token by token, against one piece"] == FAIL


def test_a_runtime_that_skips_a_slot_is_found(
    tiny_bundle: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Skipping(Decoder):
        def forward(self, embeds: Any, positions: Any) -> Any:
            self.length += self.length > 0
            result = super().forward(embeds, positions)
            self.length -= self.length > len(embeds)
            return result

    monkeypatch.setattr(decode_module, "Decoder", Skipping)
    found = failed(list(decode_checks(context_of(tiny_bundle, tiny_checkpoint, ("thinker",)))))
    assert "thinker: two turns on one cache, against reference" in found
    assert "thinker: two turns on one cache, against one piece" in found
    assert "thinker: in one piece, against reference" not in found


@pytest.mark.parametrize(("graph", "layer"), [("thinker", 2), ("talker", 1)])
def test_the_first_wrong_layer_is_named(
    graph: str, layer: int, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    fault = reverse(f"model.layers.{layer}.self_attn.o_proj.weight")
    bundle = planted(tiny_bundle, tmp_path / "bundle", graph, fault)
    checks = {c.name.partition(",")[0]: c for c in trace_layers(context_of(bundle, tiny_checkpoint, (graph,)))}
    for i in range(layer):
        assert checks[f"layer {i}"].status == PASS
    assert checks[f"layer {layer}"].status == FAIL
    assert f"layer {layer} is the first out of tolerance" in checks[f"layer {layer}"].message
    assert f"follows layer {layer}" in checks[f"layer {layer + 1}"].message
    assert checks[f"layer {layer + 1}"].status == FAIL


# what proves nothing never passes


class Fake(Backend, Graph):
    """A graph or backend that gives what it is told to."""

    name = "fake"

    def __init__(self, output: Callable[[Mapping[str, NDArray[Any]]], dict[str, NDArray[np.float32]]]) -> None:
        self.output = output

    def graph(self, name: str) -> Graph:
        return self

    def run(
        self, feeds: Mapping[str, NDArray[Any]], cache: Any = None, handle: Any = None
    ) -> dict[str, NDArray[np.float32]]:
        return self.output(feeds)

    def new_cache(self, capacity: int) -> Any:
        return None

    def close(self) -> None: ...


def silence(feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    return {"wav": np.zeros((1, 240 * feeds["mel"].shape[2]), np.float32)}


@pytest.mark.parametrize("level", [0.0, 0.25])
def test_a_silent_or_constant_reference_fails(
    level: float, tiny_bundle: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides agree to the last bit, and nothing is proven."""

    def result(
        self: Reference, graph: str, case: str, run: Callable[[nn.Module], Mapping[str, torch.Tensor]]
    ) -> dict[str, NDArray[np.float32]]:
        frames = int(case.split()[0])
        return {"out": np.full((1, 240 * frames), level, np.float32)}

    monkeypatch.setattr(Reference, "result", result)
    backend = Fake(lambda feeds: {"wav": silence(feeds)["wav"] + np.float32(level)})
    checks = list(graph_checks(context_of(tiny_bundle, tiny_checkpoint, ("bigvgan",), backend)))
    assert len(checks) >= 4
    for check in checks:
        assert check.status == FAIL
        assert check.figures["max_abs"] == 0
        assert ("silent" if level == 0 else "constant") in check.message


def test_a_saturated_reference_fails() -> None:
    """A clipped square wave has energy and varies, and so has the same square wave from a broken vocoder."""
    square = np.sign(np.sin(np.arange(480) / 9 + 0.5)).astype(np.float32)
    check = array_check("bigvgan", "square", square, square, "float32")
    assert check.status == FAIL
    assert "100% of the reference is at its largest value" in check.message
    soft = np.clip(1.2 * np.sin(np.arange(480) / 9), -1, 1).astype(np.float32)
    assert array_check("bigvgan", "soft", soft, soft, "float32").status == PASS


def test_logits_that_are_alike_hide_nothing() -> None:
    """Ids that a trained talker never says share a row of its head: most logits are then one large number."""
    rng = np.random.default_rng(0)
    wanted = np.concatenate([rng.normal(0, 2, (3, 100)), np.full((3, 900), -12.0)], axis=1).astype(np.float32)
    assert array_check("talker", "alike", wanted, wanted, logits=True).status == PASS
    got = wanted.copy()
    got[:, :100] *= np.float32(1 + 3e-4)
    check = array_check("talker", "alike", got, wanted, logits=True)
    assert check.status == FAIL
    error = check.figures["rel_rms"]
    assert isinstance(error, float)
    assert error == pytest.approx(2.6e-4, rel=0.1)
    assert compare(got, wanted)["rel_rms"] == pytest.approx(1.7e-5, rel=0.2), "far under the limit"
    got = wanted.copy()
    got[:, 500:] += np.float32(0.1)
    assert array_check("talker", "alike", got, wanted, logits=True).status == FAIL
    flat = np.full((3, 1000), -12.0, np.float32)
    assert "constant" in array_check("talker", "flat", flat, flat, logits=True).message


def test_a_silent_graph_fails(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    checks = list(graph_checks(context_of(tiny_bundle, tiny_checkpoint, ("bigvgan",), Fake(silence))))
    assert checks
    assert {check.status for check in checks} == {FAIL}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_fail(value: float) -> None:
    wanted = np.random.default_rng(0).standard_normal((3, 7)).astype(np.float32)
    got = wanted.copy()
    got[1, 2] = value
    for logits in (False, True):
        check = array_check("thinker", "logits", got, wanted, "float32", logits=logits)
        assert check.status == FAIL
        assert "not finite" in check.message
        assert "first at [1, 2]" in check.message
    broken = array_check("thinker", "logits", wanted, got, "float32")
    assert broken.status == FAIL
    assert array_check("thinker", "logits", wanted[:2], wanted, "float32").status == FAIL


class Refusing(Fake):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def graph(self, name: str) -> Graph:
        raise self.error


def test_what_cannot_run_is_not_run(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    groups = (graph_checks, decode_checks)
    for error, status in ((BackendError("no such device"), NOT_RUN), (BundleError("foreign operators"), FAIL)):
        context = context_of(tiny_bundle, tiny_checkpoint, ("talker",), Refusing(error))
        checks = [check for group in groups for check in group(context)]
        assert [check.status for check in checks] == [status] * 2
        assert all(str(error) in check.message for check in checks)


def test_a_graph_that_fails_while_running_fails(
    tiny_bundle: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: OrtGraph, *call: object) -> Any:
        raise BackendError("shapes do not fit")

    monkeypatch.setattr(OrtGraph, "run", refuse)
    context = context_of(tiny_bundle, tiny_checkpoint, ("thinker",))
    checks = [*graph_checks(context), *decode_checks(context), *trace_layers(context)]
    assert checks
    assert all("shapes do not fit" in check.message for check in checks)
    assert {check.status for check in checks[:-1]} == {FAIL}


def test_without_room_for_the_copy_the_other_checks_run(
    tiny_half_bundles: dict[str, Path], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("omniport.export.evaluation.unrounded_graph._Weights.put", full)
    checks = list(graph_checks(context_of(tiny_half_bundles["fp16"], tiny_checkpoint, ("audio_encoder",))))
    (missing,) = (check for check in checks if check.status == NOT_RUN)
    assert missing.name == "without roundings"
    assert "No space left" in missing.message
    assert [check.status for check in checks if check is not missing] == [PASS] * (len(checks) - 1)
    assert len(checks) > 3
    cache = cache_folder()
    assert cache is not None
    assert not list(cache.glob("unrounded-*"))
