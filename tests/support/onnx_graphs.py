"""Small ONNX graphs, right and wrong, and bundles that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from omniport.runtime.bundle.graph_spec import DimRange, GraphSpec, TensorSpec
from onnx import TensorProto, helper, numpy_helper
from support.bundles import make_bundle, make_manifest, write_manifest

KINDS = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
}
CACHE = ("batch", 2, "capacity", 8)


def make_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    initializers: Sequence[TensorProto] = (),
    opset: int = 24,
) -> onnx.ModelProto:
    """A model whose inputs and outputs are declared as these specs say."""
    borders = [[helper.make_tensor_value_info(t.name, KINDS[t.dtype], t.shape) for t in s] for s in (inputs, outputs)]
    graph = helper.make_graph(list(nodes), "g", *borders, list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)


def spec(
    name: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    dims: dict[str, DimRange] | None = None,
    aliases: dict[str, str] | None = None,
) -> GraphSpec:
    """A GraphSpec with a file name that bundles and tests agree on."""
    return GraphSpec(
        name=name,
        file=f"graphs/{name}.onnx",
        data=(),
        precision="float32",
        opset=24,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        dims={"batch": DimRange(1, 1, 4)} if dims is None else dims,
        aliases=aliases or {},
    )


def tensor(name: str, *shape: int | str, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name, dtype, shape)


def weight(name: str = "layers.0.mlp.weight", shape: tuple[int, ...] = (8, 8), dtype: Any = np.float32) -> TensorProto:
    values = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    return numpy_helper.from_array(values, name)


def matmul(source: str = "x", out: str = "y", of: str = "layers.0.mlp.weight") -> onnx.NodeProto:
    return helper.make_node("MatMul", [source, of], [out], name="layers.0.mlp/MatMul")


def cache_model(tail: str = "") -> tuple[onnx.ModelProto, GraphSpec]:
    """One cache update, in place unless ``tail`` names an operator that comes after it, or ``Concat`` instead of it."""
    past, new = tensor("past", *CACHE, dtype="float16"), tensor("new", "batch", 2, 4, 8, dtype="float16")
    where = tensor("where", "batch", dtype="int64")
    out = "updated" if tail else "present"
    nodes = [helper.make_node("TensorScatter", ["past", "new", "where"], [out], axis=2, name="layers.0/TensorScatter")]
    if tail:
        nodes.append(helper.make_node(tail, ["updated"], ["present"], name=f"layers.0/{tail}"))
    present = tensor("present", *CACHE, dtype="float16")
    inputs, outputs = (past, new, where), (present,)
    dims = {"batch": DimRange(1, 1, 1), "capacity": DimRange(64, 64, 64)}
    return make_model(nodes, inputs, outputs), spec("thinker", inputs, outputs, dims, {"present": "past"})


def plain_model(name: str = "dit") -> tuple[onnx.ModelProto, GraphSpec]:
    """One matrix product."""
    inputs, outputs = (tensor("x", "batch", 8),), (tensor("y", "batch", 8),)
    return make_model([matmul()], inputs, outputs, [weight()]), spec(name, inputs, outputs)


def put_graphs(root: Path, *graphs: tuple[onnx.ModelProto, GraphSpec], kv: str = "static") -> Path:
    """A bundle folder whose graphs are these, and no others. ``kv`` is the form of its cache."""
    if not root.exists():
        make_bundle(root, max_context=64)
        for path in (root / "graphs").iterdir():
            path.unlink()
    for model, made in graphs:
        onnx.save(model, root / made.file)
    manifest = make_manifest(max_context=64)
    form = msgspec.structs.replace(manifest.kv, form=kv)
    write_manifest(root, msgspec.structs.replace(manifest, kv=form, graphs={made.name: made for _, made in graphs}))
    return root
