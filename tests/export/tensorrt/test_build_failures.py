"""Graphs that must not become engines: each wrong graph is given to the real builder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from omniport.export.devices.catalog import TARGETS
from omniport.export.devices.detect import find_target
from omniport.export.tensorrt import engine_builder
from omniport.export.tensorrt.builder_api import Api, load_api
from omniport.export.tensorrt.engine_builder import build_engine
from omniport.export.tensorrt.network import check_unused
from omniport.export.tensorrt.profiles import Limits
from omniport.runtime.bundle.engines import Profile
from omniport.runtime.bundle.graph_spec import DimRange, GraphSpec
from omniport.runtime.errors import BackendError, BuildError, BundleError, UsageError
from onnx import TensorProto, helper
from support.onnx_graphs import cache_model, make_model, matmul, plain_model, spec, tensor, weight

from benchmarks.build_matrix import fp8_model

pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module")
def api() -> Api:
    return load_api("tensorrt-rtx")


def build(
    api: Api, folder: Path, model: onnx.ModelProto, made: GraphSpec, target: str = "rtx-4090", **options: Any
) -> Path:
    """Build and give the engine's path; whatever happens, nothing else is left in the folder."""
    path, out = folder / "graph.onnx", folder / "graph.engine"
    onnx.save(model, path)
    try:
        build_engine(api, path, made, find_target(target), out, **options)
    finally:
        assert {p.name for p in folder.iterdir()} <= {"graph.onnx", "graph.engine"}
    return out


def refused(api: Api, folder: Path, graph: tuple[onnx.ModelProto, GraphSpec], match: str, **options: Any) -> str:
    with pytest.raises(BuildError, match=match) as caught:
        build(api, folder, *graph, **options)
    assert not (folder / "graph.engine").exists()
    assert len(str(caught.value)) < 2000
    return str(caught.value)


def test_a_right_graph_builds(api: Api, tmp_path: Path) -> None:
    assert build(api, tmp_path, *plain_model()).stat().st_size > 256


def test_an_input_that_nothing_reads(api: Api, tmp_path: Path) -> None:
    inputs, outputs = (tensor("x", "batch", 8), tensor("lengths", "batch", dtype="int64")), (tensor("y", "batch", 8),)
    graph = make_model([matmul()], inputs, outputs, [weight()]), spec("dit", inputs, outputs)
    refused(api, tmp_path, graph, "dit: the builder leaves out lengths")


def test_an_input_that_only_the_parser_drops(api: Api, tmp_path: Path) -> None:
    """An optional input of an operator that TensorRT ignores with a warning: the cache's true length in Attention."""
    heads = [tensor(name, "batch", 2, 16, 8, dtype="float16") for name in ("q", "k", "v")]
    inputs, outputs = (
        (*heads, tensor("length", "batch", dtype="int64")),
        (tensor("y", "batch", 2, 16, 8, dtype="float16"),),
    )
    node = helper.make_node("Attention", ["q", "k", "v", "", "", "", "length"], ["y"], name="layers.0/Attention")
    graph = make_model([node], inputs, outputs), spec("dit", inputs, outputs)
    refused(api, tmp_path, graph, "dit: the builder leaves out length")


def test_either_sign_of_an_unused_input_is_enough(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the network shows, with the builder's messages unheard; and the messages alone."""
    inputs, outputs = (tensor("x", "batch", 8), tensor("other", "batch", 8)), (tensor("y", "batch", 8),)
    graph = make_model([matmul()], inputs, outputs, [weight()]), spec("dit", inputs, outputs)
    for module in ("network", "engine_builder"):
        monkeypatch.setattr(f"omniport.export.tensorrt.{module}.check_unused", lambda *_: None)
    refused(api, tmp_path, graph, "dit: the builder leaves out other")
    api.messages()
    for text in ("Unused Input: mask", "[RemoveDeadLayers] Input Tensor mask is unused or used only at compile-time"):
        with pytest.raises(BuildError, match="dit: the builder leaves out mask,"):
            check_unused("dit", [("WARNING", text)])
    check_unused("dit", [("WARNING", "Make sure input mask has Int64 binding.")])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_attention_in_every_precision(api: Api, tmp_path: Path, dtype: str) -> None:
    """FP32 has no fused kernel: it builds because attention may be taken apart."""
    heads = [tensor(name, "batch", 2, 16, 64, dtype=dtype) for name in ("q", "k", "v")]
    inputs, outputs = tuple(heads), (tensor("y", "batch", 2, 16, 64, dtype=dtype),)
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], name="layers.0/Attention")
    assert build(api, tmp_path, make_model([node], inputs, outputs), spec("dit", inputs, outputs)).exists()


def test_an_operator_that_no_parser_knows(api: Api, tmp_path: Path) -> None:
    inputs, outputs = (tensor("x", "batch", 8),), (tensor("y", "batch", 8),)
    nodes = [helper.make_node("Foo", ["x"], ["z"], name="layers.3/Foo"), matmul("z")]
    graph = make_model(nodes, inputs, outputs, [weight()]), spec("dit", inputs, outputs)
    refused(api, tmp_path, graph, r"newer tensorrt-rtx than .*Foo\. .*--ops decomposed --kv concat")


def test_a_node_that_does_not_parse_is_named_with_its_module(api: Api, tmp_path: Path) -> None:
    inputs, outputs = (tensor("x", "batch", 8),), (tensor("y", "batch", 8),)
    graph = make_model([matmul()], inputs, outputs, [weight(dtype=np.float16)]), spec("dit", inputs, outputs)
    text = refused(api, tmp_path, graph, r"dit: node 'layers\.0\.mlp/MatMul' \(MatMul\) cannot be parsed")
    assert "must have same input types" in text


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (tensor("y", "batch", 8, dtype="float16"), "output 'y' is FLOAT in the network; its spec says float16"),
        (tensor("y", "batch", 9), r"output 'y' has shape \[-1, 8\].*its spec says \['batch', 9\]"),
        (tensor("y", "batch", 1, 8), r"shape \[-1, 8\]"),
        (tensor("y", 4, 8), r"shape \[-1, 8\]"),
        (tensor("z", "batch", 8), "has the outputs y; its spec says z"),
    ],
    ids=["dtype", "width", "rank", "static", "name"],
)
def test_outputs_that_are_not_what_the_spec_says(api: Api, tmp_path: Path, made: Any, says: str) -> None:
    model, right = plain_model()
    wrong = spec("dit", right.inputs, (made,))
    refused(api, tmp_path, (model, wrong), says)


def test_an_output_of_one_size_where_the_spec_says_a_range(api: Api, tmp_path: Path) -> None:
    inputs, outputs = (tensor("x", 2, 8),), (tensor("y", 2, 8),)
    model = make_model([matmul()], inputs, outputs, [weight()])
    refused(api, tmp_path, (model, spec("dit", inputs, (tensor("y", "batch", 8),))), r"shape \[2, 8\]")
    one = {"batch": DimRange(2, 2, 2)}  # a range of one value is that value
    assert build(api, tmp_path, model, spec("dit", inputs, (tensor("y", "batch", 8),), one)).exists()


@pytest.mark.parametrize("change", ["dtype", "name"])
def test_inputs_that_are_not_what_the_spec_says(api: Api, tmp_path: Path, change: str) -> None:
    model, right = plain_model()
    wrong = tensor("x", "batch", 8, dtype="float16") if change == "dtype" else tensor("z", "batch", 8)
    says = "input 'x' is FLOAT" if change == "dtype" else "has the inputs x; its spec says z"
    refused(api, tmp_path, (model, spec("dit", (wrong,), right.outputs)), says)


def test_a_cache_that_is_updated_in_place(api: Api, tmp_path: Path) -> None:
    assert build(api, tmp_path, *cache_model()).exists()


@pytest.mark.parametrize("tail", ["Identity", "Neg"])
def test_a_cache_that_would_be_copied(api: Api, tmp_path: Path, tail: str) -> None:
    says = r"'present' would not share its buffer with 'past': no native cache update writes it.*--kv concat"
    refused(api, tmp_path, cache_model(tail), says)


def test_a_cache_that_is_made_by_concatenation(api: Api, tmp_path: Path) -> None:
    past, new = tensor("past", 1, 2, 64, 8, dtype="float16"), tensor("new", 1, 2, 4, 8, dtype="float16")
    present = tensor("present", 1, 2, 68, 8, dtype="float16")
    node = helper.make_node("Concat", ["past", "new"], ["present"], axis=2, name="layers.0/Concat")
    graph = make_model([node], (past, new), (present,))
    made = spec("thinker", (past, new), (present,), {}, {"present": "past"})
    refused(api, tmp_path, (graph, made), "no native cache update writes it")


def test_a_cache_that_updates_another_input(api: Api, tmp_path: Path) -> None:
    model, right = cache_model()
    other = tensor("other", "batch", 2, "capacity", 8, dtype="float16")
    kinds = {"float16": TensorProto.FLOAT16}
    model.graph.input.append(helper.make_tensor_value_info("other", kinds["float16"], other.shape))
    model.graph.node.append(helper.make_node("Neg", ["other"], ["negative"], name="layers.0/Neg"))
    model.graph.output.append(helper.make_tensor_value_info("negative", kinds["float16"], other.shape))
    outputs = (*right.outputs, tensor("negative", *other.shape, dtype="float16"))
    made = spec("thinker", (*right.inputs, other), outputs, right.dims, {"present": "other"})
    refused(api, tmp_path, (model, made), "with 'other': it updates past")


def test_the_capacity_of_a_cache_can_be_less_than_the_bundles(api: Api, tmp_path: Path) -> None:
    assert build(api, tmp_path, *cache_model(), limits=Limits(max_context=64)).exists()
    with pytest.raises(UsageError, match="--max-context 128: 64 to 64 was expected"):
        build(api, tmp_path, *cache_model(), limits=Limits(max_context=128))


def test_fp8_builds_where_there_is_fp8_and_is_refused_in_our_words_elsewhere(api: Api, tmp_path: Path) -> None:
    assert build(api, tmp_path, *fp8_model(), target="rtx-4090").unlink() is None
    says = r"dit uses fp8, which rtx-3090 \(SM86\) lacks.* it has fp32, fp16, bf16, int8, int4; compute capability 8\.9"
    text = refused(api, tmp_path, fp8_model(), says, target="rtx-3090")
    assert "sm86" not in text  # the compiler's own words
    api.messages()


@pytest.mark.parametrize(
    ("dtype", "target", "lacks"),
    [("bfloat16", "rtx-2080", "bf16"), ("float16", "rtx-2080", ""), ("bfloat16", "rtx-3090", "")],
)
def test_half_precisions(api: Api, tmp_path: Path, dtype: str, target: str, lacks: str) -> None:
    inputs, outputs = (tensor("x", "batch", 8, dtype=dtype),), (tensor("y", "batch", 8, dtype=dtype),)
    node = helper.make_node("Add", ["x", "x"], ["y"], name="layers.0/Add")
    graph = make_model([node], inputs, outputs), spec("dit", inputs, outputs)
    if lacks:
        refused(
            api, tmp_path, graph, rf"uses {lacks}, which {target} \(SM75\) lacks .*it has fp32, fp16;", target=target
        )
    else:
        assert build(api, tmp_path, *graph, target=target).exists()


def test_a_graph_that_needs_a_newer_tensorrt(tmp_path: Path, api: Api) -> None:
    old = Api("tensorrt-rtx", api.module)
    old.builder, old.version = "tensorrt", "10.3.0"
    says = r"thinker needs a newer tensorrt than 10\.3\.0.*TensorScatter \(10\.15\).*--ops decomposed --kv concat"
    refused(old, tmp_path, cache_model(), says)
    model, made = plain_model()
    refused(old, tmp_path, (model, made), r"dit needs a newer tensorrt than 10\.3\.0.*opset 24 \(10\.14\)")
    lowered = make_model([matmul()], made.inputs, made.outputs, [weight()], opset=18)
    assert build(old, tmp_path, lowered, made).exists()


def test_the_calls_of_older_packages_make_the_same_engine(tmp_path: Path, api: Api) -> None:
    """Weights read by the parser, and the engine in one block: what TensorRT before 10.13 has."""
    old = Api("tensorrt-rtx", api.module)
    old.features = dataclasses.replace(old.features, mapped_weights=False, streamed_engine=False, progress=False)
    (tmp_path / "new").mkdir()
    new = build(api, tmp_path / "new", *plain_model()).stat().st_size
    (tmp_path / "old").mkdir()
    assert build(old, tmp_path / "old", *plain_model()).stat().st_size == new


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TensorRT-RTX keeps these calls and does nothing in them
def test_kernel_timings_are_kept_between_builds(tmp_path: Path, api: Api) -> None:
    """The calls only: a builder that times kernels needs a GPU."""
    old = Api("tensorrt-rtx", api.module)
    old.features = dataclasses.replace(old.features, timing_cache=True)
    timings, work = tmp_path / "timings.cache", tmp_path / "work"
    work.mkdir()
    assert build(old, work, *plain_model(), timing_cache=timings).exists()
    kept = timings.read_bytes()
    assert kept
    assert build(old, work, *plain_model(), timing_cache=timings).exists()
    assert {path.name for path in tmp_path.iterdir()} == {"timings.cache", "work"}


def test_builder_errors_are_told(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's refusal, if a graph gets that far: FP8 for a GPU without it, our own check switched off."""
    monkeypatch.setattr("omniport.export.tensorrt.engine_builder.check_precision", lambda *_: None)
    refused(api, tmp_path, fp8_model(), r"dit: the builder failed: .*sm86.*\(tensorrt-rtx", target="rtx-3090")


@pytest.mark.parametrize("location", ["/etc/passwd", "../weights", "sub/weights", ".."])
def test_weights_are_beside_the_graph_and_nowhere_else(api: Api, tmp_path: Path, location: str) -> None:
    model, made = plain_model()
    (moved,) = model.graph.initializer
    moved.ClearField("raw_data")
    moved.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "256")):
        entry = moved.external_data.add()
        entry.key, entry.value = key, value
    path = tmp_path / "graph.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match="a file beside the graph was expected"):
        build_engine(api, path, made, TARGETS["rtx-4090"], tmp_path / "out")


def test_weights_that_are_cut_off(api: Api, tmp_path: Path) -> None:
    model, made = plain_model()
    path = tmp_path / "graph.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.data", size_threshold=0)
    data = tmp_path / "w.data"
    build_engine(api, path, made, TARGETS["rtx-4090"], tmp_path / "out")
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"w\.data, which is shorter"):
        build_engine(api, path, made, TARGETS["rtx-4090"], tmp_path / "out")
    path.write_bytes(b"\x00garbage")
    with pytest.raises(BundleError, match="not a readable ONNX file"):
        build_engine(api, path, made, TARGETS["rtx-4090"], tmp_path / "out")


# how builders are set up, and calls of theirs whose result tells of failure


@pytest.mark.parametrize(
    ("dtype", "tf32", "target", "allowed"),
    [
        ("float32", False, "rtx-4090", False),
        ("float32", True, "rtx-4090", True),
        ("float16", False, "rtx-4090", True),
        ("float32", False, "dgx-spark", False),
    ],
)
def test_tf32_is_off_for_float32_and_workspace_is_limited_where_memory_is_shared(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, tf32: bool, target: str, allowed: bool
) -> None:
    seen = []

    def compile_nothing(api: Api, parsed: Any, config: Any, out: Path, step: Any) -> None:
        limit = config.get_memory_pool_limit(api.module.MemoryPoolType.WORKSPACE)
        seen.append((config.get_flag(api.module.BuilderFlag.TF32), limit))

    monkeypatch.setattr(engine_builder, "_compile", compile_nothing)
    inputs, outputs = (tensor("x", "batch", 8, dtype=dtype),), (tensor("y", "batch", 8, dtype=dtype),)
    made = spec("dit", inputs, outputs)
    made = msgspec.structs.replace(made, precision=dtype)
    build(
        api,
        tmp_path,
        make_model([matmul()], inputs, outputs, [weight(dtype=np.dtype(dtype).type)]),
        made,
        target,
        tf32=tf32,
    )
    ((flag, limit),) = seen
    assert flag is allowed
    memory = TARGETS[target].memory_bytes
    assert (limit == memory // 8) is TARGETS[target].unified
    assert TARGETS["jetson-orin-nano-8gb"].unified


def test_results_that_tell_of_failure(api: Api, tmp_path: Path) -> None:
    taken: list[bytes] = []
    config = SimpleNamespace(
        num_compute_capabilities=0,
        set_compute_capability=lambda *_: False,
        set_flag=lambda _: None,
        add_optimization_profile=lambda _: -1,
        create_timing_cache=lambda held: held,
        set_timing_cache=lambda held, _: taken.append(held) or held == b"",
        set_memory_pool_limit=lambda *_: None,
        get_memory_pool_limit=lambda _: 1 << 40,
    )
    with pytest.raises(BackendError, match="does not take SM89"):
        api.set_capability(config, "8.9")
    with pytest.raises(BackendError, match="takes no workspace limit of 1,000 bytes"):
        api.limit_workspace(config, 1000)
    builder = SimpleNamespace(create_builder_config=lambda: config, create_optimization_profile=lambda: object())
    parsed: Any = SimpleNamespace(graph="dit", builder=builder, inputs=dict)
    with pytest.raises(BuildError, match="dit: tensorrt-rtx does not take profile 0"):
        engine_builder._configure(api, parsed, (Profile(name="all", dims={}, inputs={}),), None)
    timings = tmp_path / "timings"
    timings.write_bytes(b"another GPU's")
    measuring: Any = SimpleNamespace(
        features=dataclasses.replace(api.features, timing_cache=True),
        given=api.given,
        messages=api.messages,
        require_user_allocation=lambda *_: None,
    )
    engine_builder._configure(measuring, parsed, (), timings)
    assert taken == [b"another GPU's", b""]  # what does not fit is left, and timings are measured again
    builder.create_builder_config = lambda: None
    with pytest.raises(BackendError, match="gives no configuration"):
        engine_builder._configure(api, parsed, (), None)
