"""Memory of a validation run: graphs take turns, freed memory goes back, references are sized without being read."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from omniport.export.checkpoint import Checkpoint
from omniport.export.reference_parts import load_reference, reference_bytes
from omniport.export.validation import machine, run
from omniport.export.validation.memory import give_back, peak_memory
from omniport.export.validation.turns import TurnsBackend
from omniport.runtime.backends import open_backend
from omniport.runtime.backends.base import Graph
from omniport.runtime.backends.ort import physical_cores
from omniport.runtime.bundle import Bundle
from omniport.runtime.errors import BackendError
from omniport.runtime.graphs import GRAPH_NAMES

LINUX = sys.platform.startswith("linux")


class Cache:
    capacity, nbytes = 8, 0


class Noted:
    """A backend that notes what is loaded and run."""

    name = "noted"

    def __init__(self, log: list[str], number: int) -> None:
        self.log, self.number = log, number

    def graph(self, name: str) -> Graph:
        if name == "missing":
            raise BackendError("no graph 'missing'")
        return NotedGraph(self, name)

    def close(self) -> None:
        self.log.append(f"close {self.number}")


class NotedGraph:
    def __init__(self, backend: Noted, name: str) -> None:
        self.backend, self.name = backend, name

    def run(self, feeds: Mapping[str, NDArray[Any]], cache: Any = None) -> dict[str, NDArray[np.float32]]:
        self.backend.log.append(f"{self.name} of {self.backend.number}")
        return {}

    def new_cache(self, capacity: int) -> Cache:
        return Cache()


@pytest.fixture
def noted() -> tuple[TurnsBackend, list[str]]:
    log: list[str] = []
    made: list[Noted] = []

    def make() -> Noted:
        made.append(Noted(log, len(made) + 1))
        return made[-1]

    return TurnsBackend(make), log


def test_one_team_is_loaded_at_a_time(noted: tuple[TurnsBackend, list[str]]) -> None:
    backend, log = noted
    assert backend.name == "noted"
    for name in ("thinker", "talker", "dit", "bigvgan", "thinker"):
        backend.graph(name).run({})
    assert log == ["thinker of 1", "talker of 1", "close 1", "dit of 2", "bigvgan of 2", "close 2", "thinker of 3"]


def test_asking_for_a_known_graph_loads_nothing(noted: tuple[TurnsBackend, list[str]]) -> None:
    """A session asks for graphs long before it runs them."""
    backend, log = noted
    for name in ("thinker", "dit"):
        backend.graph(name)
    assert log == ["close 1"]
    graphs = [backend.graph(name) for name in ("thinker", "dit", "thinker")]
    assert log == ["close 1"]
    graphs[1].run({})
    assert log == ["close 1", "dit of 2"]


def test_a_cache_stays_with_the_graph_that_made_it(noted: tuple[TurnsBackend, list[str]]) -> None:
    backend, log = noted
    thinker = backend.graph("thinker")
    cache = thinker.new_cache(8)
    backend.graph("dit").run({})
    thinker.run({}, cache)
    assert log == ["close 1", "dit of 2", "thinker of 1"]
    backend.close()
    assert log[-1] == "close 2"


def test_what_cannot_be_loaded_shows_at_once(noted: tuple[TurnsBackend, list[str]]) -> None:
    with pytest.raises(BackendError, match="missing"):
        noted[0].graph("missing")


def test_turns_compute_what_the_backend_does(tiny_bundle: Path) -> None:
    """Decoding goes on after its graph had to make room for another."""
    bundle = Bundle.open(tiny_bundle)
    width = bundle.manifest.thinker.embedding_size
    rows = np.random.default_rng(0).standard_normal((1, 6, width), np.float32)
    mel = np.random.default_rng(1).normal(-5, 2, (1, 80, 7)).astype(np.float32)

    def hidden(backend: Any) -> NDArray[np.float32]:
        graph = backend.graph("thinker")
        cache = graph.new_cache(4096)
        states = []
        for start, stop in ((0, 4), (4, 6)):
            feeds = {
                "inputs_embeds": np.ascontiguousarray(rows[:, start:stop]),
                "position_ids": np.tile(np.arange(start, stop), (3, 1, 1)),
                "kv_positions": np.arange(stop),
                "write_index": np.full(1, start, np.int64),
            }
            states.append(graph.run(feeds, cache)["hidden"])
            assert backend.graph("bigvgan").run({"mel": mel})["wav"].std() > 0
        return np.concatenate(states, axis=1)

    plain, turns = open_backend("ort-cpu", bundle), TurnsBackend(lambda: open_backend("ort-cpu", bundle))
    np.testing.assert_array_equal(hidden(turns), hidden(plain))
    assert hidden(plain).std() > 0.1
    plain.close()
    turns.close()


@pytest.mark.parametrize("limit", [0, 1 << 40])
def test_large_bundles_take_turns(
    limit: int, tiny_bundle: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[type] = []

    def group(context: Any) -> Any:
        seen.append(type(context.backend))
        return iter(())

    monkeypatch.setattr(machine, "_LARGE", limit)
    monkeypatch.setattr("omniport.export.validation.speech_checks.speech_checks", group)
    report, _ = run.validate(tiny_bundle, tiny_checkpoint, graphs=("speech",))
    assert (seen == [TurnsBackend]) == (limit == 0)
    assert report.backend == "ort-cpu"
    assert report.environment["threads"] == ("1" if limit else str(physical_cores()))


def test_the_reference_takes_no_more_threads() -> None:
    before = torch.get_num_threads()
    with machine.limited_torch(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


# memory of the process


def resident() -> int:
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_freed_memory_goes_back() -> None:
    import ctypes

    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("this C library gives memory back by itself")
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    size = 100_000  # below the threshold above which glibc maps blocks, and so unmaps them when freed
    blocks = [libc.malloc(size) for _ in range(1000)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks[:-1]:  # the last one keeps the top of the heap in use
        libc.free(block)
    before = resident()
    give_back()
    assert before - resident() > 80 << 20
    libc.free(blocks[-1])


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_peak_memory_is_this_process_own() -> None:
    peak = peak_memory()
    assert resident() <= peak
    held = np.ones(64 << 20, np.uint8)
    assert peak_memory() >= max(peak, resident())
    assert held[0] == 1


@pytest.mark.parametrize("graph", GRAPH_NAMES)
def test_the_size_of_a_reference_part(graph: str, tiny_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    module = load_reference(checkpoint, graph)
    held = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
    assert reference_bytes(checkpoint, graph) == held > 10_000
