"""Decide which graphs of an older bundle can be reused: a key over all inputs of a graph, and file checksums.

A key covers the checkpoint (its fingerprint, and size and time of every shard, as ``make`` would), the graph's borders
and precision, the source code that traces and writes it, and the versions of the libraries underneath. A file is whole
when its sha256 is the one that bundle.json lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from omniport.runtime.bundle.data_file import ALIGNMENT
from omniport.runtime.bundle.graph_spec import GraphSpec
from omniport.runtime.bundle.listed_files import sha256_of
from omniport.runtime.bundle.manifest import Manifest

from ..checkpoint.checkpoint import Checkpoint
from ..models.part import GraphDefinition
from ..source_code import json_key, tracing_key


def source_key(ckpt: Checkpoint) -> str:
    """sha256 over a checkpoint's state on disk. Weights are not read: their time of change stands for them."""
    shards = [(path.name, path.stat()) for path in sorted(ckpt.path.glob("*.safetensors"))]
    return json_key(ckpt.fingerprint, [(name, stat.st_size, stat.st_mtime_ns) for name, stat in shards])


def graph_key(definition: GraphDefinition, source: str, kept: Sequence[object] = ()) -> str:
    """sha256 over everything that a graph is made from.

    Args:
        source: as `source_key` gives it.
        kept: what was said about parts that stay float32.
    """
    return json_key(
        definition.name,
        definition.precision,
        definition.geometry,
        definition.ops,
        msgspec.to_builtins((definition.inputs, definition.outputs, definition.dims, definition.aliases)),
        source,
        kept,
        tracing_key("models", "graphs", "checkpoint"),
        ALIGNMENT,
    )


def graph_whole(out: Path, manifest: Manifest, spec: GraphSpec) -> bool:
    """Whether every file of a graph is what the manifest lists, byte for byte."""
    for file in (spec.file, *spec.data):
        path, record = out / file, manifest.files.get(file)
        if record is None or not path.is_file() or path.stat().st_size != record.size:
            return False
        if sha256_of(path) != record.sha256.lower():
            return False
    return True
