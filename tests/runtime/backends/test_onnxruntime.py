"""The ONNX Runtime backend on small hand-made graphs: the cache stays in place, and harmful files are refused."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from omniport.runtime.backends import BACKENDS, open_backend
from omniport.runtime.backends.base import Graph
from omniport.runtime.backends.onnxruntime import backend as ort
from omniport.runtime.backends.onnxruntime.backend import OrtBackend
from omniport.runtime.backends.onnxruntime.kv_cache import OrtCache, StaticCache
from omniport.runtime.backends.onnxruntime.providers import (
    PLUGIN,
    PROVIDERS,
    host_nodes,
    plugin_devices,
    record_placement,
    warn_of_host_nodes,
)
from omniport.runtime.bundle.onnx_scan import scan_onnx
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import BackendError, BundleError
from onnx import TensorProto, helper, numpy_helper
from support.bundles import make_bundle
from support.cached_decoder import (
    CAPACITY,
    HEADS,
    VOCABULARY,
    WIDTH,
    bundle_with,
    decoder_model,
    decoder_spec,
    feed,
    rows,
)

COPIED = "in-place optimization not activated"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return bundle_with(tmp_path / "b")


@pytest.fixture
def graph(bundle: Bundle) -> Graph:
    return open_backend("ort-cpu", bundle).graph("thinker")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("external", [None, "thinker.data"], ids=["inline", "external"])
def test_cache_is_updated_in_place(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], dtype: str, external: str | None
) -> None:
    bundle = bundle_with(tmp_path / "b", decoder_model(dtype), decoder_spec(dtype), external)
    graph = open_backend("ort-cpu", bundle).graph("thinker")
    cache = graph.new_cache(CAPACITY)
    assert isinstance(cache, OrtCache)
    memory = cache.values["past_key_0"]
    address = memory.data_ptr()
    size = np.dtype(dtype).itemsize
    assert (cache.capacity, cache.nbytes) == (CAPACITY, HEADS * CAPACITY * WIDTH * size)
    embeds, start = rows(9), 0
    head = np.random.default_rng(0).standard_normal((WIDTH, VOCABULARY)).astype(np.float32)
    stored = embeds.reshape(9, HEADS, WIDTH).transpose(1, 0, 2).astype(dtype)
    for count in (5, 1, 3):
        outputs = graph.run(feed(embeds[start : start + count], start), cache)
        start += count
        assert outputs.keys() == {"logits"}
        assert outputs["logits"].dtype == np.float32
        expected = stored[:, :start].astype(np.float32).sum(axis=(0, 1)) @ head
        np.testing.assert_allclose(outputs["logits"][0], expected, atol=1e-4)
        held = memory.numpy()
        assert memory.data_ptr() == address
        np.testing.assert_array_equal(held[0, :, :start], stored[:, :start])
        assert not held[0, :, start:].any()
    assert COPIED not in capfd.readouterr().err


def test_a_copy_of_the_cache_shows_on_stderr(graph: Graph, capfd: pytest.CaptureFixture[str]) -> None:
    # The check above rests on this warning: it must come when the graph does force a copy.
    cache = graph.new_cache(CAPACITY)
    assert isinstance(cache, StaticCache)
    other = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((1, HEADS, CAPACITY, WIDTH), np.float32))
    cache.binding.bind_ortvalue_output("present_key_0", other)
    graph.run(feed(rows(2), 0), cache)
    assert COPIED in capfd.readouterr().err


def test_graphs_are_kept_and_closing_ends_that(bundle: Bundle) -> None:
    backend = open_backend("auto", bundle, threads=1)
    assert backend.name in ("ort-cpu", "ort-cuda")
    assert backend.graph("thinker") is backend.graph("thinker")
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.graph("thinker")


def test_runs_at_once_are_what_the_cores_have_room_for(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "physical_cores", lambda: 8)
    room = {threads: OrtBackend(bundle, threads=threads).at_once() for threads in (None, 8, 4, 3, 1, 16)}
    assert room == {None: 1, 8: 1, 4: 2, 3: 2, 1: 8, 16: 1}
    device = OrtBackend(bundle)
    device._device = "cuda"
    assert device.at_once() is None


# --- what is refused ----------------------------------------------------------------------------------------------


def test_unknown_names_are_listed(bundle: Bundle) -> None:
    with pytest.raises(
        BackendError, match=r"'tpu'.*auto, ort-cpu, ort-cuda, ort-tensorrt-rtx, openvino, tensorrt, tensorrt-rtx"
    ):
        open_backend("tpu", bundle)
    assert "ort-tensorrt-rtx" in BACKENDS


def test_the_plugin_says_what_is_missing(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PLUGIN, None)
    with pytest.raises(BackendError, match="pip install onnxruntime-ep-nv-tensorrt-rtx"):
        open_backend("ort-tensorrt-rtx", bundle)
    files = SimpleNamespace(
        get_ep_name=lambda: PROVIDERS["tensorrt-rtx"], get_library_path=lambda: str(tmp_path / "no.so")
    )
    monkeypatch.setitem(sys.modules, PLUGIN, files)
    with pytest.raises(BackendError, match=r"cannot load the TensorRT-RTX plugin: .*no\.so"):
        open_backend("ort-tensorrt-rtx", bundle)
    empty = SimpleNamespace(get_ep_devices=list, register_execution_provider_library=lambda name, path: None)
    with pytest.raises(BackendError, match="finds no GPU"):
        plugin_devices(empty)


def test_work_on_the_host_is_named(bundle: Bundle) -> None:
    """A session on the CPU, asked as one on a GPU would be: everything but shape arithmetic is named."""
    options = onnxruntime.SessionOptions()
    record_placement(options)
    path = str(bundle.path("graphs/thinker.onnx"))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found = host_nodes(session)
    kinds = sorted(kind for kind, _ in found)
    assert kinds == ["MatMul", "ReduceSum", "Reshape", "TensorScatter", "Transpose"]
    with pytest.warns(RuntimeWarning, match=r"5 nodes of graph 'thinker' run on the CPU.*CUDA.*1 MatMul") as caught:
        warn_of_host_nodes("thinker", "CUDAExecutionProvider", found)
    assert len(caught) == 1
    warn_of_host_nodes("bigvgan", "CUDAExecutionProvider", found)  # not a hot graph
    warn_of_host_nodes("thinker", "CUDAExecutionProvider", ())
    assert host_nodes(SimpleNamespace()) == ()


def test_graphs_are_loaded_once_by_many_threads(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = OrtBackend(bundle)
    load, loaded = backend._load, []

    def slow(name: str) -> Any:
        loaded.append(name)
        time.sleep(0.05)
        return load(name)

    monkeypatch.setattr(backend, "_load", slow)
    with ThreadPoolExecutor() as pool:
        graphs = list(pool.map(backend.graph, ["thinker"] * 4))
    assert loaded == ["thinker"]
    assert graphs == [graphs[0]] * 4


def test_missing_onnxruntime_names_the_extra(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for name in ("auto", "ort-cpu", "ort-cuda"):
        with pytest.raises(BackendError, match=r"pip install 'omniport\[ort\]'"):
            open_backend(name, bundle)


def test_missing_cuda_names_the_extra(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match=r"pip install 'omniport\[ort-gpu\]'"):
        open_backend("ort-cuda", bundle)


def test_bfloat16_is_refused_on_the_cpu(tmp_path: Path) -> None:
    half = msgspec.structs.replace(decoder_spec(), precision="bfloat16")
    with pytest.raises(BackendError, match=r"bfloat16.*--precision fp32"):
        open_backend("ort-cpu", bundle_with(tmp_path / "b", spec=half))


def load(tmp_path: Path, model: onnx.ModelProto | bytes, external: str | None = None) -> None:
    OrtBackend(bundle_with(tmp_path / "b", model, external=external)).graph("thinker")


def test_a_graph_that_the_bundle_lacks(tmp_path: Path) -> None:
    backend = open_backend("ort-cpu", Bundle.open(make_bundle(tmp_path / "b", speak=False)))
    with pytest.raises(BackendError, match=r"no graph 'talker'; it has audio_encoder, vision_encoder, thinker"):
        backend.graph("talker")


def test_foreign_operators_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"operators of com.microsoft"):
        load(tmp_path, decoder_model(domain="com.microsoft"))
    imported = decoder_model()
    imported.opset_import.append(helper.make_opsetid("com.evil", 1))
    with pytest.raises(BundleError, match=r"operators of com.evil"):
        load(tmp_path / "2", imported)


def test_foreign_operators_inside_a_branch_are_refused(tmp_path: Path) -> None:
    model = decoder_model()
    inner = helper.make_graph(
        [helper.make_node("Gelu", ["live32"], ["y"], domain="com.microsoft")],
        "branch",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    yes = helper.make_node("Constant", [], ["yes"], value=helper.make_tensor("t", TensorProto.BOOL, [], [True]))
    branch = helper.make_node("If", ["yes"], ["unused"], then_branch=inner, else_branch=inner)
    model.graph.node.extend([yes, branch])
    with pytest.raises(BundleError, match=r"operators of com.microsoft"):
        load(tmp_path, model)


def test_local_functions_are_refused(tmp_path: Path) -> None:
    model = decoder_model()
    body = [helper.make_node("Identity", ["x"], ["y"])]
    model.functions.append(helper.make_function("", "Mine", ["x"], ["y"], body, [helper.make_opsetid("", 24)]))
    with pytest.raises(BundleError, match="1 local functions"):
        load(tmp_path, model)


@pytest.mark.parametrize(
    "location", ["../outside", "/etc/passwd", "talker.data", "../graphs/talker.data", "dit.onnx", ""]
)
def test_weights_from_elsewhere_are_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "outside").write_bytes(bytes(1000))
    with pytest.raises(BundleError, match=r"which bundle.json does not list for graph 'thinker'"):
        load(tmp_path, decoder_model(), location)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    good = decoder_model().SerializeToString()
    for i, data in enumerate(
        (b"x", good[: len(good) // 2], b"\x0a" * 1000, b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
    ):
        with pytest.raises((BundleError, BackendError), match=r"not a readable ONNX file|cannot load"):
            load(tmp_path / str(i), data)
    with pytest.raises(BundleError, match=r"not a readable ONNX file"):
        load(tmp_path / "empty", b"")


def test_a_graph_with_another_signature(tmp_path: Path) -> None:
    model = decoder_model()
    model.graph.output.append(helper.make_tensor_value_info("live32", TensorProto.FLOAT, None))
    with pytest.raises(BundleError, match=r"has outputs \['live32'.*bundle.json says"):
        load(tmp_path, model)


def stored_elsewhere(name: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="unlisted.bin")
    return tensor


def sparse() -> onnx.SparseTensorProto:
    places = numpy_helper.from_array(np.array([3], np.int64), "places")
    return onnx.SparseTensorProto(values=stored_elsewhere("values"), indices=places, dims=[8])


def with_attribute(model: onnx.ModelProto, **fields: Any) -> None:
    model.graph.node[0].attribute.append(onnx.AttributeProto(name="value", **fields))


def with_unknown_field(model: onnx.ModelProto) -> None:
    model.graph.node[0].MergeFromString(b"\xc2\x3e\x01x")  # field 1000


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda model: with_attribute(model, sparse_tensor=sparse()), "attribute field 22 is not known"),
        (lambda model: with_attribute(model, sparse_tensors=[sparse()]), "attribute field 23 is not known"),
        (lambda model: with_attribute(model, tp=onnx.TypeProto(denotation="x")), "attribute field 14 is not known"),
        (lambda model: with_attribute(model, ref_attr_name="x"), "attribute field 21 is not known"),
        (lambda model: model.graph.sparse_initializer.append(sparse()), "graph field 15 is not known"),
        (lambda model: model.training_info.add(), "model field 20 is not known"),
        (with_unknown_field, "node field 1000 is not known"),
    ],
)
def test_what_is_not_known_to_be_safe_is_refused(
    tmp_path: Path, change: Callable[[onnx.ModelProto], object], field: str
) -> None:
    model = decoder_model()
    change(model)
    with pytest.raises(BundleError, match=field):
        load(tmp_path, model)


@pytest.mark.parametrize("fields", [{"t": stored_elsewhere("t")}, {"tensors": [stored_elsewhere("t")]}])
def test_tensors_of_attributes_are_looked_into(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = decoder_model()
    with_attribute(model, **fields)
    with pytest.raises(BundleError, match=r"takes weights from 'unlisted.bin', which bundle.json does not list"):
        load(tmp_path, model)


def test_scan_sees_what_a_model_asks_for(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "b", external="thinker.data")
    summary = scan_onnx(bundle.path("graphs/thinker.onnx"))
    assert (summary.domains, summary.functions, summary.external) == ({""}, 0, {"thinker.data"})
