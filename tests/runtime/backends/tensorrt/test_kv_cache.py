"""KV caches that grow, over the stand-in of fake_device.py: TensorRT before 10.15 has no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from omniport.runtime import OmniSession, SamplingConfig
from omniport.runtime.backends import open_backend
from omniport.runtime.backends.tensorrt.backend import TrtBackend
from omniport.runtime.backends.tensorrt.kv_cache import GrowingTrtCache
from omniport.runtime.bundle.graph_spec import DimRange, GraphSpec
from omniport.runtime.errors import BackendError, OmniportError
from onnx import helper, numpy_helper
from support.fake_device import FakeDriver, FakeRuntime, feeds_of, with_engines
from support.live_turns import sort
from support.onnx_graphs import make_model, put_graphs, spec, tensor

HEADS, WIDTH = 2, 4
THINKER = SamplingConfig(max_new_tokens=8)
TALKER = SamplingConfig(max_new_tokens=16, temperature=0.0)


def growing_model() -> tuple[onnx.ModelProto, GraphSpec]:
    """logits: the sum of each head's rows in the cache that the call may see, weighted by position."""
    past = tensor("past_key_0", "batch", HEADS, "past", WIDTH)
    present = tensor("present_key_0", "batch", HEADS, "live", WIDTH)
    inputs = (
        tensor("inputs_embeds", "batch", "new_tokens", HEADS * WIDTH),
        tensor("kv_positions", "live", dtype="int64"),
        tensor("write_index", "batch", dtype="int64"),
        past,
    )
    outputs = (tensor("logits", "batch", HEADS * WIDTH), present)
    node = helper.make_node
    nodes = [
        node("Reshape", ["inputs_embeds", "split"], ["heads"]),
        node("Transpose", ["heads"], ["rows"], perm=[0, 2, 1, 3]),
        node("Concat", ["past_key_0", "rows"], ["present_key_0"], axis=2),
        node("Shape", ["inputs_embeds"], ["added"], start=1, end=2),
        node("Add", ["write_index", "added"], ["end"]),
        node("Less", ["kv_positions", "end"], ["seen"]),
        node("Add", ["kv_positions", "write_index"], ["places"]),
        node("Where", ["seen", "places", "none"], ["weights"]),
        node("Cast", ["weights"], ["floats"], to=onnx.TensorProto.FLOAT),
        node("Unsqueeze", ["floats", "last"], ["column"]),
        node("Mul", ["present_key_0", "column"], ["weighted"]),
        node("ReduceSum", ["weighted", "two"], ["sums"], keepdims=0),
        node("Reshape", ["sums", "flat"], ["logits"]),
    ]
    constants = {"split": [0, 0, HEADS, WIDTH], "last": [1], "two": [2], "none": [0], "flat": [1, HEADS * WIDTH]}
    weights = [numpy_helper.from_array(np.asarray(v, np.int64), k) for k, v in constants.items()]
    dims = {
        "batch": DimRange(1, 1, 1),
        "new_tokens": DimRange(1, 1, 16),
        "live": DimRange(1, 32, 64),
        "past": DimRange(0, 31, 63),
    }
    made = spec("thinker", inputs, outputs, dims)
    made = msgspec.structs.replace(made, grows={"present_key_0": "past_key_0"})
    return make_model(nodes, inputs, outputs, weights), made


@pytest.fixture
def runtime(tmp_path: Path, driver: FakeDriver) -> FakeRuntime:
    root = put_graphs(tmp_path / "bundle", growing_model(), kv="concat")
    return FakeRuntime(with_engines(root, root, ["thinker"]), driver)


@pytest.fixture
def backend(runtime: FakeRuntime, driver: FakeDriver) -> TrtBackend:
    return TrtBackend(runtime.bundle, "tensorrt-rtx", runtime=runtime, driver=driver)


def run(backend: TrtBackend, cache: Any, rows: NDArray[np.float32], start: int) -> NDArray[np.float32]:
    feeds = {
        "inputs_embeds": rows[None, start:],
        "kv_positions": np.arange(len(rows), dtype=np.int64),
        "write_index": np.asarray([start], np.int64),
    }
    return backend.graph("thinker").run(feeds, cache)["logits"][0]


def wanted(rows: NDArray[np.float32], start: int) -> NDArray[np.float32]:
    sums: NDArray[np.float32] = ((np.arange(len(rows)) + start)[:, None] * rows).sum(0).astype(np.float32)
    return sums


def test_a_cache_that_grows_is_cut_and_grows_again(backend: TrtBackend) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((16, HEADS * WIDTH)).astype(np.float32)
    cache = backend.graph("thinker").new_cache(64)
    assert isinstance(cache, GrowingTrtCache)
    assert cache.nbytes == 2 * 64 * HEADS * WIDTH * 4
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 16)):
        assert np.allclose(run(backend, cache, rows[:stop], start), wanted(rows[:stop], start), atol=1e-4)
    other = np.concatenate([rows[:6], rng.standard_normal((3, HEADS * WIDTH)).astype(np.float32)])
    assert np.allclose(run(backend, cache, other, 6), wanted(other, 6), atol=1e-4)
    assert np.allclose(run(backend, cache, rows[:4], 0), wanted(rows[:4], 0), atol=1e-4)


def test_a_step_has_the_shapes_of_the_step_before(
    backend: TrtBackend, runtime: FakeRuntime, driver: FakeDriver
) -> None:
    """Up to the last row there is, and after tokens were given up."""
    driver.put_cost = 1e-3  # so that a CUDA graph pays
    rows = np.random.default_rng(0).standard_normal((64, HEADS * WIDTH)).astype(np.float32)
    graph = backend.graph("thinker")
    cache = graph.new_cache(64)
    steps = [(n, n + 1) for n in (*range(16, 64), 20)]
    for start, stop in ((0, 16), *steps, (21, 25), (25, 26), (26, 27), (25, 26)):
        assert np.allclose(run(backend, cache, rows[:stop], start), wanted(rows[:stop], start), atol=1e-3), start
    assert graph.decoding is not None
    assert graph.decoding.uses_graph
    assert len(cache.executors) == 1
    assert driver.done.count("launch") > 50
    shapes = {context.shapes["past_key_0"] for context in runtime.contexts if context.fixed}
    assert shapes == {(1, HEADS, 63, WIDTH)}


def test_steps_without_a_cuda_graph_have_one_shape_too(
    backend: TrtBackend, runtime: FakeRuntime, driver: FakeDriver
) -> None:
    runtime.capturable = False
    rows = np.random.default_rng(0).standard_normal((12, HEADS * WIDTH)).astype(np.float32)
    cache, seen = backend.graph("thinker").new_cache(64), set()
    for start, stop in ((0, 5), *((n, n + 1) for n in range(5, 12))):
        assert np.allclose(run(backend, cache, rows[:stop], start), wanted(rows[:stop], start), atol=1e-4)
        seen |= {context.shapes["past_key_0"] for context in runtime.contexts}
    assert seen == {(1, HEADS, 0, WIDTH), (1, HEADS, 63, WIDTH)}
    assert "launch" not in driver.done


def test_a_cache_for_more_than_the_engine_was_built_for(backend: TrtBackend) -> None:
    assert backend.max_context() == 64
    with pytest.raises(BackendError, match="built for 64: open the session with max_context=64"):
        backend.graph("thinker").new_cache(65)


def test_places_that_were_never_filled(backend: TrtBackend) -> None:
    rows = np.ones((8, HEADS * WIDTH), np.float32)
    cache = backend.graph("thinker").new_cache(8)
    run(backend, cache, rows[:3], 0)
    with pytest.raises(OmniportError, match="at index 5 adds 1 tokens"):
        run(backend, cache, rows[:6], 5)
    with pytest.raises(OmniportError, match="at index 3 adds 9 tokens to a KV cache of 8"):
        run(backend, cache, np.ones((12, HEADS * WIDTH), np.float32), 3)


def test_a_reply_over_the_lowered_graphs(lowered_bundle: Path, tmp_path: Path, driver: FakeDriver) -> None:
    """Whole replies over the graphs of --ops decomposed --kv concat, and a cache that is cut back and grows again."""
    bundle = with_engines(lowered_bundle, tmp_path / "bundle", ["thinker", "talker", "dit", "bigvgan"])
    runtime = FakeRuntime(bundle, driver)
    engines = TrtBackend(bundle, "tensorrt-rtx", runtime=runtime, driver=driver)
    driver.put_cost = 1e-4  # so that a CUDA graph pays
    replies, logits = [], []
    for backend in (open_backend("ort-cpu", bundle, threads=1), engines):
        with OmniSession(bundle, backend, max_context=512) as session:
            messages: list[dict[str, Any]] = [{"role": "user", "content": "What is the sea like at night?"}]
            turns = []
            for question in ("And by day?", "And in winter?"):
                turns.append(sort(session.reply(messages, thinker=THINKER, talker=TALKER)))
                messages += [{"role": "assistant", "content": turns[-1][2].text}, {"role": "user", "content": question}]
            turns.append(sort(session.reply(messages[:1], thinker=THINKER, talker=TALKER)))
            replies.append(turns)
            caches = [backend.graph(name).new_cache(512) for name in ("thinker", "talker")]
            # the fourth gives seven tokens up; the last is the first step of another length
            places = ((20, 0), (1, 20), (1, 21), (1, 15), (3, 16), (1, 19), (236, 20), (1, 256))
            for seed, (count, start) in enumerate(places):
                feeds = feeds_of(engines, count, start, seed)
                logits.append(backend.graph("thinker").run(feeds, caches[0])["logits"])
    for (_, wanted_sound, wanted, *_), (_, sound, got, *_) in zip(*replies, strict=True):
        assert len(wanted.token_ids) > 4
        assert len(wanted.codec_ids) > 10
        assert (got.token_ids, got.codec_ids) == (wanted.token_ids, wanted.codec_ids)
        assert float(np.std(wanted_sound)) > 1e-3
        assert np.allclose(sound, wanted_sound, atol=1e-2 * float(np.std(wanted_sound)))
    for exact, made in zip(logits[:8], logits[8:], strict=True):
        assert float(np.std(exact)) > 1e-2
        assert np.allclose(made, exact, atol=1e-4 * float(np.std(exact)))
    assert all(isinstance(cache, GrowingTrtCache) for cache in caches)
    assert driver.done.count("engine") > 60
    assert driver.done.count("launch") > 40
    for name in ("thinker", "talker"):
        steps = [context.shapes for context in runtime.contexts if context.fixed and context.engine.spec.name == name]
        assert {shapes["kv_positions"] for shapes in steps} <= {(256,), (512,)}
