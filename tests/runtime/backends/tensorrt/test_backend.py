"""The host code around engines, over a stand-in for GPU and engines (fake_device.py). No engine runs here."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from omniport.runtime import OmniSession, SamplingConfig
from omniport.runtime.backends import open_backend
from omniport.runtime.backends.tensorrt.backend import TrtBackend
from omniport.runtime.backends.tensorrt.kv_cache import StaticTrtCache, positions_bucket
from omniport.runtime.bundle.bfloat16 import from_bfloat16, to_bfloat16
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import BackendError
from omniport.runtime.media.image import image_input
from support.fake_device import FakeDriver, FakeRuntime, feeds_of, with_engines
from support.live_turns import film, sort, voice

THINKER = SamplingConfig(max_new_tokens=12)
TALKER = SamplingConfig(max_new_tokens=26, temperature=0.0)


def parts(folder: Path) -> list[dict[str, Any]]:
    """Sound, a picture, a video with sound, and text."""
    picture = np.random.default_rng(0).integers(0, 255, (84, 112, 3), np.uint8)
    return [
        {"type": "audio", "audio": (voice(2.7), 16000)},
        {"type": "image", "image": picture},
        {"type": "video", "video": film(folder / "film.mkv", 2.5, 2.5)},
        {"type": "text", "text": "What happens here?"},
    ]


def answer(session: OmniSession, content: list[dict[str, Any]], **options: Any) -> Any:
    return sort(session.reply([{"role": "user", "content": content}], thinker=THINKER, talker=TALKER, **options))


def close(got: NDArray[np.float32], wanted: NDArray[np.float32], within: float) -> bool:
    rms = float(np.sqrt(np.mean(wanted.astype(np.float64) ** 2)))
    assert rms > 1e-3, "the reference is silent: nothing is compared"
    return got.shape == wanted.shape and float(np.abs(got - wanted).max()) < within * rms


def steps(backend: Any, cache: Any, prompt: int = 250, count: int = 10) -> list[NDArray[np.float32]]:
    """Logits after a prompt and of ``count`` steps after it."""
    graph = backend.graph("thinker")
    logits = [graph.run(feeds_of(backend, prompt), cache)["logits"]]
    for k in range(count):
        logits.append(graph.run(feeds_of(backend, 1, prompt + k, seed=k + 1), cache)["logits"])
    return logits


# whole replies


def test_a_whole_reply_equals_onnx_runtimes(
    bundle: Bundle, backend: TrtBackend, driver: FakeDriver, tmp_path: Path
) -> None:
    content = parts(tmp_path)
    with OmniSession(bundle, open_backend("ort-cpu", bundle, threads=1), max_context=1024) as session:
        wanted = answer(session, content)
    driver.put_cost = 1e-4  # so that a launch is the quicker way
    with OmniSession(bundle, backend) as session:
        assert session.max_context == 1024
        got = answer(session, content)
        again = answer(session, content)  # in the same caches, over the same captured graphs
    assert (got[2].token_ids, got[2].codec_ids) == (wanted[2].token_ids, wanted[2].codec_ids)
    assert len(wanted[2].codec_ids) > 20
    assert close(got[1], wanted[1], 1e-2)
    assert again[2].token_ids == wanted[2].token_ids
    assert np.array_equal(again[1], got[1])
    assert got[2].stats.backend == "tensorrt-rtx"
    assert driver.done.count("launch") > 40


def test_a_half_precision_reply(tiny_half_bundles: dict[str, Path], driver: FakeDriver, tmp_path: Path) -> None:
    opened = with_engines(tiny_half_bundles["fp16"], tmp_path / "bundle")
    content = parts(tmp_path)[:2]
    with OmniSession(opened, open_backend("ort-cpu", opened, threads=1), max_context=1024) as session:
        wanted = answer(session, content)
    made = TrtBackend(opened, "tensorrt-rtx", runtime=FakeRuntime(opened, driver), driver=driver)
    with OmniSession(opened, made) as session:
        cache = made.graph("thinker").new_cache(1024)
        geometry = opened.manifest.thinker
        row = 2 * geometry.num_layers * geometry.num_kv_heads * geometry.head_dim
        assert cache.nbytes == 1024 * row * 2  # float16
        got = answer(session, content)
    assert (got[2].token_ids, got[2].codec_ids) == (wanted[2].token_ids, wanted[2].codec_ids)
    assert close(got[1], wanted[1], 5e-2)


# decoding: lengths, CUDA graphs, and when there are none


def test_lengths_of_decoding() -> None:
    for capacity in (64, 1000, 32768):
        lengths = [positions_bucket(live, capacity) for live in range(1, capacity + 1)]
        assert all(live <= length <= capacity for live, length in enumerate(lengths, 1))
        assert all(length - live < max(256, live / 4) for live, length in enumerate(lengths, 1))
        assert lengths == sorted(lengths)
    assert len({positions_bucket(live, 32768) for live in range(1, 32769)}) == 24
    assert [positions_bucket(n, 32768) for n in (1, 256, 257, 2048, 2049, 5000)] == [256, 256, 512, 2048, 2560, 5120]


@pytest.fixture(scope="module")
def plain_steps(bundle: Bundle) -> list[NDArray[np.float32]]:
    ort = open_backend("ort-cpu", bundle, threads=1)
    return steps(ort, ort.graph("thinker").new_cache(1024))


def same(got: list[NDArray[np.float32]], wanted: list[NDArray[np.float32]]) -> bool:
    return all(close(a, b, 1e-4) for a, b in zip(got, wanted, strict=True))


def test_each_length_has_a_graph(
    backend: TrtBackend, driver: FakeDriver, plain_steps: list[NDArray[np.float32]]
) -> None:
    driver.put_cost = 1e-4
    graph = backend.graph("thinker")
    cache = graph.new_cache(1024)
    assert same(steps(backend, cache), plain_steps)  # 251 to 260 positions: two lengths
    assert graph.decoding is not None
    assert graph.decoding.uses_graph
    assert graph.decoding.problem == ""
    assert sorted(cache.executors) == [256, 512]
    assert all(executor.captured for executor in cache.executors.values())
    # Each step is one launch: what it holds is the copies in, the engine, the copies out.
    before = len(driver.done)
    graph.run(feeds_of(backend, 1, 260), cache)
    assert driver.done[before:] == ["launch", *["to_device"] * 4, "engine", *["to_host"] * 2]


def test_caches_have_graphs_of_their_own(
    backend: TrtBackend, driver: FakeDriver, plain_steps: list[NDArray[np.float32]]
) -> None:
    driver.put_cost = 1e-4
    graph = backend.graph("thinker")
    first, second = graph.new_cache(1024), graph.new_cache(1024)
    assert same(steps(backend, first), plain_steps)
    other = feeds_of(backend, 40, seed=77)
    graph.run(other, second)
    graph.run(feeds_of(backend, 1, 40, seed=78), second)
    again = graph.run(feeds_of(backend, 1, 260, seed=11), first)["logits"]
    fresh = graph.new_cache(1024)
    steps(backend, fresh)
    assert np.array_equal(graph.run(feeds_of(backend, 1, 260, seed=11), fresh)["logits"], again)


@pytest.mark.parametrize("reason", ["says no", "fails", "slower"])
def test_without_a_graph(
    bundle: Bundle, driver: FakeDriver, plain_steps: list[NDArray[np.float32]], reason: str
) -> None:
    driver.refuse_capture = "operation not permitted when stream is capturing" if reason == "fails" else ""
    driver.launch_cost = 0.02
    runtime = FakeRuntime(bundle, driver, capturable=reason != "says no")
    backend = TrtBackend(bundle, "tensorrt-rtx", runtime=runtime, driver=driver)
    graph = backend.graph("thinker")
    cache = graph.new_cache(1024)
    assert same(steps(backend, cache), plain_steps)
    assert graph.decoding is not None
    assert not graph.decoding.uses_graph
    wanted = {"says no": "cannot be captured", "fails": "not permitted", "slower": ""}[reason]
    assert wanted in graph.decoding.problem
    assert (graph.decoding.graph is None) == (reason != "slower")
    assert not cache.executors
    assert sum(context.fixed for context in runtime.contexts) == 1  # tried once
    assert driver.done[-7:].count("launch") == 0


def test_a_length_that_cannot_be_captured(
    backend: TrtBackend, driver: FakeDriver, plain_steps: list[NDArray[np.float32]]
) -> None:
    driver.put_cost, driver.refuse_capture, driver.refuse_after = 1e-4, "out of memory", 1
    cache = backend.graph("thinker").new_cache(1024)
    assert same(steps(backend, cache), plain_steps)
    assert {length: executor.captured for length, executor in cache.executors.items()} == {256: True, 512: False}


# memory


def test_memory_is_allocated_once(backend: TrtBackend, driver: FakeDriver) -> None:
    graph = backend.graph("thinker")
    cache = graph.new_cache(1024)
    steps(backend, cache)
    held = (set(driver.memory), set(driver.host))
    for k in range(12):
        graph.run(feeds_of(backend, 1, 261 + k), cache)
    graph.run(feeds_of(backend, 100, 0), cache)
    assert (set(driver.memory), set(driver.host)) == held


def test_memory_is_given_back(bundle: Bundle, driver: FakeDriver) -> None:
    driver.put_cost = 1e-4
    room = driver.room
    backend = TrtBackend(bundle, "tensorrt-rtx", runtime=FakeRuntime(bundle, driver), driver=driver)
    with OmniSession(bundle, backend) as session:
        answer(session, [{"type": "text", "text": "Hello"}])
        assert len(driver.streams) == len(backend._graphs) == 4  # one stream a graph
        assert driver.graphs
    del session, backend
    gc.collect()
    assert {} == driver.memory == driver.host == driver.graphs == driver.streams
    assert driver.room == room


def test_a_device_that_is_full(bundle: Bundle) -> None:
    driver = FakeDriver(room=200_000)
    backend = TrtBackend(bundle, "tensorrt-rtx", runtime=FakeRuntime(bundle, driver), driver=driver)
    with pytest.raises(BackendError, match="no room for"):
        backend.graph("thinker").new_cache(1024)


def test_what_an_overflow_left_does_no_harm(
    backend: TrtBackend, driver: FakeDriver, plain_steps: list[NDArray[np.float32]]
) -> None:
    graph = backend.graph("thinker")
    cache = graph.new_cache(1024)
    assert isinstance(cache, StaticTrtCache)
    for buffer in cache._parts.values():
        driver.memory[buffer.address].fill(0xFF)  # NaN
    assert same(steps(backend, cache), plain_steps)


def test_threads_take_turns(bundle: Bundle, backend: TrtBackend, driver: FakeDriver) -> None:
    driver.put_cost = 1e-5
    content = [{"type": "text", "text": "Hello"}]
    with OmniSession(bundle, backend) as session:
        wanted = answer(session, content)
        sessions = [session.fork() for _ in range(3)]
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(lambda fork: answer(fork, content), sessions))
        for fork in sessions:
            fork.close()
    for got in found:
        assert (got[2].token_ids, got[2].codec_ids) == (wanted[2].token_ids, wanted[2].codec_ids)
        assert np.array_equal(got[1], wanted[1])


def test_bfloat16_is_rounded_as_it_should_be() -> None:
    import ml_dtypes

    rng = np.random.default_rng(0)
    values = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    special = np.asarray([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38], np.float32)
    values = np.concatenate([values, special]).reshape(1, -1)
    with np.errstate(all="ignore"):
        wanted = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    got = from_bfloat16(to_bfloat16(values))
    assert got.dtype == np.float32
    assert np.array_equal(got, wanted, equal_nan=True)
    assert np.isnan(wanted).sum() > 100


# profiles


def test_images_of_each_class_have_a_context_with_its_profile(bundle: Bundle, driver: FakeDriver) -> None:
    """with_engines puts the edges of its classes at 12 and 64 embeddings; the stand-in refuses what is beyond."""
    runtime = FakeRuntime(bundle, driver)
    backend = TrtBackend(bundle, "tensorrt-rtx", runtime=runtime, driver=driver)
    ort = open_backend("ort-cpu", bundle, threads=1).graph("vision_encoder")
    for height, width in ((84, 112), (84, 112), (224, 224), (252, 280), (84, 84)):
        pixels = np.random.default_rng(height).integers(0, 255, (height, width, 3), np.uint8)
        vision = image_input(pixels, bundle.manifest.vision)
        names = ("patches", "grid_hw", "window_index", "window_valid")
        feeds = {name: getattr(vision, name) for name in names}
        assert close(backend.graph("vision_encoder").run(feeds)["embeds"], ort.run(feeds)["embeds"], 1e-4)
    assert [context.profile for context in runtime.contexts] == [0, 1, 2]
    assert [context.calls for context in runtime.contexts] == [3, 1, 1]


# lengths that are met before they are needed


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """None from an earlier process."""
    monkeypatch.setenv("OMNIPORT_CACHE", "")


@pytest.mark.usefixtures("no_kernels")
def test_no_step_of_a_reply_compiles(
    bundle: Bundle, driver: FakeDriver, plain_steps: list[NDArray[np.float32]]
) -> None:
    runtime = FakeRuntime(bundle, driver, compiles=True)
    made = TrtBackend(bundle, "tensorrt-rtx", runtime=runtime, driver=driver)
    graph = made.graph("thinker")
    assert graph._warming is not None
    graph._warming.wait()
    assert len(runtime.compiled) == 4  # 256, 512, 768, 1,024 positions
    assert (driver.memory, driver.host) == ({}, {})
    cache = graph.new_cache(1024)
    assert same(steps(made, cache), plain_steps)  # over the end of a length
    assert len(runtime.compiled) == 5  # the prompt's own
    made.close()
    assert {} == driver.memory == driver.host == driver.streams


@pytest.mark.usefixtures("no_kernels")
def test_without_memory_to_meet_lengths_replies_compile(bundle: Bundle) -> None:
    driver = FakeDriver(room=100_000)
    runtime = FakeRuntime(bundle, driver, compiles=True)
    made = TrtBackend(bundle, "tensorrt-rtx", runtime=runtime, driver=driver)
    graph = made.graph("thinker")
    assert graph._warming is not None
    graph._warming.wait()
    assert runtime.compiled == []
    assert driver.memory == {}
    driver.room = 1 << 40
    steps(made, graph.new_cache(1024), prompt=20, count=2)
    assert len(runtime.compiled) == 2
    made.close()
    graph.close()  # once more


@pytest.mark.usefixtures("no_kernels")
def test_closing_waits_for_the_step_that_is_under_way(bundle: Bundle, driver: FakeDriver) -> None:
    driver.put_cost = 5e-3
    runtime = FakeRuntime(bundle, driver, compiles=True)
    made = TrtBackend(bundle, "tensorrt-rtx", runtime=runtime, driver=driver)
    made.graph("thinker")
    made.close()
    assert len(runtime.compiled) < 4
    assert {} == driver.memory == driver.host == driver.streams
