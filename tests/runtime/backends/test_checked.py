"""Runs that take too long end the reply, and outputs that are not what the spec says never reach it."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import pytest
from omniport.runtime import OmniSession, UsageError
from omniport.runtime.backends.base import Array, Backend, Graph, KvCache, Outputs, RunHandle
from omniport.runtime.backends.checked import CheckedBackend
from omniport.runtime.bundle.graph_spec import DimRange, GraphSpec, TensorSpec
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import BackendError
from support.timing import ratio

SPEC = GraphSpec(
    name="dit",
    file="dit.onnx",
    data=(),
    opset=24,
    precision="float32",
    inputs=(TensorSpec("x", "float32", ("batch", "2*codes", 80)), TensorSpec("codes", "int64", ("batch", "codes"))),
    outputs=(TensorSpec("velocity", "float32", ("batch", "2*codes", 80)), TensorSpec("other", "float32", ("free", 3))),
    dims={"batch": DimRange(1, 1, 1), "codes": DimRange(1, 60, 4096), "free": DimRange(1, 1, 9)},
    inputs_key="0" * 64,
)
FEEDS = {"x": np.zeros((1, 24, 80), np.float32), "codes": np.zeros((1, 12), np.int64)}
GOOD = {"velocity": np.ones((1, 24, 80), np.float32), "other": np.ones((7, 3), np.float32)}


class Handle(RunHandle):
    def __init__(self) -> None:
        self.stopped = threading.Event()

    def stop(self) -> None:
        self.stopped.set()


class Given(Graph):
    """Gives these outputs after some time; until then it can be stopped, unless it is ``stubborn``."""

    def __init__(self, outputs: Outputs, seconds: float = 0.0, stubborn: bool = False) -> None:
        self.outputs, self.seconds, self.stubborn = outputs, seconds, stubborn

    def handle(self) -> RunHandle | None:
        return None if self.stubborn else Handle()

    def run(self, feeds: Mapping[str, Array], cache: KvCache | None = None, handle: RunHandle | None = None) -> Outputs:
        if isinstance(handle, Handle):
            if self.seconds and handle.stopped.wait(self.seconds):
                raise BackendError("stopped")
        elif self.seconds:
            time.sleep(self.seconds)
        return self.outputs


class One(Backend):
    name = "one"

    def __init__(self, graph: Graph) -> None:
        self.only = graph

    def graph(self, name: str) -> Graph:
        return self.only

    def close(self) -> None: ...


def run(graph: Graph, limit: float | None = None) -> Outputs:
    return CheckedBackend(One(graph), {"dit": SPEC}, limit).graph("dit").run(FEEDS)


def test_what_the_spec_says_passes() -> None:
    assert run(Given(GOOD)) is GOOD
    assert run(Given(GOOD), limit=5) is GOOD
    unlisted = CheckedBackend(One(Given({"a": np.zeros(3, np.float32)})), {}).graph("dit")
    assert list(unlisted.run(FEEDS)) == ["a"]


@pytest.mark.parametrize(
    ("outputs", "match"),
    [
        ({"velocity": np.ones((1, 22, 80), np.float32)}, r"'velocity' of shape \[1, 22, 80\], not \[1, 24, 80\]"),
        ({"velocity": np.ones((1, 24, 79), np.float32)}, r"not \[1, 24, 80\]"),
        ({"velocity": np.ones((24, 80), np.float32)}, r"'velocity' of shape \[24, 80\]"),
        ({"velocity": np.ones((1, 24, 80), np.float64)}, "'velocity' as float64, not float32"),
        ({"other": np.ones((7, 4), np.float32)}, r"'other' of shape \[7, 4\], not \[\?, 3\]"),
    ],
)
def test_other_outputs_are_refused(outputs: Outputs, match: str) -> None:
    with pytest.raises(BackendError, match=rf"graph 'dit' gives .*{match}.*: its file .*Export it again"):
        run(Given(GOOD | outputs))


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_run_that_takes_too_long(stubborn: bool) -> None:
    started = time.perf_counter()
    with pytest.raises(BackendError, match=r"a run of graph 'dit' took longer than run_limit, 0\.05 s"):
        run(Given(GOOD, seconds=0.2 if stubborn else 60, stubborn=stubborn), limit=0.05)
    assert time.perf_counter() - started < 30, "one that can be stopped is"
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


def test_another_error_keeps_its_words() -> None:
    class Broken(Given):
        def run(self, *_: object, **__: object) -> Outputs:
            raise BackendError("out of memory")

    with pytest.raises(BackendError, match="out of memory"):
        run(Broken(GOOD), limit=60)


def test_checking_costs_little() -> None:
    """Far less than the smallest run of a real graph, some 100 microseconds."""
    checked = CheckedBackend(One(Given(GOOD)), {"dit": SPEC}).graph("dit")

    def real() -> None:
        np.ones((400, 400), np.float32) @ np.ones((400, 400), np.float32)

    assert ratio(lambda: checked.run(FEEDS), real) < 1


def test_a_reply_ends_and_the_next_goes_on(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    hello = [{"role": "user", "content": "Hello"}]
    with (
        OmniSession.open(tiny_bundle, backend="ort-cpu", threads=1, run_limit=1e-6) as session,
        pytest.raises(BackendError, match="run_limit"),
    ):
        list(session.reply(hello, speak=False))
    with OmniSession.open(tiny_bundle, backend="ort-cpu", threads=1, run_limit=600) as session:
        few = msgspec.structs.replace(bundle.manifest.thinker_sampling, max_new_tokens=3)
        assert list(session.reply(hello, speak=False, thinker=few))


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf")])
def test_limits_that_are_none(tiny_bundle: Path, limit: float) -> None:
    with pytest.raises(UsageError, match="run_limit"):
        OmniSession.open(tiny_bundle, run_limit=limit)
