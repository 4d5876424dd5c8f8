"""The cache of traced graphs: same graph with and without it, no weights in it, damage repaired."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import onnx_ir as ir
import pytest
from omniport.export.checkpoint.checkpoint import Checkpoint
from omniport.export.graphs import trace as tracing
from omniport.export.graphs.trace import trace
from omniport.export.graphs.writer import write_model
from omniport.export.models.model_parts import graph_definitions
from omniport.export.models.part import GraphDefinition
from omniport.runtime.speech.ode import rk4_schedule


class Traced(NamedTuple):
    """The audio encoder, traced once into a cache of its own, and the files written from it."""

    ckpt: Checkpoint
    definition: GraphDefinition
    cache: Path
    files: tuple[bytes, bytes]


def written(ckpt: Checkpoint, definition: GraphDefinition, folder: Path) -> tuple[bytes, bytes]:
    folder.mkdir(parents=True)
    model, rules = trace(definition)
    (data,) = write_model(model, rules, ckpt, folder / "graph.onnx", lambda _: None)
    return (folder / "graph.onnx").read_bytes(), data.read_bytes()


@pytest.fixture(scope="module")
def traced(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    folder = tmp_path_factory.mktemp("trace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMNIPORT_CACHE", str(folder / "cache"))
        ckpt = Checkpoint.open(tiny_checkpoint)
        definition = graph_definitions(ckpt.config, "fp32", 256, rk4_schedule(), False)["audio_encoder"]
        files = written(ckpt, definition, folder / "first")
        yield Traced(ckpt, definition, folder / "cache" / "graphs", files)


def test_cached_graph_gives_the_same_files(traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.onnx.export", lambda *_, **__: pytest.fail("traced again"))
    assert written(traced.ckpt, traced.definition, tmp_path / "second") == traced.files


def test_cache_holds_no_weights(traced: Traced) -> None:
    (file,) = traced.cache.iterdir()
    assert file.stat().st_size < 200_000 < len(traced.files[1])
    model, rules = trace(traced.definition)
    weights = [name for name in rules if name.endswith("proj.weight")]
    assert weights
    assert all(model.graph.initializers[name].const_value is None for name in weights)


def test_damaged_cache_is_traced_again(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = traced.cache.iterdir()
    whole = file.read_bytes()
    model, _ = trace(traced.definition)
    monkeypatch.setattr(tracing, "_trace", lambda *_: model)
    file.write_bytes(whole[: len(whole) // 2])
    assert trace(traced.definition)[0] is model
    assert file.read_bytes() == whole


def test_unwritable_cache_is_no_failure(traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = trace(traced.definition)
    monkeypatch.setattr(tracing, "_trace", lambda *_: model)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("OMNIPORT_CACHE", str(tmp_path / "file"))
    assert trace(traced.definition)[0] is model


def test_precision_is_part_of_the_key(traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNIPORT_CACHE", str(tmp_path))
    half = graph_definitions(traced.ckpt.config, "fp16", 256, rk4_schedule(), False)["audio_encoder"]
    model, _ = trace(half)
    (name,) = [file.name for file in (tmp_path / "graphs").iterdir()]
    assert name not in {file.name for file in traced.cache.iterdir()}
    assert model.graph.initializers["proj.weight"].dtype == ir.DataType.FLOAT16
