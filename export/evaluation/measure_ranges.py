"""Measure activation ranges: the largest magnitude of every value of the FP32 graphs on real conversations.

A copy of each graph gets one more output: the maximum of ``|x|`` over every value that its nodes make, so that nothing
larger than a number leaves a call. The session then answers conversations over these copies, so each graph reads
realistic inputs: encoders read media, the talker real thinker states, the DiT every solver step, the vocoder the DiT's
mels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from msgspec.structs import replace
from omniport.runtime.backends.base import Array, BackendWrapper, GraphWrapper, KvCache, Outputs, RunHandle
from omniport.runtime.backends.onnxruntime.backend import OrtBackend, OrtGraph
from omniport.runtime.bundle.activation_ranges import RANGES_FILE, Ranges, encode_ranges
from omniport.runtime.bundle.graph_spec import GraphSpec, TensorSpec
from omniport.runtime.bundle.listed_files import file_record
from omniport.runtime.bundle.manifest import Manifest, encode_manifest
from omniport.runtime.bundle.parts import decoders
from omniport.runtime.bundle.reader import MANIFEST_FILE, Bundle, read_manifest
from omniport.runtime.errors import CheckFailed, UsageError
from omniport.runtime.session import OmniSession
from omniport.runtime.system.files import replace_file, scratch_folder
from omniport.runtime.system.host import physical_cores
from omniport.runtime.system.progress import Progress

from ..graphs.lowering import NATIVE_OPSET
from ..graphs.mixed_precision import ranged_values
from .conversations import require_writer, session_conversations, short_reply
from .half_emulation import load_copy, open_graph

_OUTPUT = "ranges"


def measure_ranges(
    bundle: str | Path,
    *,
    data: Path | None = None,
    max_new_tokens: int = 64,
    max_codes: int = 200,
    progress: Progress | None = None,
) -> Ranges:
    """Answer conversations over a bundle's FP32 graphs and record the largest magnitude of every value.

    Args:
        data: JSON lines with ``messages``; built-in conversations of every modality if None.
        max_new_tokens: text tokens of a reply at most.
        max_codes: codec tokens of a reply at most (50 a second), when the bundle speaks.
        progress: called with the conversation, and the number done and in total.

    Raises:
        UsageError: the bundle is not FP32, cannot answer, or ``data`` is not usable (names the line).
        CheckFailed: a value was not finite in FP32 already; names it.
    """
    opened = Bundle.open(bundle)
    _require_float32(opened)
    backend = _ObservingBackend(opened)
    names = []
    with scratch_folder() as folder, OmniSession(opened, backend) as session:
        conversations = session_conversations(session, data, folder)
        for number, conversation in enumerate(conversations):
            if progress is not None:
                progress(conversation.name, number, len(conversations))
            for _ in short_reply(session, conversation, max_new_tokens, max_codes):
                pass
            names.append(conversation.name)
    if progress is not None:
        progress("done", len(names), len(names))
    return Ranges(
        fingerprint=opened.manifest.source.fingerprint,
        ops=_ops(opened.manifest),
        kv=opened.manifest.kv.form,
        samples=tuple(names),
        graphs={name: graph.found() for name, graph in sorted(backend.graphs.items())},
    )


def store_ranges(bundle: str | Path, ranges: Ranges) -> Path:
    """Put ranges into a bundle of the same checkpoint, in place of those it had; returns the file's path.

    The bundle is whole at every moment: it first lists no ranges, then the new ones.

    Raises:
        BundleError: the folder holds no bundle.
        UsageError: they are another checkpoint's, or those of graphs with other nodes.
    """
    root = Path(bundle)
    manifest = read_manifest(root)
    if ranges.fingerprint != manifest.source.fingerprint:
        raise UsageError(
            f"{root} was exported from a checkpoint with fingerprint {manifest.source.fingerprint[:12]}; the ranges "
            f"were measured on one with {ranges.fingerprint[:12]}. Measure on an FP32 bundle of the same checkpoint."
        )
    if (ranges.ops, ranges.kv) != (_ops(manifest), manifest.kv.form):
        raise UsageError(
            f"{root} was exported with --ops {_ops(manifest)} --kv {manifest.kv.form}; the ranges were measured with "
            f"--ops {ranges.ops} --kv {ranges.kv}. Measure on an FP32 bundle with the same options."
        )
    files = {name: record for name, record in manifest.files.items() if name != manifest.ranges_file}
    replace_file(root / MANIFEST_FILE, encode_manifest(replace(manifest, files=files, ranges_file=None)))
    replace_file(root / RANGES_FILE, encode_ranges(ranges))
    files[RANGES_FILE] = file_record(root / RANGES_FILE)
    replace_file(root / MANIFEST_FILE, encode_manifest(replace(manifest, files=files, ranges_file=RANGES_FILE)))
    return root / RANGES_FILE


def _require_float32(bundle: Bundle) -> None:
    graphs = bundle.manifest.graphs
    require_writer(bundle)
    other = {name: spec.precision for name, spec in graphs.items() if spec.precision != "float32"}
    if other:
        name, precision = next(iter(other.items()))
        raise UsageError(
            f"{name} of {bundle.root} is {precision}, in which what overflows has overflowed already. Ranges are "
            "measured on a bundle exported with --precision fp32"
        )


def _ops(manifest: Manifest) -> str:
    return "decomposed" if manifest.graphs[decoders()[0].name].opset < NATIVE_OPSET else "native"


class _ObservingBackend(BackendWrapper):
    """ONNX Runtime on the CPU over copies of the graphs that also give their ranges."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(OrtBackend(bundle))
        self._bundle = bundle
        self.graphs: dict[str, _ObservedGraph] = {}

    def graph(self, name: str) -> _ObservedGraph:
        if name not in self.graphs:
            self.graphs[name] = _observed(self._bundle, self._bundle.manifest.graphs[name])
        return self.graphs[name]

    def close(self) -> None:
        """Release the graphs; what was found stays."""
        super().close()
        for graph in self.graphs.values():
            graph.release()


class _ObservedGraph(GraphWrapper):
    """A graph that keeps the running maximum of every value."""

    def __init__(self, graph: OrtGraph, keys: Sequence[str]) -> None:
        super().__init__(graph)
        self._name, self._keys = graph.spec.name, keys
        self._top = np.zeros(len(keys), np.float32)

    def run(self, feeds: Mapping[str, Array], cache: KvCache | None = None, handle: RunHandle | None = None) -> Outputs:
        outputs = super().run(feeds, cache, handle)
        top = outputs.pop(_OUTPUT)
        if not np.isfinite(top).all():
            key = self._keys[int(np.flatnonzero(~np.isfinite(top))[0])]
            raise CheckFailed(
                f"{key} of {self._name} is not finite in FP32: weights or input are broken. Run "
                "'omniport validate' on this bundle"
            )
        self._top = np.maximum(self._top, top)
        return outputs

    def found(self) -> dict[str, float]:
        """Largest magnitude by `omniport.export.graphs.mixed_precision.range_key`."""
        return {key: float(top) for key, top in zip(self._keys, self._top, strict=True)}

    def release(self) -> None:
        """Release the session."""
        del self.inner


def _observed(bundle: Bundle, spec: GraphSpec) -> _ObservedGraph:
    path = bundle.path(spec.file)
    model, spec = load_copy(path, spec, emulate=False)
    model = _typed(model)
    keys = _add_output(model, spec)
    spec = replace(spec, outputs=(*spec.outputs, TensorSpec(_OUTPUT, "float32", ("values",))))
    return _ObservedGraph(open_graph(model, spec, path.parent, physical_cores()), keys)


def _typed(model: ir.Model) -> ir.Model:
    """The model with the types of all values: exported files hold them, edited ones may not."""
    import onnx

    if all(value.dtype is not None for node in model.graph for value in node.outputs if value.name):
        return model
    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))


def _add_output(model: ir.Model, spec: GraphSpec) -> list[str]:
    """Add the output of ranges; returns the keys in its order."""
    graph = model.graph
    ranged = [(key, value) for key, value in ranged_values(graph) if value.name not in spec.cache]
    keys, tops = [], []
    for key, value in ranged:
        size = ir.node("Abs", [value], name=f"range/{key}/abs")
        top = ir.node("ReduceMax", [size.outputs[0]], {"keepdims": 0}, name=f"range/{key}")
        shape = ir.node("Reshape", [top.outputs[0], _one(graph)], name=f"range/{key}/1")
        graph.extend([size, top, shape])
        keys.append(key)
        tops.append(shape.outputs[0])
    concat = ir.node("Concat", tops, {"axis": 0}, name=_OUTPUT)
    out = concat.outputs[0]
    out.name, out.dtype, out.shape = _OUTPUT, ir.DataType.FLOAT, ir.Shape(["values"])
    graph.append(concat)
    graph.outputs.append(out)
    return keys


def _one(graph: ir.Graph) -> ir.Value:
    name = "range/one"
    if name not in graph.initializers:
        value = ir.Value(name=name, const_value=ir.tensor(np.array([1], np.int64), name=name))
        value.dtype, value.shape = ir.DataType.INT64, ir.Shape([1])
        graph.register_initializer(value)
    return graph.initializers[name]
