"""Read what a build needs to know of an ONNX file, without its weights.

Uses the onnx package for its protobuf classes only: it runs on the device, beside TensorRT.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from omniport.runtime.bundle.onnx_scan import scan_onnx
from omniport.runtime.errors import BundleError
from omniport.runtime.system.foreign import foreign
from onnx import TensorProto

from .builder_api import INT8_BLOCKS

#: ONNX element type -> the number format that a target must have for it
_FORMATS: Mapping[int, str] = {
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.FLOAT8E4M3FN: "fp8",
    TensorProto.FLOAT8E5M2: "fp8",
    TensorProto.INT4: "int4",
    TensorProto.UINT4: "int4",
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "int8",
    TensorProto.FLOAT4E2M1: "fp4",
}
_SMALL_INTEGERS = (TensorProto.INT4, TensorProto.UINT4)
#: integers of these formats are weights or quantized values only where these operators touch them
_QUANTIZING = {"QuantizeLinear", "DequantizeLinear"}


#: operators that a weight passes on its way to the one that multiplies it
_PASSING = {"DequantizeLinear", "Cast", "Transpose"}


@dataclass(frozen=True)
class Weight:
    """An initializer kept outside the ONNX file: bytes ``offset`` to ``offset + length`` of ``file``."""

    name: str
    file: Path
    offset: int
    length: int


@dataclass(frozen=True)
class Operand:
    """An initializer by what uses it.

    Attributes:
        operator: type of the first node that reads it, looked for behind DequantizeLinear, Cast and Transpose.
        stride: of that node along its first axis, where it is a convolution.
        scale: it is the scale of quantized weights.
        single: it is stored in float32.
    """

    name: str
    dims: tuple[int, ...]
    operator: str
    stride: int = 1
    scale: bool = False
    single: bool = True


class OnnxFile:
    """An ONNX file whose external weights stay on disk.

    Attributes:
        weights: initializers that are kept outside.
        operators: operator types of the graph.
        opset: version of the standard operators.
    """

    def __init__(self, path: Path, model: onnx.ModelProto) -> None:
        self.path = path
        self._model = model
        graph = model.graph
        self.operators = frozenset(node.op_type for node in graph.node)
        self.opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
        self.weights = tuple(self._weight(tensor) for tensor in graph.initializer if tensor.external_data)
        self._maps: dict[Path, Any] = {}

    def needs(self) -> frozenset[str]:
        """What a parser has to know: the operators, and `INT8_BLOCKS` where weights are stored so."""
        integers = {t.name for t in self._model.graph.initializer if t.data_type == TensorProto.INT8}
        blocked = any(
            node.op_type == "DequantizeLinear" and node.input[0] in integers and attribute.name == "block_size"
            for node in self._model.graph.node
            for attribute in node.attribute
        )
        return self.operators | {INT8_BLOCKS} if blocked else self.operators

    @property
    def weights_bytes(self) -> int:
        """Bytes of all initializers, those inside the file included."""
        inside = sum(_inner_bytes(t) for t in self._model.graph.initializer if not t.external_data)
        return inside + sum(weight.length for weight in self.weights)

    def formats(self) -> frozenset[str]:
        """Number formats that the graph computes in or unpacks weights from: ``fp16``, ``int4``, ..."""
        graph = self._model.graph
        quantized = {name for node in graph.node if node.op_type in _QUANTIZING for name in node.input}
        found = {"fp32"}
        for tensor in graph.initializer:
            kind = _FORMATS.get(tensor.data_type)
            if kind is not None and (kind in ("fp16", "bf16") or tensor.name in quantized):
                found.add(kind)
        for value in (*graph.input, *graph.output):
            kind = _FORMATS.get(value.type.tensor_type.elem_type)
            if kind in ("fp16", "bf16"):
                found.add(kind)
        casts = {a.i for node in graph.node if node.op_type == "Cast" for a in node.attribute if a.name == "to"}
        return frozenset(found | {_FORMATS[to] for to in casts if _FORMATS.get(to) in ("fp16", "bf16", "fp8")})

    def operands(self) -> list[Operand]:
        """The initializers in the order of the nodes that read them; one that nothing reads is left out."""
        tensors = {tensor.name: tensor for tensor in self._model.graph.initializer}
        readers: dict[str, Any] = {}
        for node in self._model.graph.node:
            for name in node.input:
                readers.setdefault(name, node)
        found = []
        for node in self._model.graph.node:
            for name in node.input:
                if name in tensors and readers[name] is node:
                    end = node
                    while end.op_type in _PASSING and end.output[0] in readers:
                        end = readers[end.output[0]]
                    scale = node.op_type == "DequantizeLinear" and name != node.input[0]
                    dims, single = tuple(tensors[name].dims), tensors[name].data_type == TensorProto.FLOAT
                    found.append(Operand(name, dims, end.op_type, _stride(end), scale, single))
        return found

    def zero_points(self) -> list[str]:
        """Nodes that dequantize 4-bit weights with zero points that are not all zero."""
        tensors = {tensor.name: tensor for tensor in self._model.graph.initializer}
        weights = {weight.name: weight for weight in self.weights}
        found = []
        for node in self._model.graph.node:
            name = node.input[2] if node.op_type == "DequantizeLinear" and len(node.input) > 2 else ""
            if name not in tensors or tensors[name].data_type not in _SMALL_INTEGERS:
                continue
            inside = tensors[name].raw_data or tensors[name].int32_data
            if any(inside) or (name in weights and self.mapped(weights[name]).any()):
                found.append(node.name)
        return found

    def fix_dims(self, values: Mapping[str, int]) -> None:
        """Give symbolic dimensions of inputs and outputs their value, in memory; the file stays as it is."""
        graph = self._model.graph
        for value in (*graph.input, *graph.output, *graph.value_info):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param in values:
                    dim.dim_value = values[dim.dim_param]

    def proto(self) -> bytes:
        """The model as bytes, external weights referred to and not included."""
        return bytes(self._model.SerializeToString())

    def release(self) -> None:
        """Release the mapped pages read so far; touching them again reads them again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for data in list(self._maps.values()):  # another thread may be mapping more
                data._mmap.madvise(mmap.MADV_DONTNEED)

    def mapped(self, weight: Weight) -> NDArray[np.uint8]:
        """The bytes of a weight, mapped from the file: memory is used as they are touched.

        Raises:
            BundleError: the file ends before the weight does.
        """
        if weight.file not in self._maps:
            try:
                self._maps[weight.file] = np.memmap(weight.file, np.uint8, "r")
            except (OSError, ValueError) as error:
                raise BundleError(
                    f"cannot read the weights {weight.file}: {error}. Copy or export the bundle again"
                ) from error
        data: NDArray[np.uint8] = self._maps[weight.file][weight.offset : weight.offset + weight.length]
        if len(data) != weight.length:
            raise BundleError(
                f"weight {weight.name!r} lies at {weight.offset} + {weight.length} of {weight.file}, which is shorter. "
                "Copy or export the bundle again"
            )
        return data

    def _weight(self, tensor: TensorProto) -> Weight:
        where = {entry.key: entry.value for entry in tensor.external_data}
        name = where.get("location", "")
        # next to the graph and nowhere else: a bundle may come from anywhere
        if not name or name != Path(name).name or name in (".", ".."):
            raise BundleError(
                f"{self.path} keeps weight {tensor.name!r} in {name!r}; a file beside the graph was expected. Export "
                "the bundle again"
            )
        return Weight(tensor.name, self.path.parent / name, int(where.get("offset", "0")), _length(tensor, where))


def open_onnx(path: Path) -> OnnxFile:
    """Read an ONNX file without its external weights.

    Raises:
        BundleError: no ONNX file, or weights that are kept somewhere else than beside it.
    """
    scan_onnx(path)
    with foreign(BundleError, f"cannot read {path} as ONNX", "Copy or export the bundle again"):
        model = onnx.load(str(path), load_external_data=False)
    return OnnxFile(path, model)


def _stride(node: Any) -> int:
    found = [attribute.ints[0] for attribute in node.attribute if attribute.name == "strides" and attribute.ints]
    return int(found[0]) if found else 1


def _length(tensor: TensorProto, where: Mapping[str, str]) -> int:
    if "length" in where:
        return int(where["length"])
    return -(-int(np.prod(tensor.dims, dtype=np.int64)) * _bits(tensor.data_type) // 8)


def _inner_bytes(tensor: TensorProto) -> int:
    return -(-int(np.prod(tensor.dims, dtype=np.int64)) * _bits(tensor.data_type) // 8)


def _bits(kind: int) -> int:
    if kind in (TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1):
        return 4
    dtype: Any = onnx.helper.tensor_dtype_to_np_dtype(kind)
    return int(dtype.itemsize) * 8
