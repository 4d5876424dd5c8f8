"""A decoder of one cache and no layers, made by hand, and what is fed to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from omniport.runtime.bundle.graph_spec import GraphSpec
from omniport.runtime.bundle.reader import Bundle
from onnx import TensorProto, helper
from onnx.external_data_helper import set_external_data
from support.bundles import make_bundle, make_manifest, write_manifest
from support.onnx_graphs import KINDS, make_model, spec, tensor

CAPACITY, HEADS, WIDTH, VOCABULARY = 16, 2, 4, 11


def decoder_spec(dtype: str = "float32", aliased: bool = True) -> GraphSpec:
    rows = ("batch", HEADS, "capacity", WIDTH)
    made = spec(
        "thinker",
        [
            tensor("inputs_embeds", "batch", "tokens", HEADS * WIDTH),
            tensor("kv_positions", "live", dtype="int64"),
            tensor("write_index", "batch", dtype="int64"),
            tensor("past_key_0", *rows, dtype=dtype),
        ],
        [tensor("logits", "batch", VOCABULARY), tensor("present_key_0", *rows, dtype=dtype)],
        dims={},
        aliases={"present_key_0": "past_key_0"} if aliased else {},
    )
    return msgspec.structs.replace(made, data=("graphs/thinker.data",))


def decoder_model(dtype: str = "float32", domain: str = "") -> onnx.ModelProto:
    """logits = (sum of the live cache) @ head, and an operator of a foreign ``domain``."""
    node, made = helper.make_node, decoder_spec(dtype)
    nodes = [
        node("Reshape", ["inputs_embeds", "split"], ["heads"]),
        node("Transpose", ["heads"], ["new"], perm=[0, 2, 1, 3]),
        node("Cast", ["new"], ["rows"], to=KINDS[dtype]),
        node("TensorScatter", ["past_key_0", "rows", "write_index"], ["present_key_0"], axis=2, mode="linear"),
        node("Shape", ["kv_positions"], ["length"]),
        node("Slice", ["present_key_0", "zero", "length", "two"], ["live"]),
        node("Cast", ["live"], ["live32"], to=TensorProto.FLOAT),
        node("ReduceSum", ["live32", "axes"], ["summed"], keepdims=0),
        node("MatMul", ["summed", "head"], ["logits"]),
    ]
    if domain:
        nodes.append(node("Gelu", ["live32"], ["unused"], domain=domain))
    head = np.random.default_rng(0).standard_normal((WIDTH, VOCABULARY)).astype(np.float32)
    constants = {"zero": [0], "two": [2], "axes": [1, 2], "split": [0, 0, HEADS, WIDTH]}
    initializers = [helper.make_tensor(k, TensorProto.INT64, [len(v)], v) for k, v in constants.items()]
    initializers.append(onnx.numpy_helper.from_array(head, "head"))
    return make_model(nodes, made.inputs, made.outputs, initializers)


def bundle_with(
    root: Path,
    model: onnx.ModelProto | bytes | None = None,
    spec: GraphSpec | None = None,
    external: str | None = None,
) -> Bundle:
    """A bundle whose thinker graph is ``model``; weights go to the external file of that location."""
    model, spec = decoder_model() if model is None else model, spec or decoder_spec()
    make_bundle(root)
    path = root / spec.file
    if external is not None:
        (head,) = (tensor for tensor in model.graph.initializer if tensor.name == "head")
        (path.parent / "thinker.data").write_bytes(head.raw_data)
        set_external_data(head, external, offset=0, length=len(head.raw_data))
        head.ClearField("raw_data")
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    manifest = make_manifest()
    graphs = {**manifest.graphs, "thinker": spec}
    write_manifest(root, msgspec.structs.replace(manifest, graphs=graphs))
    return Bundle.open(root, verify=True)


def feed(embeds: np.ndarray, start: int) -> dict[str, Any]:
    return {
        "inputs_embeds": embeds[None],
        "kv_positions": np.arange(start + len(embeds)),
        "write_index": np.asarray([start]),
    }


def rows(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, HEADS * WIDTH)).astype(np.float32)
