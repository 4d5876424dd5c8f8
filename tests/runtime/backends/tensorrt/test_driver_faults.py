"""Whole sessions over the real `CudaDriver` and a stand-in for its library: every call fails once, at every place.

In place of an engine ONNX Runtime runs its graph, in the streams and the memory of the stand-in.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray
from omniport.runtime import OmniSession, SamplingConfig
from omniport.runtime.backends import open_backend
from omniport.runtime.backends.tensorrt.backend import TrtBackend
from omniport.runtime.backends.tensorrt.cuda_driver import CALLS
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import BackendError
from support.fake_device import FakeEngine, FakeRuntime, feeds_of, with_engines
from support.live_turns import sort
from support.stub_cuda import ILLEGAL_ADDRESS, LAUNCH_OUT_OF_RESOURCES, OUT_OF_MEMORY, Stub, StubDriver

T = TypeVar("T")
PROMPT, STEPS = 20, 3
#: what gives back says nothing; a graph that cannot be made or launched while a step is timed is done without
QUIET = {"cuMemFree_v2", "cuMemFreeHost", "cuStreamDestroy_v2", "cuGraphDestroy", "cuGraphExecDestroy"}


class Runtime(FakeRuntime):
    """Loads the thinker's stand-in once: it is the same each time."""

    engines: dict[Path, FakeEngine]

    def load(self, path: Path) -> FakeEngine:
        if path not in self.engines:
            self.engines[path] = super().load(path)
        self.engines[path].runtime = self
        return self.engines[path]


class Session:
    """A few steps of the thinker, each tried again once where it fails."""

    def __init__(self, bundle: Bundle, driver: StubDriver, engines: dict[Path, FakeEngine]) -> None:
        self.bundle, self.driver = bundle, driver
        self.runtime = Runtime(bundle, driver)  # type: ignore[arg-type]
        self.runtime.engines = engines
        self.said: list[str] = []

    def attempt(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except BackendError as error:
            self.said.append(str(error))
            return call()

    def run(self) -> list[NDArray[np.float32]]:
        backend = self.attempt(
            lambda: TrtBackend(self.bundle, "tensorrt-rtx", runtime=self.runtime, driver=self.driver)
        )
        graph = self.attempt(lambda: backend.graph("thinker"))
        cache = self.attempt(lambda: graph.new_cache(1024))
        calls = [(PROMPT, 0), *((1, PROMPT + k) for k in range(STEPS))]
        logits = []
        for seed, (count, start) in enumerate(calls):
            feeds = feeds_of(backend, count, start, seed)
            logits.append(self.attempt(lambda feeds=feeds: graph.run(feeds, cache)["logits"]))  # type: ignore[misc]
        backend.close()
        return logits


@pytest.fixture
def driver(stub: Stub) -> StubDriver:
    return StubDriver(stub)


@pytest.fixture(scope="module")
def engines() -> dict[Path, FakeEngine]:
    return {}


@pytest.fixture(scope="module")
def wanted(bundle: Bundle) -> list[NDArray[np.float32]]:
    return steps_on_the_cpu(bundle)


def steps_on_the_cpu(bundle: Bundle) -> list[NDArray[np.float32]]:
    backend = open_backend("ort-cpu", bundle, threads=1)
    graph = backend.graph("thinker")
    cache = graph.new_cache(1024)
    calls = [(PROMPT, 0), *((1, PROMPT + k) for k in range(STEPS))]
    return [
        graph.run(feeds_of(backend, count, start, seed), cache)["logits"] for seed, (count, start) in enumerate(calls)
    ]


def same(got: list[NDArray[np.float32]], exact: list[NDArray[np.float32]]) -> bool:
    return all(np.allclose(a, b, atol=1e-4 * float(np.std(b))) for a, b in zip(got, exact, strict=True))


USED = sorted(CALLS.keys() - {"cuGetErrorName", "cuGetErrorString", "cuMemGetInfo_v2", "cuMemcpy2DAsync_v2"})
OPENING = {"cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName", "cuDevicePrimaryCtxRetain"}


@pytest.mark.parametrize("name", sorted(set(USED) - OPENING))
def test_every_call_of_a_session_fails_once(
    name: str,
    bundle: Bundle,
    driver: StubDriver,
    stub: Stub,
    engines: dict[Path, FakeEngine],
    wanted: list[NDArray[np.float32]],
) -> None:
    """What was tried again works, and its results are right; closing gives all back."""
    before = stub.calls(name)
    assert same(Session(bundle, driver, engines).run(), wanted)
    count = stub.calls(name) - before
    assert count
    assert stub.left == (0, 0, 0)
    for call in range(1, count + 1):
        session = Session(bundle, driver, engines)
        stub.fail(name, call, LAUNCH_OUT_OF_RESOURCES)
        assert same(session.run(), wanted), call
        stub.forgive()
        assert all(f"{name} of the CUDA driver failed" in text for text in session.said)
        assert len(session.said) <= (name not in QUIET)
        assert stub.left == (0, 0, 0) or name in QUIET
    assert stub.fault == ""
    assert not driver.problems


def test_a_cache_that_grows_survives_each_copy_of_rows(
    lowered_bundle: Path, tmp_path: Path, driver: StubDriver, stub: Stub
) -> None:
    bundle = with_engines(lowered_bundle, tmp_path / "bundle", ["thinker"])
    engines: dict[Path, FakeEngine] = {}
    exact = steps_on_the_cpu(bundle)
    assert same(Session(bundle, driver, engines).run(), exact)
    count = stub.calls("cuMemcpy2DAsync_v2")
    assert count >= 2 * bundle.manifest.thinker.num_layers * (STEPS + 1)
    for call in range(1, count + 1):
        session = Session(bundle, driver, engines)
        stub.fail("cuMemcpy2DAsync_v2", call, LAUNCH_OUT_OF_RESOURCES)
        assert same(session.run(), exact), call
        stub.forgive()
        assert len(session.said) == 1
        assert stub.left == (0, 0, 0)
    assert stub.fault == ""


def test_memory_runs_out_at_each_allocation(
    bundle: Bundle, driver: StubDriver, stub: Stub, engines: dict[Path, FakeEngine], wanted: list[NDArray[np.float32]]
) -> None:
    for name in ("cuMemAlloc_v2", "cuMemAllocHost_v2", "cuStreamEndCapture", "cuGraphInstantiateWithFlags"):
        before = stub.calls(name)
        Session(bundle, driver, engines).run()
        for call in range(1, stub.calls(name) - before + 1):
            session = Session(bundle, driver, engines)
            stub.fail(name, call, OUT_OF_MEMORY)
            assert same(session.run(), wanted), (name, call)
            stub.forgive()
            assert bool(session.said) == name.startswith("cuMemAlloc")  # a capture that fails is done without
            assert stub.left == (0, 0, 0)


def test_an_illegal_address_ends_the_process_use_of_the_gpu(
    bundle: Bundle, driver: StubDriver, stub: Stub, engines: dict[Path, FakeEngine]
) -> None:
    stub.fail("cuStreamSynchronize", 3, ILLEGAL_ADDRESS)
    session = Session(bundle, driver, engines)
    with pytest.raises(BackendError, match=r"ILLEGAL_ADDRESS.*restart the process"):
        session.run()
    with pytest.raises(BackendError, match="restart the process"):
        Session(bundle, driver, engines).run()


def test_a_reply_over_the_driver_and_closing_gives_all_back(bundle: Bundle, driver: StubDriver, stub: Stub) -> None:
    """Although the session, its caches and its graphs are still held: a board has no room for two."""

    def reply(session: OmniSession) -> Any:
        thinker, talker = SamplingConfig(max_new_tokens=8), SamplingConfig(max_new_tokens=16, temperature=0.0)
        return sort(session.reply([{"role": "user", "content": "Hello"}], thinker=thinker, talker=talker))

    with OmniSession(bundle, open_backend("ort-cpu", bundle, threads=1), max_context=1024) as session:
        exact = reply(session)
    backend = TrtBackend(bundle, "tensorrt-rtx", runtime=FakeRuntime(bundle, driver), driver=driver)  # type: ignore[arg-type]
    graph = backend.graph("thinker")
    cache = graph.new_cache(1024)
    with OmniSession(bundle, backend) as session:
        got = reply(session)
        assert reply(session)[2].token_ids == got[2].token_ids
        assert stub.left[0] > 1_000_000
    assert (got[2].token_ids, got[2].codec_ids) == (exact[2].token_ids, exact[2].codec_ids)
    assert np.allclose(got[1], exact[1], atol=1e-2 * float(np.std(exact[1])))
    assert stub.left == (0, 0, 0)
    assert not driver.problems
    assert stub.fault == ""
    assert cache.capacity == 1024
    with pytest.raises(BackendError, match="closed"):
        graph.run(feeds_of(backend, 1), cache)
