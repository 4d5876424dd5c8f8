"""Emulate half-precision graphs on a CPU: ONNX Runtime has no BF16 kernels there, and few FP16 ones.

The copy computes in FP32 and rounds the result of every operator to the half format and back, like a device that
accumulates in FP32 and stores halves. It cannot show rounding inside an operator (for example of the probabilities
within Attention), which differs between devices. Weights stay in their file and are widened when the session is
created. KV caches are FP32; values are rounded before they are written there.

BF16 graphs run on the CPU as such copies only. FP16 graphs run as they are, but ONNX Runtime then computes runs of
operators in FP32 without the rounding between them, so that an overflow a GPU would meet may not show: a copy shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
from omniport.runtime.backends.base import BackendWrapper, Graph
from omniport.runtime.backends.onnxruntime.backend import OrtBackend, OrtGraph
from omniport.runtime.backends.onnxruntime.packages import import_onnxruntime
from omniport.runtime.bundle.graph_spec import GraphSpec, TensorSpec
from omniport.runtime.bundle.onnx_scan import check_graph_file
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import BackendError, BundleError, ExportError
from omniport.runtime.system.foreign import foreign
from omniport.runtime.system.host import physical_cores
from onnx_ir.passes import InPlacePass, PassResult

_WARNING = 2

#: results are among the inputs' values, which are rounded already
_MOVES = frozenset(
    "Concat Expand Flatten Gather GatherElements Identity Pad Reshape ScatterElements Slice Split "  # noqa: SIM905
    "Squeeze TensorScatter Tile Transpose Unsqueeze Where".split()
)


class EmulateHalfPass(InPlacePass):
    """Make every tensor of a half format FP32 and round to the format where a value is made.

    Needs types of all values (`load_copy` infers them). Leaves the format in initializers and between pairs of Cast.

    Args:
        dtype: FLOAT16 or BFLOAT16.
        rounds: without, values stay as FP32 gives them.
    """

    def __init__(self, dtype: ir.DataType, rounds: bool = True) -> None:
        self.dtype, self.rounds = dtype, rounds

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        made = [(node, value) for node in graph for value in node.outputs if value.dtype == self.dtype]
        for value in graph.inputs:
            if value.dtype == self.dtype:
                value.dtype = ir.DataType.FLOAT
        for value in list(graph.initializers.values()):
            if value.dtype == self.dtype:
                self._widen(graph, value)
        for node in graph:
            self._attributes(node)
        for node, value in made:
            value.dtype = ir.DataType.FLOAT
            if self.rounds and node.op_type not in _MOVES and node.op_type != "Constant":
                self._round(graph, node, value)
        return PassResult(model, bool(made))

    def _widen(self, graph: ir.Graph, value: ir.Value) -> None:
        """Initializer -> Cast to FP32 -> its users."""
        uses = list(value.uses())
        cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{value.name}/widen")
        wide = cast.outputs[0]
        wide.name, wide.dtype, wide.shape = f"{value.name}/wide", ir.DataType.FLOAT, value.shape
        for node, index in uses:
            node.replace_input_with(index, wide)
        graph.insert_before(graph[0], cast)

    def _round(self, graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
        """value -> Cast to the format -> Cast to FP32 -> its users."""
        if value.is_graph_output():
            raise ExportError(
                f"graph output {value.name!r} is {self.dtype.name}; KV caches alone may be, others are FLOAT"
            )
        uses = list(value.uses())
        down = ir.node("Cast", [value], {"to": self.dtype}, name=f"{value.name}/round")
        up = ir.node("Cast", [down.outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{value.name}/narrow")
        for cast, dtype in ((down, self.dtype), (up, ir.DataType.FLOAT)):
            made = cast.outputs[0]
            made.name, made.dtype, made.shape = f"{cast.name}d", dtype, value.shape
        for user, index in uses:
            user.replace_input_with(index, up.outputs[0])
        graph.insert_after(node, [down, up])

    def _attributes(self, node: ir.Node) -> None:
        """Attributes that name the format or hold a tensor of it."""
        for name in ("to", "dtype", "output_dtype", "softmax_precision", "precision"):
            attribute = node.attributes.get(name)
            if attribute is not None and attribute.value == self.dtype:
                node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT)
        tensor = node.attributes.get("value")
        if tensor is not None and tensor.type == ir.AttributeType.TENSOR:
            constant = tensor.as_tensor()
            if constant.dtype == self.dtype:
                node.attributes["value"] = ir.AttrTensor("value", ir.tensor(constant.numpy().astype(np.float32)))


class EmulatedBackend(BackendWrapper):
    """ONNX Runtime on the CPU, with emulation copies of some graphs; the others run as they are.

    Args:
        graphs: run as copies besides those in BF16.
        threads: threads of one operator; the physical cores this process may use if None.

    Attributes:
        emulated: names of the graphs that run as copies.
    """

    def __init__(self, bundle: Bundle, graphs: Sequence[str] = (), threads: int | None = None) -> None:
        specs = bundle.manifest.graphs
        self.emulated = tuple(name for name, spec in specs.items() if is_bfloat16(spec) or name in graphs)
        self._bundle = bundle
        self._threads = threads if threads is not None else physical_cores()
        plain = bundle.with_graphs([name for name in specs if name not in self.emulated])
        super().__init__(OrtBackend(plain, threads=threads))
        self._graphs: dict[str, OrtGraph] = {}

    def graph(self, name: str) -> Graph:
        """The graph of that name, loaded on first use and kept.

        Raises:
            BackendError: the bundle has no such graph, or ONNX Runtime refuses it.
        """
        if name not in self.emulated:
            return super().graph(name)
        if name not in self._graphs:
            path = self._bundle.path(self._bundle.manifest.graphs[name].file)
            model, spec = load_copy(path, self._bundle.manifest.graphs[name], emulate=True)
            self._graphs[name] = open_graph(model, spec, path.parent, self._threads)
        return self._graphs[name]

    def close(self) -> None:
        self._graphs.clear()
        super().close()


def is_bfloat16(spec: GraphSpec) -> bool:
    """Whether the graph computes in BF16, or has a BF16 input or output."""
    return spec.compute_dtype == "bfloat16" or any(t.dtype == "bfloat16" for t in (*spec.inputs, *spec.outputs))


def load_copy(path: Path, spec: GraphSpec, emulate: bool) -> tuple[ir.Model, GraphSpec]:
    """A bundle's graph in memory, its weights left in their files, and its spec; for `open_graph`.

    Args:
        emulate: FP16 and BF16 become FP32 that is rounded after every operator.

    Raises:
        ExportError: the graph has a half-precision output that is not a KV cache, or types cannot be inferred.
    """
    if not emulate:
        return ir.from_proto(_read(path, spec)), spec
    model = typed_copy(path, spec)
    for dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        EmulateHalfPass(dtype)(model)
    return model, msgspec.structs.replace(spec, inputs=widened(spec.inputs), outputs=widened(spec.outputs))


def typed_copy(path: Path, spec: GraphSpec) -> ir.Model:
    """A bundle's graph in memory with the types of all values, its weights left in their files.

    Raises:
        BundleError: it cannot be read.
        ExportError: types cannot be inferred.
    """
    model = ir.from_proto(onnx.shape_inference.infer_shapes(_read(path, spec)))
    untyped = [value.name for node in model.graph for value in node.outputs if value.name and value.dtype is None]
    if untyped:
        raise ExportError(f"{path}: the types of {', '.join(map(str, untyped[:3]))} cannot be inferred")
    return model


def _read(path: Path, spec: GraphSpec) -> onnx.ModelProto:
    check_graph_file(path, spec)
    with foreign(BundleError, f"cannot read {path} as ONNX", "Copy or export the bundle again"):
        return onnx.load(path, load_external_data=False)


def widened(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """Inputs or outputs of a graph whose half-precision values became FP32."""
    halves = ("float16", "bfloat16")
    return tuple(msgspec.structs.replace(t, dtype="float32") if t.dtype in halves else t for t in tensors)


def open_graph(model: ir.Model, spec: GraphSpec, folder: Path, threads: int) -> OrtGraph:
    """A changed graph in ONNX Runtime on the CPU; its weights lie in the files of ``folder``.

    Args:
        spec: inputs and outputs of the changed graph.

    Raises:
        BackendError: onnxruntime is missing or refuses the graph.
    """
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _WARNING  # a KV cache that is copied on every step is a warning
    # weights are widened once, however large; left to every run that would take most of its time
    options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", str(1 << 40))
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    proto = ir.to_proto(model).SerializeToString()
    try:
        session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions share no base class
        raise BackendError(
            f"ONNX Runtime {ort.__version__} cannot load a changed copy of graph {spec.name!r} from {folder}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return OrtGraph(session, spec, "cpu", ort)
