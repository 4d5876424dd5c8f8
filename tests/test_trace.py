"""The cache of traced graphs: same graph with and without it, no weights in it, damage repaired."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from omniport.export.checkpoint import Checkpoint
from omniport.export.graph_defs import GraphDefinition, graph_definitions
from omniport.export.onnx_export import write_model
from omniport.export.trace import cache_folder, trace
from omniport.runtime.solver import rk4_schedule


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMNIPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "graphs"


@pytest.fixture(scope="module")
def audio(tiny_checkpoint: Path) -> tuple[Checkpoint, GraphDefinition]:
    ckpt = Checkpoint.open(tiny_checkpoint)
    return ckpt, graph_definitions(ckpt.config, "fp32", 256, rk4_schedule(), False)["audio_encoder"]


def written(audio: tuple[Checkpoint, GraphDefinition], folder: Path) -> tuple[bytes, bytes]:
    folder.mkdir()
    model, rules = trace(audio[1])
    (data,) = write_model(model, rules, audio[0], folder / "graph.onnx", lambda _: None)
    return (folder / "graph.onnx").read_bytes(), data.read_bytes()


def test_cached_graph_gives_the_same_files(
    audio: tuple[Checkpoint, GraphDefinition], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = written(audio, tmp_path / "first")
    (file,) = cache.iterdir()
    monkeypatch.setattr("torch.onnx.export", lambda *_, **__: pytest.fail("traced again"))
    assert written(audio, tmp_path / "second") == first
    # The cache holds no weights: it is smaller than any of the encoder's matrices together.
    assert file.stat().st_size < 200_000 < len(first[1])


def test_damaged_cache_is_traced_again(audio: tuple[Checkpoint, GraphDefinition], cache: Path, tmp_path: Path) -> None:
    first = written(audio, tmp_path / "first")
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert written(audio, tmp_path / "second") == first
    assert file.read_bytes() == whole


def test_weights_are_never_folded(audio: tuple[Checkpoint, GraphDefinition], cache: Path) -> None:
    model, rules = trace(audio[1])
    for name in rules:
        assert model.graph.initializers[name].const_value is None or isinstance(
            model.graph.initializers[name].const_value, ir.Tensor
        )
    weights = [name for name in rules if name.endswith("proj.weight")]
    assert weights
    assert all(model.graph.initializers[name].const_value is None for name in weights)


def test_unwritable_cache_is_no_failure(
    audio: tuple[Checkpoint, GraphDefinition], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("OMNIPORT_CACHE", str(tmp_path / "file"))
    model, _ = trace(audio[1])
    assert len(model.graph) > 10


def test_cache_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNIPORT_CACHE", "")
    assert cache_folder() is None
    monkeypatch.delenv("OMNIPORT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/omniport")


def test_geometry_and_precision_are_part_of_the_key(audio: tuple[Checkpoint, GraphDefinition], cache: Path) -> None:
    ckpt, definition = audio
    half = graph_definitions(ckpt.config, "fp16", 256, rk4_schedule(), False)["audio_encoder"]
    trace(definition)
    model, _ = trace(half)
    assert len(list(cache.iterdir())) == 2
    weight = model.graph.initializers["proj.weight"]
    assert weight.dtype == ir.DataType.FLOAT16
    assert np.prod(weight.shape.numpy()) > 0 if weight.shape is not None else False
