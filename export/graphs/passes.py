"""The onnx-ir passes that turn a traced model into the exported graph.

Each pass states what it needs and what it leaves; `finish` runs them in order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import onnx_ir as ir
from omniport.runtime.bundle.graph_spec import TensorSpec
from omniport.runtime.errors import ExportError
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    IdentityEliminationPass,
    InlinePass,
    RemoveUnusedNodesPass,
    ShapeInferencePass,
)
from onnxscript.optimizer import fold_constants

FOLD_BYTES = 4096
SCOPES = "pkg.torch.onnx.name_scopes"


def finish(model: ir.Model, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """Fold constants, give the borders their contracted names and shapes, name nodes after modules, in place."""
    # Not onnxscript's optimize(): its rewrite rules read weights. Folding looks at small tensors only.
    own = set(model.graph.initializers)
    InlinePass()(model)
    fold_constants(model, input_size_limit=FOLD_BYTES, output_size_limit=FOLD_BYTES)
    IdentityEliminationPass()(model)
    CommonSubexpressionEliminationPass()(model)
    TrimOutputsPass()(model)
    RemoveUnusedNodesPass()(model)
    BorderPass(inputs, outputs)(model)
    NamingPass(own)(model)
    TypePass()(model)
    check_standard_ops(model)
    model.producer_name = "omniport"
    model.graph.doc_string = None
    model.metadata_props.clear()


class TrimOutputsPass(InPlacePass):
    """Drop trailing outputs that nobody reads.

    Tracing gives Attention all four outputs of its schema; builders accept one.
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in model.graph:
            keep = max((i + 1 for i, out in enumerate(node.outputs) if _read(out)), default=1)
            if keep < len(node.outputs):
                node.resize_outputs(keep)
                modified = True
        return PassResult(model, modified)


class BorderPass(InPlacePass):
    """Name and shape graph inputs and outputs as their specs say.

    Needs as many of each as there are specs, in order, of the same dtype; anything else is a bug of the module.
    """

    def __init__(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        self.inputs, self.outputs = inputs, outputs

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        for values, specs in ((graph.inputs, self.inputs), (graph.outputs, self.outputs)):
            if len(values) != len(specs):
                raise ExportError(f"the traced graph has {len(values)} borders where its spec has {len(specs)}")
            for value, spec in zip(values, specs, strict=True):
                value.name = spec.name
                value.shape = ir.Shape(spec.shape)
                dtype = "FLOAT" if spec.dtype == "float32" else spec.dtype.upper()
                if value.dtype is None or value.dtype.name != dtype:
                    raise ExportError(f"{spec.name}: traced as {value.dtype}, its spec says {spec.dtype}")
        return PassResult(model, True)


class NamingPass(InPlacePass):
    """Name each node, and each value it makes, ``module.path/OpType``; a counter keeps them unique.

    Tracing leaves the module path in the metadata, which is then dropped: it would be a third of the file. Initializers
    that folding made, all but those named in ``own``, are named after the first input they feed.
    """

    def __init__(self, own: Collection[str]) -> None:
        self.own = own

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        borders = {id(value) for value in (*graph.inputs, *graph.outputs)}
        seen: Counter[str] = Counter()
        for node in graph:
            scopes = [s for s in _scopes(node) if s and not s.startswith("_")]
            base = f"{scopes[-1] if scopes else 'graph'}/{node.op_type}"
            number = seen[base]
            seen[base] += 1
            node.name = base if number == 0 else f"{base}_{number}"
            for i, out in enumerate(node.outputs):
                if id(out) not in borders:
                    out.name = f"{node.name}:{i}"
                out.metadata_props.clear()
            node.metadata_props.clear()
            node.doc_string = None
        for name, value in list(graph.initializers.items()):
            if name not in self.own and (uses := value.uses()):
                # uses() is a set: the lowest (name, index) makes the choice repeatable
                user, index = min((str(use.node.name), use.idx) for use in uses)
                value.name = f"{user}.input{index}"
        return PassResult(model, True)


class TypePass(InPlacePass):
    """Give every value the dtype that ONNX infers for it; shapes stay as they were traced.

    Needs unique value names. Nodes made from custom ops come without types.
    """

    def call(self, model: ir.Model) -> PassResult:
        inferred = model.clone()
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(inferred)
        types: dict[str | None, ir.DataType | None] = {v.name: v.dtype for node in inferred.graph for v in node.outputs}
        modified = False
        for value in (value for node in model.graph for value in node.outputs):
            if value.dtype is None:
                dtype = types[value.name]
                if dtype is None:
                    raise ExportError(f"the type of {value.name} cannot be inferred")
                value.dtype = dtype
                modified = True
        return PassResult(model, modified)


def check_standard_ops(model: ir.Model) -> None:
    """ExportError if the graph holds an operator from outside the standard domain, or a local function."""
    foreign = sorted({f"{node.domain}::{node.op_type}" for node in model.graph if node.domain not in ("", "ai.onnx")})
    if foreign or model.functions:
        raise ExportError(f"the graph holds operators outside the ONNX standard: {', '.join(foreign) or 'functions'}")


def _read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _scopes(node: ir.Node) -> list[str]:
    """Module paths around a node, outermost first; the last entry of the metadata is the operation itself."""
    import ast

    raw = node.metadata_props.get(SCOPES)
    return [str(s) for s in ast.literal_eval(raw)][:-1] if raw else []
