"""Weights on their way to the data file: transposed in panels, in order, hashed while they are written."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from omniport.export.graphs import writer as onnx_export
from omniport.export.models.module import Transpose, to_numpy, to_torch, torch_threads
from omniport.runtime.bundle.data_file import ALIGNMENT, DataFile
from omniport.runtime.errors import CheckpointError


class Stored:
    """One weight [rows, columns] as a checkpoint would give it."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value
        self.reads = 0
        self.forgotten: list[tuple[int, int | None]] = []

    def shape(self, _: str) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def read(self, _: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        self.reads += 1
        return to_numpy(self.value[start:stop].clone())

    def forget(self, _: str, start: int = 0, stop: int | None = None) -> None:
        self.forgotten.append((start, stop))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(300, 64), (7, 12), (513, 31), (33, 1), (64, 2, 6)])
@pytest.mark.parametrize("panel", [1 << 12, 1 << 20])
def test_transposed_in_panels(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shape: tuple[int, ...], panel: int
) -> None:
    """Panels follow one another as the rows of the transposed weight, whatever divides what."""
    monkeypatch.setattr(onnx_export, "PANEL_BYTES", panel)
    monkeypatch.setattr("omniport.export.models.module.BLOCK_BYTES", 1 << 13)
    stored = Stored(torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16())
    blocks = onnx_export._blocks_of(Transpose("w"), dtype, stored)
    pieces = list(onnx_export._transposed(shape, dtype, blocks))
    assert next(blocks, None) is None
    wanted = stored.value.reshape(shape[0], -1).t().to(dtype).float()
    got = torch.cat([to_torch(piece).float() for piece in pieces])
    assert torch.equal(got, wanted)
    assert all(piece.flags.c_contiguous for piece in pieces)
    assert max(piece.nbytes for piece in pieces) <= max(panel, 8 * shape[0])


def test_weights_that_are_not_finite_are_named() -> None:
    stored = Stored(torch.full((8, 8), 70000.0))
    with pytest.raises(CheckpointError, match=r"'w' holds values that are not finite in float16"):
        list(onnx_export._blocks_of(Transpose("w"), torch.float16, stored))


def test_file_is_hashed_as_it_is_written(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    pieces = [draw.integers(0, 255, size, dtype=np.uint8) for size in (10, ALIGNMENT, 100_000, 1)]
    with DataFile(tmp_path / "data") as file:
        offsets = []
        for piece in pieces:
            offsets.append(file.align())
            file.append(piece)
        record = file.finish()
    content = (tmp_path / "data").read_bytes()
    assert record.size == len(content) == offsets[-1] + 1
    assert record.sha256 == hashlib.sha256(content).hexdigest()
    assert offsets[1] == ALIGNMENT
    for offset, piece in zip(offsets, pieces, strict=True):
        assert offset % ALIGNMENT == 0
        assert content[offset : offset + len(piece)] == piece.tobytes()


def write(path: Path, pieces: int, failure: type[BaseException] | None = None, finish: bool = True) -> None:
    """Append some pieces, then fail if so asked."""
    with DataFile(path) as file:
        for _ in range(pieces):
            file.append(np.zeros(8192, np.uint8))
        if failure is not None:
            raise failure
        if finish:
            file.finish()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
@pytest.mark.parametrize(("pieces", "finish"), [(4, True), (1, True), (1, False)])
def test_full_disk_is_told_to_the_caller(pieces: int, finish: bool) -> None:
    """While there is more to write, when the record is asked for, and at the latest when the block ends."""
    with pytest.raises(OSError, match="No space left"):
        write(Path("/dev/full"), pieces, finish=finish)


def test_failure_of_the_caller_is_the_one_that_is_seen(tmp_path: Path) -> None:
    running = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "data", 3, KeyboardInterrupt)
    assert threading.active_count() == running


def fail_with_one_thread() -> None:
    with torch_threads(1):
        assert torch.get_num_threads() == 1
        raise LookupError


def test_threads_of_torch_are_given_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    with pytest.raises(LookupError):
        fail_with_one_thread()
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == 3
