"""A bundle's graph without its roundings: the same nodes in FP32, with the checkpoint's weights for coarse ones.

What rounding costs hides other faults: an INT8 graph may be 30% off and sound right, and so may one whose guidance has
the wrong sign. Without roundings the graph is as near to the reference as one in FP32. So faults of its nodes, and of
what the host feeds it, are seen in every precision as they are there. Faults of the weights are looked for in the
weights themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from msgspec.structs import replace
from numpy.typing import NDArray
from omniport.runtime.backends.onnxruntime.backend import OrtGraph
from omniport.runtime.bundle.integer_weights import integers_name, smoothed_name
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.speech.ode import rk4_schedule
from omniport.runtime.system.host import physical_cores
from onnx_ir.passes import InPlacePass, PassResult

from ..checkpoint.checkpoint import Checkpoint
from ..graphs.packed_weights import packed_rules
from ..models.model_parts import graph_definitions
from ..models.module import Rule, evaluate
from .half_emulation import EmulateHalfPass, open_graph, typed_copy, widened
from .metrics import energy
from .stored_weights import StoredGraph, unscaled

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class StoredWeight:
    """A weight that a graph stores coarsely, beside the checkpoint's.

    Attributes:
        format: ``int8``, ``int4``, ``fp8``, ``float16`` or ``bfloat16``.
        energy: RMS of the checkpoint's, its rows and columns scaled as smoothing scaled those that are stored.
        error: RMS of the difference, over ``energy``.
    """

    name: str
    format: str
    energy: float
    error: float


@dataclass(frozen=True)
class Unrounded:
    """The copy of a graph, and how far its stored weights are from those that took their place."""

    graph: OrtGraph
    weights: tuple[StoredWeight, ...]


def is_rounded(bundle: Bundle, name: str) -> bool:
    """Whether anything in a graph is coarser than FP32."""
    spec = bundle.manifest.graphs[name]
    return spec.precision != "float32" or spec.compute_dtype != "float32"


def open_unrounded(bundle: Bundle, checkpoint: Checkpoint, name: str, threads: int | None) -> Unrounded:
    """Load the copy of a graph. Weights that it has anew are in memory, in FP32.

    Weights of a packed checkpoint (GPTQ, AWQ) are what the reference has, too: they become the numbers that they are
    stored for, and are not among ``weights``.

    Args:
        threads: of one operator; all physical cores if None.

    Raises:
        BundleError: the graph cannot be read.
        BackendError: ONNX Runtime refuses it.
        ExportError: types of its values cannot be inferred.
    """
    spec = bundle.manifest.graphs[name]
    path = bundle.path(spec.file)
    model = typed_copy(path, spec)
    stored, rules = StoredGraph(bundle, name), _rules(bundle, checkpoint, name)
    packed = packed_rules(rules, checkpoint.packed)
    smoothed = bundle.manifest.quantization is not None and bool(bundle.manifest.quantization.calibration)
    whole, found = dict[str, Floats](), list[StoredWeight]()
    for weight, rule in rules.items():
        made = stored.dequantized(weight)
        if made is None and stored.format(weight) in ("", "float32"):
            continue
        got = stored.array(weight).astype(np.float32) if made is None else made
        if weight in packed:
            whole[weight] = got
            continue
        whole[weight] = np.ascontiguousarray(evaluate(rule, checkpoint), np.float32).reshape(got.shape)
        found.append(_beside(weight, stored.format(weight), got, whole[weight], smoothed))
    for base in {*rules, *whole}:
        if smoothed_name(base) in stored.tensors:
            divides = integers_name(base) in stored.tensors  # the input of the weight, which is multiplied
            shape = tuple(stored.tensors[smoothed_name(base)].dims)
            own = np.ones(shape) if divides else evaluate(rules[base], checkpoint)
            whole[smoothed_name(base)] = np.ascontiguousarray(own, np.float32).reshape(shape)
    UnroundPass(whole)(model)
    for dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        EmulateHalfPass(dtype, rounds=False)(model)
    spec = replace(spec, inputs=widened(spec.inputs), outputs=widened(spec.outputs))
    threads = physical_cores() if threads is None else threads
    return Unrounded(open_graph(model, spec, path.parent, threads, whole), tuple(found))


class UnroundPass(InPlacePass):
    """Take away QuantizeLinear with the DequantizeLinear behind it, and put whole weights in place of coarse ones.

    Needs types of all values (`typed_copy` infers them). Leaves initializers without data, as external ones.

    Args:
        whole: initializer, or weight that is made of integers -> what takes its place.
    """

    def __init__(self, whole: Mapping[str, Floats]) -> None:
        self.whole = whole

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        new = {name: _outside(name, array) for name, array in self.whole.items()}
        for node in list(graph):
            if node.op_type == "QuantizeLinear":
                for wide, _ in list(node.outputs[0].uses()):
                    _skip(graph, wide, node.inputs[0])
                graph.remove(node, safe=True)
            elif node.op_type == "DequantizeLinear" and (name := _weight(node)) in new:
                _skip(graph, node, new[name])
        for name in new.keys() & set(graph.initializers):
            for user, index in list(graph.initializers[name].uses()):
                user.replace_input_with(index, new[name])
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del graph.initializers[name]
        for value in new.values():
            graph.initializers.add(value)
        return PassResult(model, True)


def _weight(node: ir.Node) -> str:
    """The weight whose integers a DequantizeLinear reads; empty if it reads none."""
    value = node.inputs[0]
    name = "" if value is None or value.name is None else value.name
    weight = name.removesuffix(integers_name(""))
    return weight if weight != name else ""


def _skip(graph: ir.Graph, node: ir.Node, value: ir.Value | None) -> None:
    """Give a value to what reads a node's output, and take the node away."""
    for user, index in list(node.outputs[0].uses()):
        user.replace_input_with(index, value)
    graph.remove(node, safe=True)


def _outside(name: str, array: Floats) -> ir.Value:
    """An initializer whose data is handed over when the graph is loaded: a model in one piece has 2 GB at most."""
    tensor = ir.ExternalTensor("memory", 0, array.nbytes, ir.DataType.FLOAT, shape=ir.Shape(array.shape), name=name)
    kind = ir.TensorType(ir.DataType.FLOAT)
    return ir.Value(name=name, const_value=tensor, type=kind, shape=ir.Shape(array.shape))


def _rules(bundle: Bundle, checkpoint: Checkpoint, name: str) -> dict[str, Rule]:
    """What fills each of the graph's weights."""
    manifest = bundle.manifest
    context, solver = manifest.kv.max_context, manifest.solver or rk4_schedule()
    made: Any = graph_definitions(
        checkpoint.config, "fp32", context, solver, checkpoint.tied_embeddings, kv_form=manifest.kv.form
    )
    module = made[name].module()
    return dict(module.named_rules(str(module.prefix)))


def _beside(name: str, form: str, got: Floats, wanted: Floats, smoothed: bool) -> StoredWeight:
    """A weight as it is stored, beside the checkpoint's."""
    if smoothed and got.ndim == 2:
        wanted = unscaled(wanted, got)
    size, off = energy(wanted), energy(got - wanted)
    return StoredWeight(name, form, size, off / size if size > 0 else float(off > 0))
