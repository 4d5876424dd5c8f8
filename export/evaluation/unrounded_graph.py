"""A bundle's graph without its roundings: the same nodes in FP32, with the checkpoint's weights for coarse ones.

What rounding costs hides other faults: an INT8 graph may be 30% off and sound right, and so may one whose guidance has
the wrong sign. Without roundings the graph is as near to the reference as one in FP32. So faults of its nodes, and of
what the host feeds it, are seen in every precision as they are there. Faults of the weights are looked for in the
weights themselves.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from msgspec.structs import replace
from numpy.typing import NDArray
from omniport.runtime.backends.onnxruntime.backend import OrtGraph
from omniport.runtime.bundle.data_file import ALIGNMENT
from omniport.runtime.bundle.integer_weights import integers_name, smoothed_name
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.speech.ode import rk4_schedule
from omniport.runtime.system.files import cache_folder
from omniport.runtime.system.host import collect_and_trim, physical_cores
from onnx_ir.passes import InPlacePass, PassResult

from ..checkpoint.checkpoint import Checkpoint
from ..graphs.packed_weights import packed_rules
from ..models.model_parts import graph_definitions
from ..models.module import Rule, evaluate
from .half_emulation import EmulateHalfPass, open_graph, typed_copy, widened
from .stored_weights import StoredGraph, row_parts, scale_factors

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


@contextmanager
def open_unrounded(bundle: Bundle, checkpoint: Checkpoint, name: str, threads: int | None) -> Iterator[Unrounded]:
    """Load the copy of a graph.

    Its weights are written to a file for as long as it is open (in the cache folder, else where temporary files are),
    which ONNX Runtime maps: handed over in memory they would be there twice.

    Weights of a packed checkpoint (GPTQ, AWQ) are what the reference has, too: they become the numbers that they are
    stored for, and are not among ``weights``.

    Args:
        threads: of one operator; all physical cores if None.

    Raises:
        BundleError: the graph cannot be read.
        BackendError: ONNX Runtime refuses it.
        ExportError: types of its values cannot be inferred.
        OSError: no room for the file.
    """
    spec = bundle.manifest.graphs[name]
    model = typed_copy(bundle.path(spec.file), spec)
    room = cache_folder()
    if room is not None:
        room.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=room, prefix="unrounded-", ignore_cleanup_errors=True) as folder:
        with _Weights(Path(folder)) as file:
            weights = tuple(_write(bundle, checkpoint, name, file))
            UnroundPass(file.tensors)(model)
            for dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
                EmulateHalfPass(dtype, rounds=False)(model)
            stored = StoredGraph(bundle, name)
            for other, value in model.graph.initializers.items():
                if other not in file.tensors and isinstance(value.const_value, ir.ExternalTensor):
                    value.const_value = file.put(other, stored.array(other))
        spec = replace(spec, inputs=widened(spec.inputs), outputs=widened(spec.outputs))
        threads = physical_cores() if threads is None else threads
        yield Unrounded(open_graph(model, spec, Path(folder), threads), weights)
        collect_and_trim()  # whoever asked has let the graph go


def _write(bundle: Bundle, checkpoint: Checkpoint, name: str, file: _Weights) -> Iterator[StoredWeight]:
    """Write what takes the place of a graph's coarse weights, and compare the two; one is in memory at a time."""
    stored, rules = StoredGraph(bundle, name), _rules(bundle, checkpoint, name)
    packed = packed_rules(rules, checkpoint.packed)
    smoothed = bundle.manifest.quantization is not None and bool(bundle.manifest.quantization.calibration)
    for weight, rule in rules.items():
        if (undone := smoothed_name(weight)) in stored.tensors:
            divides = integers_name(weight) in stored.tensors  # the input of the weight, which is multiplied
            shape = tuple(stored.tensors[undone].dims)
            own = np.ones(shape) if divides else evaluate(rule, checkpoint)
            file.put(undone, np.asarray(own, np.float32).reshape(shape))
        made = stored.dequantized(weight)
        if made is None and stored.format(weight) in ("", "float32"):
            continue
        got = stored.array(weight) if made is None else made
        if weight in packed:
            file.put(weight, got)
            continue
        wanted = np.array(evaluate(rule, checkpoint), np.float32, order="C").reshape(got.shape)
        file.put(weight, wanted)
        yield _beside(weight, stored.format(weight), got, wanted, smoothed)


class _Weights:
    """A file of tensors.

    Attributes:
        tensors: where each lies, by name.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "weights"
        self._file = self._path.open("wb")
        self.tensors: dict[str, ir.ExternalTensor] = {}

    def __enter__(self) -> _Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(self, name: str, array: NDArray[Any]) -> ir.ExternalTensor:
        """Write a tensor, [...] in C order."""
        self._file.seek(-self._file.tell() % ALIGNMENT, os.SEEK_CUR)
        offset = self._file.tell()
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        dtype = ir.DataType.from_numpy(array.dtype)
        tensor = ir.ExternalTensor(
            self._path.name,
            offset,
            array.nbytes,
            dtype,
            shape=ir.Shape(array.shape),
            name=name,
            base_dir=self._path.parent,
        )
        self.tensors[name] = tensor
        return tensor


class UnroundPass(InPlacePass):
    """Take away QuantizeLinear with the DequantizeLinear behind it, and put whole weights in place of coarse ones.

    Needs types of all values (`typed_copy` infers them).

    Args:
        whole: initializer, or weight that is made of integers -> what takes its place.
    """

    def __init__(self, whole: Mapping[str, ir.ExternalTensor]) -> None:
        self.whole = whole

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        new = {name: _initializer(name, tensor) for name, tensor in self.whole.items()}
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


def _initializer(name: str, tensor: ir.ExternalTensor) -> ir.Value:
    return ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape))


def _rules(bundle: Bundle, checkpoint: Checkpoint, name: str) -> dict[str, Rule]:
    """What fills each of the graph's weights."""
    manifest = bundle.manifest
    context, solver = manifest.kv.max_context, manifest.solver or rk4_schedule()
    made: Any = graph_definitions(
        checkpoint.config, "fp32", context, solver, checkpoint.tied_embeddings, kv_form=manifest.kv.form
    )
    module = made[name].module()
    return dict(module.named_rules(str(module.prefix)))


def _beside(name: str, form: str, got: NDArray[Any], wanted: Floats, smoothed: bool) -> StoredWeight:
    """A weight as it is stored, beside the checkpoint's."""
    got, wanted = np.atleast_1d(got), np.atleast_1d(wanted)
    factors = scale_factors(wanted, got) if smoothed and got.ndim == 2 else None
    size = off = 0.0
    for part in row_parts(got):
        own = wanted[part] if factors is None else wanted[part] * factors[0][part, None] * factors[1]
        size += float(np.square(own, dtype=np.float64).sum())
        off += float(np.square(got[part].astype(np.float32) - own, dtype=np.float64).sum())
    error = math.sqrt(off / size) if size > 0 else float(off > 0)
    return StoredWeight(name, form, math.sqrt(size / max(1, got.size)), error)
