"""What is read and written once does not stay in the page cache."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from omniport.calib.quantizer import quantize
from omniport.export.checkpoint.safetensors import SafetensorsFile
from omniport.export.graphs import writer as onnx_export
from omniport.export.models.module import Copy, Transpose
from omniport.runtime.bundle.data_file import DataFile
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.system import page_cache
from omniport.runtime.system.page_cache import WriteBehind
from safetensors.torch import save_file

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot be told about its cache")

STEP = 1 << 16


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """(advice, first byte, bytes) of all that the system is told; it is told nothing."""
    calls: list[tuple[str, int, int]] = []
    names = {os.POSIX_FADV_WILLNEED: "expect", os.POSIX_FADV_DONTNEED: "forget"}

    def advise(_: int, first: int, count: int, advice: int) -> None:
        calls.append((names[advice], first, count))

    system = SimpleNamespace(
        posix_fadvise=advise,
        POSIX_FADV_WILLNEED=os.POSIX_FADV_WILLNEED,
        POSIX_FADV_DONTNEED=os.POSIX_FADV_DONTNEED,
    )
    monkeypatch.setattr(page_cache, "os", system)
    monkeypatch.setattr(WriteBehind, "STEP", STEP)
    return calls


def test_all_of_a_growing_file_is_told_of_twice(told: list[tuple[str, int, int]], tmp_path: Path) -> None:
    """Once to be written, and once more, steps later, to be dropped when it was."""
    with DataFile(tmp_path / "data") as file:
        for _ in range(5):
            file.append(np.zeros(3 * STEP + 100, np.uint8))
        file.finish()
    times = np.zeros(5 * (3 * STEP + 100), int)
    for what, first, count in told:
        assert what == "forget"
        assert count <= (2 + WriteBehind.BEHIND) * STEP
        times[first : first + count] += 1
    written = len(times) - (1 + WriteBehind.BEHIND) * STEP - 100  # the end is left to the system
    assert times[:written].min() >= 2


def test_small_files_stay(told: list[tuple[str, int, int]], tmp_path: Path) -> None:
    with DataFile(tmp_path / "data") as file:
        file.append(np.zeros(STEP - 1, np.uint8))
        file.finish()
    assert told == []


@pytest.mark.parametrize("rule", [Copy("w"), Transpose("w")])
def test_a_weight_is_forgotten_when_it_was_read_for_the_last_time(
    monkeypatch: pytest.MonkeyPatch, told: list[tuple[str, int, int]], tmp_path: Path, rule: Copy | Transpose
) -> None:
    """Panels read it again and again: every byte is dropped once, and in the last of them only."""
    monkeypatch.setattr(onnx_export, "PANEL_BYTES", 1 << 12)
    monkeypatch.setattr("omniport.export.models.module.BLOCK_BYTES", 1 << 12)
    save_file({"w": torch.zeros(256, 64)}, tmp_path / "w.safetensors")
    file = SafetensorsFile.open(tmp_path / "w.safetensors")
    reader = SimpleNamespace(shape=lambda key: file.entries[key].shape, read=file.read, forget=file.forget)
    blocks = list(onnx_export._blocks_of(rule, torch.float32, reader))
    forgotten = [(first, count) for what, first, count in told if what == "forget"]
    assert sum(count for _, count in forgotten) == 256 * 64 * 4
    assert [first for first, _ in forgotten] == sorted({first for first, _ in forgotten})
    assert (len(forgotten) < len(blocks)) == isinstance(rule, Transpose)
    assert forgotten[0][0] == file.entries["w"].begin


def test_quantizing_forgets_every_weight_once(
    monkeypatch: pytest.MonkeyPatch, told: list[tuple[str, int, int]], tiny_bundle: Path, tmp_path: Path
) -> None:
    """Those that it rounds and those that it copies; graphs that it takes over as they are, it does not read."""
    monkeypatch.setattr(WriteBehind, "STEP", 1 << 40)  # what is written is not what this is about
    quantize(tiny_bundle, tmp_path / "w8", "w8")
    rewritten = Bundle.open(tmp_path / "w8").manifest.quantization.layers  # type: ignore[union-attr]
    assert {"thinker", "talker"} <= rewritten.keys()
    wanted = []
    for name in rewritten:
        graph = onnx.load(tiny_bundle / f"graphs/{name}.onnx", load_external_data=False).graph
        places = [{entry.key: entry.value for entry in t.external_data} for t in graph.initializer if t.external_data]
        wanted += [("forget", int(place["offset"]), int(place["length"])) for place in places]
    assert sorted(told) == sorted(wanted)


def test_systems_without_advice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(page_cache, "os", SimpleNamespace())
    monkeypatch.setattr(WriteBehind, "STEP", STEP)
    with DataFile(tmp_path / "data") as file:
        file.append(np.ones(3 * STEP, np.uint8))
        assert file.finish().size == 3 * STEP
    page_cache.expect(0, 0, 1)


def test_files_that_take_no_advice() -> None:
    """It is advice: a file that the system cannot be told about is read and written all the same."""
    reading, writing = os.pipe()
    try:
        with pytest.raises(OSError, match="seek"):
            os.posix_fadvise(writing, 0, 1, os.POSIX_FADV_DONTNEED)
        page_cache.expect(reading, 0, 1)
        WriteBehind(writing).wrote(WriteBehind.STEP)
    finally:
        os.close(reading)
        os.close(writing)
