"""Memory of a validation run: a team of graphs is loaded at a time, freed memory goes back, references are sized."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from omniport.export.checkpoint.checkpoint import Checkpoint
from omniport.export.evaluation import machine
from omniport.export.evaluation.reference_modules import load_reference, reference_bytes
from omniport.export.models.module import torch_threads
from omniport.export.validation import validate as run
from omniport.export.validation.checks import end_to_end as end_to_end_checks
from omniport.export.validation.checks import speech_runs
from omniport.export.validation.low_memory_backend import LowMemoryBackend
from omniport.export.validation.types import PASS
from omniport.runtime.backends.base import Backend, Graph
from omniport.runtime.bundle.parts import PARTS
from omniport.runtime.errors import BackendError
from omniport.runtime.system.host import physical_cores

LINUX = sys.platform.startswith("linux")


class Cache:
    capacity, nbytes = 8, 0


class Noted(Backend):
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


class NotedGraph(Graph):
    def __init__(self, backend: Noted, name: str) -> None:
        self.backend, self.name = backend, name

    def run(
        self, feeds: Mapping[str, NDArray[Any]], cache: Any = None, handle: Any = None
    ) -> dict[str, NDArray[np.float32]]:
        self.backend.log.append(f"{self.name} of {self.backend.number}")
        return {}

    def new_cache(self, capacity: int) -> Cache:
        return Cache()


@pytest.fixture
def noted() -> tuple[LowMemoryBackend, list[str]]:
    log: list[str] = []
    made: list[Noted] = []

    def make() -> Noted:
        made.append(Noted(log, len(made) + 1))
        return made[-1]

    return LowMemoryBackend(make), log


def test_one_team_is_loaded_at_a_time(noted: tuple[LowMemoryBackend, list[str]]) -> None:
    backend, log = noted
    assert backend.name == "noted"
    for name in ("thinker", "talker", "dit", "bigvgan", "thinker"):
        backend.graph(name).run({})
    loads = ["thinker of 2", "talker of 2", "close 2", "dit of 3", "bigvgan of 3", "close 3", "thinker of 4"]
    assert log == ["close 1", *loads]  # the first one was opened to see that it can be


def test_asking_for_a_known_graph_loads_nothing(noted: tuple[LowMemoryBackend, list[str]]) -> None:
    """A session asks for graphs long before it runs them."""
    backend, log = noted
    for name in ("thinker", "dit"):
        backend.graph(name)
    before = ["close 1", "close 2"]
    assert log == before
    graphs = [backend.graph(name) for name in ("thinker", "dit", "thinker")]
    assert log == before
    graphs[1].run({})
    assert log == [*before, "dit of 3"]


def test_a_cache_goes_with_its_team(noted: tuple[LowMemoryBackend, list[str]]) -> None:
    backend, log = noted
    thinker = backend.graph("thinker")
    cache = thinker.new_cache(8)
    start, later = ({"write_index": np.full(1, at)} for at in (0, 5))
    thinker.run(start, cache)
    thinker.run(later, cache)
    backend.graph("dit").run({})
    with pytest.raises(BackendError, match="given up"):
        thinker.run(later, cache)
    assert (cache.capacity, cache.nbytes) == (8, 0)
    thinker.run(start, cache)  # the next reply writes it anew
    thinker.run(later, cache)
    runs = [entry for entry in log if not entry.startswith("close")]
    assert runs == ["thinker of 2", "thinker of 2", "dit of 3", "thinker of 4", "thinker of 4"]
    backend.close()
    assert log[-1] == "close 4"


def test_what_cannot_be_loaded_shows_at_once(noted: tuple[LowMemoryBackend, list[str]]) -> None:
    with pytest.raises(BackendError, match="missing"):
        noted[0].graph("missing")


@pytest.mark.slow
def test_replies_in_turns_pass(
    tiny_bundle: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A large bundle's conversations, speech and recogniser: graphs come and go, and nothing is missed."""
    monkeypatch.setattr(machine, "_LARGE", 0)
    monkeypatch.setattr(end_to_end_checks, "_QUICK", ("audio and image",))
    monkeypatch.setattr(speech_runs, "QUICK_LENGTHS", (13,))
    heard = f"{sys.executable} -c \"print('a word')\""
    report, _ = run.validate(tiny_bundle, tiny_checkpoint, graphs=("end_to_end", "speech"), asr=heard)
    assert [(c.stage, c.name, c.message) for c in report.checks if c.status != PASS] == []
    assert any("word_error_rate" in check.figures for check in report.checks)


@pytest.mark.parametrize("limit", [0, 1 << 40])
def test_large_bundles_load_a_team_at_a_time(
    limit: int, tiny_bundle: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[type] = []

    def group(context: Any) -> Any:
        seen.append(type(context.backend))
        return iter(())

    monkeypatch.setattr(machine, "_LARGE", limit)
    monkeypatch.setattr("omniport.export.validation.checks.speech.speech_checks", group)
    report, _ = run.validate(tiny_bundle, tiny_checkpoint, graphs=("speech",))
    assert (seen == [LowMemoryBackend]) == (limit == 0)
    assert report.backend == "ort-cpu"
    assert report.environment["threads"] == ("1" if limit else str(physical_cores()))


def test_the_reference_takes_no_more_threads() -> None:
    before = torch.get_num_threads()
    with torch_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("graph", PARTS)
def test_the_size_of_a_reference_part(graph: str, tiny_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    module = load_reference(checkpoint, graph)
    held = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
    assert reference_bytes(checkpoint, graph) == held > 10_000
