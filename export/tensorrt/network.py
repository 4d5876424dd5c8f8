"""Parse an ONNX graph into a TensorRT network, and check that it is what the graph's spec says.

Everything that TensorRT accepts with a warning only, or reports unclearly, is checked here: nodes that the parser
cannot take, an input that nothing reads, outputs of another type or shape, a cache that would be copied.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from omniport.runtime.backends.tensorrt.runtime_api import attempt
from omniport.runtime.bundle.graph_spec import GraphSpec, TensorSpec
from omniport.runtime.errors import BuildError

from .builder_api import INT8_BLOCKS, NATIVE_SINCE, Api, too_old_for
from .onnx_file import OnnxFile

#: what to do about a graph that is too new for a parser
LOWERED = "omniport export CHECKPOINT OUT --ops decomposed --kv concat"

#: TensorRT's names of the dtypes in specs
_DTYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int64": "INT64",
    "int32": "INT32",
    "int8": "INT8",
    "bool": "BOOL",
}
_UNUSED = (re.compile(r"Unused Input: (\S+)"), re.compile(r"Input Tensor (\S+) is unused"))


class Parsed:
    """A parsed network, and everything that has to outlive the build.

    Attributes:
        graph: the graph's name, for messages.
        layers: layer type -> count.
    """

    def __init__(self, api: Api, onnx_file: OnnxFile, graph: str) -> None:
        self.api, self.onnx_file, self.graph = api, onnx_file, graph
        self.builder = api.given(attempt(api.module.Builder, api.logger), "builder")
        self.network = api.create_network(self.builder)
        self.parser = api.given(attempt(api.module.OnnxParser, self.network, api.logger), "parser")
        self._mapped: list[Any] = []
        self.layers: dict[str, int] = {}

    def read(self) -> None:
        """Parse the file, weights by address where the parser takes them so.

        Raises:
            BuildError: the parser's first error, with the ONNX node's name, which starts with its module path.
        """
        path = str(self.onnx_file.path)
        if self.api.features.mapped_weights:
            done = self.parser.load_model_proto(self.onnx_file.proto(), path) and self._load_weights()
            done = done and self.parser.parse_model_proto()
        else:
            done = self.parser.parse(self.onnx_file.proto(), path)
        if not done:
            raise BuildError(f"{self.graph}: {_parser_error(self.parser)} ({self.api.builder} {self.api.version})")
        self.layers = dict(Counter(layer.type.name for layer in self.all_layers()))

    def all_layers(self) -> list[Any]:
        """Layers of the network, in its order."""
        return [self.network.get_layer(i) for i in range(self.network.num_layers)]

    def inputs(self) -> dict[str, Any]:
        """Network inputs by name."""
        tensors = (self.network.get_input(i) for i in range(self.network.num_inputs))
        return {tensor.name: tensor for tensor in tensors}

    def outputs(self) -> dict[str, Any]:
        """Network outputs by name."""
        tensors = (self.network.get_output(i) for i in range(self.network.num_outputs))
        return {tensor.name: tensor for tensor in tensors}

    def allow_decomposition(self) -> None:
        """Let every attention fall back to several kernels: FP32 has no fused one."""
        for layer in self.all_layers():
            if layer.type.name == "ATTENTION_INPUT":
                self.api.make_decomposable(layer)

    def _load_weights(self) -> bool:
        for weight in self.onnx_file.weights:
            data = self.onnx_file.mapped(weight)
            self._mapped.append(data)  # the parser keeps the address
            if not self.parser.load_initializer(weight.name, data.ctypes.data, data.nbytes):
                raise BuildError(
                    f"the parser refuses weight {weight.name!r} of {self.onnx_file.path} ({data.nbytes} bytes): "
                    f"{_parser_error(self.parser)}. Export the bundle again"
                )
        return True


def parse(api: Api, onnx_file: OnnxFile, spec: GraphSpec, fixed: Mapping[str, int]) -> Parsed:
    """Parse a graph and check that the network is what its spec says.

    Args:
        fixed: symbolic dimensions that get their value before parsing.

    Raises:
        BuildError: an operator, node or zero point the parser does not take, an unused input, an output of another
            dtype or shape than the spec's, or a cache that is not updated in place.
    """
    check_operators(api, onnx_file, spec)
    _check_zero_points(api, onnx_file, spec)
    api.messages()
    onnx_file.fix_dims(fixed)
    parsed = Parsed(api, onnx_file, spec.name)
    parsed.read()
    _check_inputs(parsed, spec)
    check_unused(spec.name, api.messages())
    _check_borders(parsed, spec, fixed)
    _check_cache(parsed, spec)
    if api.features.native_attention:
        parsed.allow_decomposition()
    return parsed


def export_without(lacking: Iterable[str]) -> str:
    """The export that does without what a parser lacks: quantized half-precision graphs have no INT8 in blocks."""
    return LOWERED + (" --precision fp16" if any(what.startswith(INT8_BLOCKS) for what in lacking) else "")


def check_operators(api: Api, onnx_file: OnnxFile, spec: GraphSpec) -> None:
    """Whether the parser here knows every operator of the graph.

    Raises:
        BuildError: names the operators, the TensorRT they came with, and the export options that do without.
    """
    lacking = too_old_for(onnx_file.needs(), onnx_file.opset, api.version) if api.builder == "tensorrt" else []
    if not lacking:
        probe = Parsed(api, onnx_file, spec.name)
        unknown = sorted(op for op in onnx_file.operators if not probe.parser.supports_operator(op))
        lacking = [_with_version(op) for op in unknown]
    if lacking:
        raise BuildError(
            f"{spec.name} needs a newer {api.builder} than {api.version}, which does not parse {', '.join(lacking)}. "
            f"Upgrade it, or export with older operators: {export_without(lacking)}"
        )


def _check_zero_points(api: Api, onnx_file: OnnxFile, spec: GraphSpec) -> None:
    found = onnx_file.zero_points()
    if found:
        raise BuildError(
            f"{spec.name}: {len(found)} weights have zero points, as AWQ and asymmetric GPTQ checkpoints do "
            f"({found[0]}), and {api.builder} takes symmetric integers only. Export the checkpoint again with "
            "--zero-points separate, which computes the same with a second, small product"
        )


def check_unused(graph: str, messages: Iterable[tuple[str, str]]) -> None:
    """Whether the parser or builder said that it leaves an input out.

    Raises:
        BuildError: names the inputs.
    """
    unused = [found.group(1) for _, text in messages for rule in _UNUSED if (found := rule.search(text))]
    if unused:
        raise _unused_error(graph, dict.fromkeys(unused))


def _check_inputs(parsed: Parsed, spec: GraphSpec) -> None:
    """Every input of the spec is there, of its dtype, and read by some layer."""
    inputs = parsed.inputs()
    if set(inputs) != {tensor.name for tensor in spec.inputs}:
        raise BuildError(
            f"{spec.name}: the network has the inputs {', '.join(sorted(inputs))}; its spec says "
            f"{', '.join(sorted(t.name for t in spec.inputs))}. Export the bundle again"
        )
    for tensor in spec.inputs:
        _check_dtype(spec.name, "input", tensor, inputs[tensor.name])
    layers = parsed.all_layers()
    read = {
        source.name
        for layer in layers
        for i in range(layer.num_inputs)
        if (source := layer.get_input(i)) is not None and source.is_network_input
    }
    if unused := [name for name in inputs if name not in read]:
        raise _unused_error(spec.name, unused)


def _unused_error(graph: str, names: Iterable[str]) -> BuildError:
    return BuildError(
        f"{graph}: the builder leaves out {', '.join(names)}, which nothing in the graph reads: the engine would "
        "ignore what the caller gives. Every input of an exported graph has to be used: this export is not right"
    )


def _check_borders(parsed: Parsed, spec: GraphSpec, fixed: Mapping[str, int]) -> None:
    """Every output of the spec is there with its dtype, rank and constant dimensions."""
    outputs = parsed.outputs()
    if set(outputs) != {tensor.name for tensor in spec.outputs}:
        raise BuildError(
            f"{spec.name}: the network has the outputs {', '.join(sorted(outputs))}; its spec says "
            f"{', '.join(sorted(t.name for t in spec.outputs))}. Export the bundle again"
        )
    for tensor in spec.outputs:
        made = outputs[tensor.name]
        _check_dtype(spec.name, "output", tensor, made)
        shape = tuple(made.shape)
        if not _shape_fits(tensor, shape, spec, fixed):
            raise BuildError(
                f"{spec.name}: output {tensor.name!r} has shape {list(shape)} (-1: dynamic) in the network; its spec "
                f"says {list(tensor.shape)}. Export the bundle again"
            )


def _check_dtype(graph: str, side: str, tensor: TensorSpec, made: Any) -> None:
    if made.dtype.name != _DTYPES[tensor.dtype]:
        raise BuildError(
            f"{graph}: {side} {tensor.name!r} is {made.dtype.name} in the network; its spec says {tensor.dtype} "
            f"({_DTYPES[tensor.dtype]}). Export the bundle again"
        )


def _shape_fits(tensor: TensorSpec, made: tuple[int, ...], spec: GraphSpec, fixed: Mapping[str, int]) -> bool:
    """Whether a network shape is that of the spec: constants equal, symbolic dimensions dynamic or within range."""
    if len(made) != len(tensor.shape):
        return False
    for dim, size in zip(tensor.shape, made, strict=True):
        if isinstance(dim, int) or dim in fixed:
            wanted = dim if isinstance(dim, int) else fixed[dim]
            if size != wanted:
                return False
        elif size != -1:
            factor, _, name = dim.rpartition("*")
            span = spec.dims[name]
            if span.min != span.max or size != int(factor or 1) * span.min:
                return False
    return True


def _check_cache(parsed: Parsed, spec: GraphSpec) -> None:
    """Every aliased output is written by a native cache update whose cache is the aliased input."""
    if not spec.aliases:
        return
    updates = {layer.get_output(0).name: layer for layer in parsed.all_layers() if layer.type.name == "KV_CACHE_UPDATE"}
    for output, source in spec.aliases.items():
        layer = updates.get(output)
        cache = None if layer is None else layer.get_input(0)
        if cache is None or cache.name != source or not cache.is_network_input:
            what = "no native cache update writes it" if layer is None else f"it updates {cache.name if cache else '-'}"
            raise BuildError(
                f"{spec.name}: the cache output {output!r} would not share its buffer with {source!r}: {what}, so "
                "every step would copy the cache. Export again with the static cache (TensorRT 10.15 and later), or "
                f"with the growing one: {LOWERED}"
            )


def _parser_error(parser: Any) -> str:
    """The parser's first error: node, operator, and what it says in one line."""
    if parser.num_errors == 0:
        return "the parser gives no reason"
    error = parser.get_error(0)
    text = " ".join(str(error.desc()).split())[:600]
    return f"node {error.node_name()!r} ({error.node_operator()}) cannot be parsed: {error.code()!s}: {text}"


def _with_version(operator: str) -> str:
    since = NATIVE_SINCE.get(operator)
    return f"{operator} ({since[0]}.{since[1]})" if since else operator
