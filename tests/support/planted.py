"""Edits of a bundle's ONNX files that leave bundle.json right, so that nothing but the numbers gives them away."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
from omniport.runtime.bundle.manifest import FileRecord
from omniport.runtime.bundle.reader import read_manifest
from onnx import TensorProto, helper, numpy_helper

Graph = onnx.GraphProto


def edit_graph(bundle: Path, name: str, change: Callable[[Graph, Path], None]) -> None:
    """Change an ONNX file, and its weights, in place; bundle.json then lists them as if they were right."""
    path = bundle / "graphs" / f"{name}.onnx"
    model = onnx.load(str(path), load_external_data=False)
    change(model.graph, path.parent)
    path.write_bytes(model.SerializeToString())
    manifest = read_manifest(bundle)
    files = dict(manifest.files)
    for listed in (manifest.graphs[name].file, *manifest.graphs[name].data):
        content = (bundle / listed).read_bytes()
        files[listed] = FileRecord(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    (bundle / "bundle.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(manifest, files=files)))


def initializer(graph: Graph, name: str) -> TensorProto:
    return next(tensor for tensor in graph.initializer if tensor.name == name)


def producer(graph: Graph, value: str) -> onnx.NodeProto:
    return next(node for node in graph.node if value in node.output)


def consumer(graph: Graph, value: str) -> onnx.NodeProto:
    """The only node that reads a value."""
    (node,) = (node for node in graph.node if value in node.input)
    return node


def insert_after(graph: Graph, value: str, *nodes: onnx.NodeProto) -> None:
    """Put nodes behind the one that makes ``value``: they read ``<value>/planted``, the last writes ``value``."""
    source = producer(graph, value)
    source.output[list(source.output).index(value)] = f"{value}/planted"
    at = list(graph.node).index(source) + 1
    for i, node in enumerate(nodes):
        graph.node.insert(at + i, node)


def constant(graph: Graph, name: str, value: float | int) -> str:
    dtype = np.int64 if isinstance(value, int) else np.float32
    graph.initializer.append(numpy_helper.from_array(np.asarray(value, dtype), name))
    return name


def rope_on_all_heads(graph: Graph, folder: Path) -> None:
    """The DiT rotates every head, as any other transformer would."""
    rotations = [node for node in graph.node if node.op_type == "RotaryEmbedding"]
    assert rotations
    cosine = next(info for info in graph.value_info if info.name == rotations[0].input[1])
    head = 2 * cosine.type.tensor_type.shape.dim[-1].dim_value
    for rotation in rotations:
        joined = consumer(graph, consumer(graph, rotation.output[0]).output[0])
        assert joined.op_type == "Concat"
        rest = producer(graph, joined.input[1])
        source = producer(graph, rest.input[0])  # keys of the block before may stand in front
        projected = source.input[1] if source.op_type == "Concat" else rest.input[0]
        width = numpy_helper.to_array(initializer(graph, projected.replace("/Add:0", ".bias"))).size
        whole = helper.make_node(
            "RotaryEmbedding",
            [rest.input[0], rotation.input[1], rotation.input[2]],
            list(joined.output),
            interleaved=1,
            num_heads=width // head,
        )
        at = list(graph.node).index(joined)
        graph.node.remove(joined)
        graph.node.insert(at, whole)
