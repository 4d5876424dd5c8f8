"""Checkpoints of the published sizes without their data: the same files, byte for byte of size."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from omniport.export.checkpoint.checkpoint import Checkpoint
from omniport.export.synthetic import make_checkpoint as synthetic
from omniport.export.synthetic import random_weights
from support.command_line import Omniport


@dataclass(frozen=True)
class _Published:
    """What is published of one size.

    Attributes:
        layout: sha256 over a line for every tensor: name, dtype and shape, sorted by name.
        shards: size of each file in bytes.
        index: size of the index in bytes, where it is known.
    """

    tensors: int
    layout: str
    shards: list[int]
    index: int | None = None


_PUBLISHED = {
    "3b": _Published(
        2544,
        "351460eb7429e7e097a6914b5f2213551d601a31d8d2647075bfb9bb2b89368c",
        [4994850880, 4999787448, 1978024880],
    ),
    "7b": _Published(
        2448,
        "b2f5e755d3bc8094e60a96da7e07100b160bec533b48f379fa73a23cc8939730",
        [4985055504, 4991496800, 4991496904, 4969489824, 2425322160],
        233160,
    ),
}
#: exports one graph and prints the peak memory of that
_EXPORT = """
import sys
from omniport.export.exporter import export_checkpoint
from omniport.runtime.system.host import peak_memory
export_checkpoint(sys.argv[1], sys.argv[2], precision="bf16", graphs=["bigvgan"])
print(peak_memory())
"""


def _sparse(folder: Path, size: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose shards have headers and holes."""
    monkeypatch.setattr(random_weights, "tensor_blocks", lambda *_: iter(()))
    monkeypatch.setattr(synthetic, "check_space", lambda *_: None)
    write = random_weights._write_shard

    def hollow(path: Path, shapes: dict[str, tuple[int, ...]], *rest: object) -> object:
        yield from write(path, shapes, *rest)  # type: ignore[arg-type]
        size = path.stat().st_size + sum(random_weights.stored_bytes(key, shape) for key, shape in shapes.items())
        os.truncate(path, size)

    monkeypatch.setattr(random_weights, "_write_shard", hollow)
    return synthetic.make_checkpoint(folder, size)


def _layout(folder: Path) -> str:
    """`_Published.layout` of the shards in a folder."""
    entries: dict[str, dict[str, object]] = {}
    for shard in folder.glob("*.safetensors"):
        with open(shard, "rb") as file:
            entries |= json.loads(file.read(int.from_bytes(file.read(8), "little")))
    entries.pop("__metadata__", None)
    lines = (f"{name} {entry['dtype']} {entry['shape']}" for name, entry in sorted(entries.items()))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("size", _PUBLISHED)
def test_files_are_those_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str, omniport: Omniport
) -> None:
    """The checkpoint is planned, exported in part and inspected, without the gigabytes that its files stand for."""
    folder, bundle, published = tmp_path / size, tmp_path / "bundle", _PUBLISHED[size]
    with monkeypatch.context() as patch:
        _sparse(folder, size, patch)
    assert [path.stat().st_size for path in sorted(folder.glob("*.safetensors"))] == published.shards
    assert published.index in (None, (folder / "model.safetensors.index.json").stat().st_size)
    assert len(Checkpoint.open(folder).keys()) == published.tensors
    assert _layout(folder) == published.layout
    code, out, err = omniport("plan", folder)
    assert code == 0, out + err
    done = subprocess.run([sys.executable, "-c", _EXPORT, folder, bundle], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1 << 30
    code, out, err = omniport("inspect", bundle, "--json")
    assert code == 0, out + err
    assert list(json.loads(out)["graph_bytes"]) == ["bigvgan"]
    shutil.rmtree(bundle)  # its embeddings take a gigabyte
