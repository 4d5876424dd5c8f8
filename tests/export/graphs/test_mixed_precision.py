"""Mixed precision: what stays float32 in a half-precision graph, and that it is computed so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from omniport.export.checkpoint.checkpoint import Checkpoint
from omniport.export.exporter import export_checkpoint
from omniport.export.graphs.lowering import OPSETS
from omniport.export.graphs.mixed_precision import FLOAT32_OPS, KeepFloatPass, mix, module_path, ranged_values
from omniport.export.graphs.trace import trace
from omniport.export.models.model_parts import graph_definitions
from omniport.export.validation.checks.graphs import graph_checks
from omniport.runtime.bundle.parts import PARTS
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.bundle.recipes import PRECISION_DTYPES
from omniport.runtime.errors import ExportError
from omniport.runtime.speech.ode import rk4_schedule
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from support.comparison import assert_all_pass, context_of

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
LAYER = "talker/model.layers.1.mlp"
#: no bf16 of parts that are published in float32
HALF_GRAPHS = [("fp16", name) for name in PARTS] + [("bf16", name) for name, part in PARTS.items() if not part.float32]


# --- the pass -------------------------------------------------------------------------------------------------------


def loud_model() -> ir.Model:
    """y = ((x @ a) @ b) + c in float16; x @ a is too large for it, and (x @ a) @ b is not."""
    rng = np.random.default_rng(0)
    weights = {
        "a": (rng.uniform(1, 2, (64, 8)) * 1000).astype(np.float16),
        "b": (rng.standard_normal((8, 4)) / 10000).astype(np.float16),
        "c": rng.standard_normal(4).astype(np.float16),
    }
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], "graph/Cast", to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["h", "a"], ["wide"], "first/MatMul"),
        helper.make_node("MatMul", ["wide", "b"], ["back"], "second/MatMul"),
        helper.make_node("Add", ["back", "c"], ["sum"], "second/Add"),
        helper.make_node("Cast", ["sum"], ["y"], "graph/Cast_1", to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "loud",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def compute(model: ir.Model, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """In numpy: ONNX Runtime would run neighbours in float32 without rounding between them."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    with np.errstate(all="ignore"):
        return np.asarray(ReferenceEvaluator(proto).run(None, {"x": x})[0])


def test_kept_nodes_do_not_overflow() -> None:
    x = np.random.default_rng(1).uniform(1, 2, (3, 64)).astype(np.float32)
    plain, kept = loud_model(), loud_model()
    weights = {v.name: v.const_value.numpy().astype(np.float64) for v in plain.graph.initializers.values()}  # type: ignore[union-attr]
    exact = (x @ weights["a"]) @ weights["b"] + weights["c"]
    assert float(np.abs(x @ weights["a"]).max()) > 65504
    assert not np.isfinite(compute(plain, x)).any()
    KeepFloatPass(HALF, {"first/MatMul", "second/MatMul"})(kept)
    got = compute(kept, x)
    assert float(np.abs(exact).mean()) > 0.5
    np.testing.assert_allclose(got, exact, rtol=2e-3, atol=2e-3)
    types = {value.name: value.dtype for value in kept.graph.initializers.values()}
    assert types == {"a": FLOAT, "b": FLOAT, "c": HALF}
    # x is read as it came: nothing is narrowed and widened again
    assert next(n for n in kept.graph if n.name == "first/MatMul").inputs[0] is kept.graph.inputs[0]


def test_one_node_sits_between_casts() -> None:
    model = loud_model()
    KeepFloatPass(HALF, {"second/MatMul"})(model)
    node = next(n for n in model.graph if n.name == "second/MatMul")
    before, after = node.inputs[0], node.outputs[0]
    assert before is not None
    source = before.producer()
    assert source is not None
    assert (source.op_type, before.dtype, after.dtype) == ("Cast", FLOAT, FLOAT)
    ((reader, _),) = after.uses()
    assert (reader.op_type, reader.outputs[0].dtype) == ("Cast", HALF)


def test_a_shared_weight_has_one_copy() -> None:
    model = loud_model()
    second = next(n for n in model.graph if n.name == "second/Add")
    second.replace_input_with(1, model.graph.initializers["c"])
    first = next(n for n in model.graph if n.name == "first/MatMul")
    extra = ir.node("Add", [second.outputs[0], model.graph.initializers["c"]], name="third/Add")
    extra.outputs[0].name, extra.outputs[0].dtype = "more", HALF
    model.graph.insert_after(second, extra)
    next(n for n in model.graph if n.name == "graph/Cast_1").replace_input_with(0, extra.outputs[0])
    KeepFloatPass(HALF, {"third/Add", first.name})(model)
    assert model.graph.initializers["c"].dtype == FLOAT
    compute(model, np.ones((1, 64), np.float32))  # checks the types
    narrowed = second.inputs[1]
    assert narrowed is not None
    assert narrowed.dtype == HALF


# --- traced graphs --------------------------------------------------------------------------------------------------


def traced(checkpoint: Path, precision: str, ops: str, graph: str = "thinker", token2wav: str = "fp32") -> ir.Model:
    ckpt = Checkpoint.open(checkpoint)
    form = "static" if ops == "native" else "concat"
    schedule = rk4_schedule()
    found = graph_definitions(
        ckpt.config, precision, 4096, schedule, ckpt.tied_embeddings, token2wav=token2wav, ops=ops, kv_form=form
    )
    return trace(found[graph])[0]


@pytest.mark.parametrize("ops", ["native", "decomposed"])
def test_norms_softmax_and_rotation_are_float32(tiny_checkpoint: Path, ops: str) -> None:
    model = traced(tiny_checkpoint, "fp16", ops)
    wide = set(mix(model, "thinker", "float16").float32_values)
    seen = set()
    for node in model.graph:
        if node.op_type in FLOAT32_OPS or "norm" in module_path(node).rpartition(".")[2]:
            seen.add(node.op_type)
            floats = [v for v in (*node.inputs, *node.outputs) if v is not None and v.dtype in (FLOAT, HALF)]
            assert node.op_type == "Cast" or all(value.dtype == FLOAT for value in floats), node.name
    assert seen >= ({"RMSNormalization", "RotaryEmbedding"} if ops == "native" else {"Softmax", "ReduceMean"})
    norms = [v for v in model.graph.initializers.values() if str(v.name).endswith("norm.weight")]
    assert len(norms) == 9
    assert all(value.dtype == FLOAT for value in norms)
    assert model.graph.initializers["model.layers.0.mlp.up_proj.weight"].dtype == HALF
    assert {"model.rope/Cos:0", "model.rope/Sin:0"} <= wide, "the rotation's angles are never rounded"


@pytest.mark.parametrize("ops", ["native", "decomposed"])
def test_every_precision_names_values_alike(tiny_checkpoint: Path, ops: str) -> None:
    """Ranges are measured on a float32 graph and looked up in a float16 one."""
    keys = [
        {key for key, _ in ranged_values(traced(tiny_checkpoint, precision, ops).graph)}
        for precision in ("fp32", "fp16")
    ]
    assert len(keys[0]) > 100
    assert keys[0] == keys[1]


def test_convolutions_are_float32_where_the_opset_has_no_bfloat16(tiny_checkpoint: Path) -> None:
    model = traced(tiny_checkpoint, "bf16", "decomposed", "audio_encoder")
    mix(model, "audio_encoder", "bfloat16")
    nodes = [node for node in model.graph if node.op_type == "Conv"]
    assert len(nodes) == 2
    assert all(value is not None and value.dtype == FLOAT for node in nodes for value in node.inputs)


@pytest.mark.parametrize(("precision", "graph"), HALF_GRAPHS)
@pytest.mark.parametrize(("ops", "opset"), OPSETS.items())
def test_half_graphs_are_valid_in_their_opset(
    tiny_checkpoint: Path, precision: str, ops: str, opset: int, graph: str
) -> None:
    """Operators have the attributes, and take the types, that this opset gives them."""
    model = traced(tiny_checkpoint, precision, ops, graph, token2wav="fp16")
    mix(model, graph, PRECISION_DTYPES[precision])
    # weights are not read yet: they are inputs here
    model.graph.inputs.extend(v for v in model.graph.initializers.values() if v.const_value is None)
    proto = ir.to_proto(model)
    assert [entry.version for entry in proto.opset_import] == [opset]
    onnx.checker.check_model(proto, full_check=True)


def test_patterns_look_at_the_graph_and_the_path(tiny_checkpoint: Path) -> None:
    for pattern, wide in (("thinker/.*layers.2.mlp.down_proj$", True), ("talker/.*down_proj", False)):
        model = traced(tiny_checkpoint, "fp16", "native")
        mix(model, "thinker", "float16", [re.compile(pattern)])
        down = {i: model.graph.initializers[f"model.layers.{i}.mlp.down_proj.weight"].dtype for i in range(4)}
        assert down == {0: HALF, 1: HALF, 2: FLOAT if wide else HALF, 3: HALF}


# --- exports --------------------------------------------------------------------------------------------------------


def stored(bundle: Path, graph: str) -> dict[str, onnx.TensorProto]:
    return {t.name: t for t in onnx.load(bundle / "graphs" / f"{graph}.onnx").graph.initializer}


def test_keep_fp32(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    options: dict[str, Any] = {"graphs": ("talker",), "precision": "fp16", "max_context": 4096}
    export_checkpoint(tiny_checkpoint, out, keep_fp32=[LAYER], **options)
    tensors, ckpt = stored(out, "talker"), Checkpoint.open(tiny_checkpoint)
    for i in range(4):
        name = f"model.layers.{i}.mlp.up_proj.weight"
        array = numpy_helper.to_array(tensors[name])
        assert array.dtype == (np.float32 if i == 1 else np.float16)
        exact = ckpt.read(f"talker.{name}").astype(np.float32).T
        np.testing.assert_array_equal(array.astype(np.float32), exact if i == 1 else exact.astype(np.float16))
    spec = Bundle.open(out).manifest.graphs["talker"]
    assert spec.precision == "float16"
    assert "model.layers.1.mlp.down_proj/MatMul:0" not in spec.float32_values, "the residual sum is float16"
    assert "model.layers.1.mlp/Mul:0" in spec.float32_values
    assert "model.layers.0.mlp/Mul:0" not in spec.float32_values
    assert_all_pass(list(graph_checks(context_of(out, tiny_checkpoint))))

    (row,) = export_checkpoint(tiny_checkpoint, out, keep_fp32=[LAYER], **options).graphs
    assert row.skipped
    (row,) = export_checkpoint(tiny_checkpoint, out, **options).graphs
    assert not row.skipped
    assert Bundle.open(out).manifest.graphs["talker"].float32_values != spec.float32_values


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"precision": "fp16", "keep_fp32": ["layers.77"]}, "'layers.77' matches no layer; it is searched for in .*/"),
        ({"precision": "fp16", "keep_fp32": ["("]}, "not a regular expression"),
        ({"keep_fp32": ["mlp"]}, "everything is FP32 already"),
        ({"precision": "bf16", "keep_fp32": ["dit/"], "graphs": ("dit",)}, "in half precision"),
        ({"precision": "bf16", "keep_fp32": ["dit/"]}, "'dit/' matches no layer"),
        ({"precision": "bf16", "ranges": Path("ranges.json")}, "--ranges goes with --precision fp16"),
        ({"precision": "fp16", "graphs": ("thinker",), "keep_fp32": ["talker/"]}, "'talker/' matches no layer"),
    ],
)
def test_refused_options(tiny_checkpoint: Path, tmp_path: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ExportError, match=match):
        export_checkpoint(tiny_checkpoint, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_keeps_layers_too(tiny_checkpoint: Path, tmp_path: Path) -> None:
    export_checkpoint(
        tiny_checkpoint, tmp_path / "b", graphs=("thinker",), precision="bf16", max_context=4096, keep_fp32=["lm_head"]
    )
    tensors = stored(tmp_path / "b", "thinker")
    assert numpy_helper.to_array(tensors["lm_head.weight"]).dtype == np.float32
    assert numpy_helper.to_array(tensors["model.layers.0.mlp.up_proj.weight"]).dtype == ml_dtypes.bfloat16
