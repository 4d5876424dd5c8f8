"""Checkpoints of the published sizes without their data: the same files, byte for byte of size."""

from __future__ import annotations

from pathlib import Path

import pytest
from omniport.export.checkpoint.checkpoint import Checkpoint
from omniport.export.synthetic import make_checkpoint as synthetic
from omniport.export.synthetic import random_weights
from support.command_line import Omniport

#: tensors, and bytes of each shard as published; without the metadata that ours have where the published have none
_PUBLISHED = {
    "3b": (2544, [4994850880, 4999787448, 1978024880], 0),
    "7b": (2448, [4985055504, 4991496800, 4991496904, 4969489824, 2425322160], 32),
}


def _sparse(folder: Path, size: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose shards have headers and holes."""
    monkeypatch.setattr(random_weights, "tensor_blocks", lambda *_: iter(()))
    monkeypatch.setattr(synthetic, "check_space", lambda *_: None)
    write = random_weights._write_shard

    def hollow(path: Path, shapes: dict[str, tuple[int, ...]], *rest: object) -> object:
        yield from write(path, shapes, *rest)  # type: ignore[arg-type]
        size = path.stat().st_size + sum(random_weights.stored_bytes(key, shape) for key, shape in shapes.items())
        with open(path, "rb+") as file:
            file.truncate(size)

    monkeypatch.setattr(random_weights, "_write_shard", hollow)
    return synthetic.make_checkpoint(folder, size)


@pytest.mark.parametrize("size", _PUBLISHED)
def test_files_are_those_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str, omniport: Omniport
) -> None:
    folder = _sparse(tmp_path / size, size, monkeypatch)
    tensors, shards, metadata = _PUBLISHED[size]
    assert [path.stat().st_size - metadata for path in sorted(folder.glob("*.safetensors"))] == shards
    ckpt = Checkpoint.open(folder)
    names = ckpt.keys()
    assert len(names) == tensors
    dtypes = {(key.startswith("token2wav."), ckpt.dtype(key)) for key in names}
    assert dtypes == {(True, "float32"), (False, "bfloat16")}
    code, out, err = omniport("plan", folder)
    assert code == 0, out + err
