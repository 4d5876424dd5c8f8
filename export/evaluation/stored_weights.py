"""Read the weights of a bundle's graph one by one, those that are stored as integers as the numbers they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from omniport.runtime.bundle.integer_weights import integers_name, scales_name, zero_points_name
from omniport.runtime.bundle.onnx_scan import check_graph_file
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import BundleError
from omniport.runtime.system.foreign import foreign
from onnx import numpy_helper

Array = NDArray[Any]
_FORMATS = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.INT8: "int8",
    onnx.TensorProto.INT4: "int4",
    onnx.TensorProto.FLOAT8E4M3FN: "fp8",
}
#: values of a weight that are handled at once
_PART_VALUES = 8 << 20
#: of scaling rows, then columns, in turns
_PASSES = 4


class StoredGraph:
    """A graph's ONNX file. Nothing that is read is kept.

    Attributes:
        graph: without the weights that lie in files of their own.
        tensors: its initializers, by name.

    Raises:
        BundleError: the file is not the bundle's, or no ONNX.
    """

    def __init__(self, bundle: Bundle, name: str) -> None:
        spec = bundle.manifest.graphs[name]
        self._bundle, self._folder = bundle, PurePosixPath(spec.file).parent
        check_graph_file(bundle.path(spec.file), spec)
        path = bundle.path(spec.file)
        with foreign(BundleError, f"cannot read {path} as ONNX", "Copy or export the bundle again"):
            self.graph = onnx.load(path, load_external_data=False).graph
        self.tensors = {tensor.name: tensor for tensor in self.graph.initializer}
        self._widened = {n.input[0]: n for n in self.graph.node if n.op_type == "DequantizeLinear"}

    def array(self, name: str) -> Array:
        """An initializer."""
        tensor = onnx.TensorProto()
        tensor.CopyFrom(self.tensors[name])
        if tensor.external_data:
            # not by onnx, which refuses files that are hard links, as unchanged graphs of a quantized bundle are
            where = {entry.key: entry.value for entry in tensor.external_data}
            with open(self._bundle.path((self._folder / where["location"]).as_posix()), "rb") as file:
                file.seek(int(where.get("offset", "0")))
                tensor.raw_data = file.read(int(where["length"]))
            tensor.ClearField("external_data")
            tensor.data_location = onnx.TensorProto.DEFAULT
        return numpy_helper.to_array(tensor)

    def format(self, weight: str) -> str:
        """``int8``, ``int4`` or ``fp8`` of a weight that is made of integers, else its dtype. Empty: there is none."""
        tensor = self.tensors.get(integers_name(weight)) or self.tensors.get(weight)
        return "" if tensor is None else _FORMATS.get(tensor.data_type, "")

    def dequantized(self, weight: str) -> NDArray[np.float32] | None:
        """A weight that DequantizeLinear makes of integers; None where none does."""
        node = self._widened.get(integers_name(weight))
        if node is None:
            return None
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        axis, block = attributes.get("axis", 1), attributes.get("block_size", 0)
        integers = self.array(integers_name(weight)).astype(np.float32)
        scales = self.array(scales_name(weight)).astype(np.float32)
        if zero_points_name(weight) in self.tensors:  # in blocks, always
            points = self.array(zero_points_name(weight)).astype(np.float32)
            grouped = integers.reshape(-1, block, *integers.shape[1:])
            grouped -= points[:, None]
        if block:  # of rows, always
            grouped = integers.reshape(-1, block, *integers.shape[1:])
            grouped *= scales[:, None]
            return integers
        shape = [1] * integers.ndim
        shape[axis] = -1
        integers *= scales.reshape(shape if scales.ndim else [1] * integers.ndim)
        return integers


def scale_factors(got: Array, wanted: Array) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What rows [K] and columns [N] of ``got`` [K, N] are multiplied by to be nearest to ``wanted``.

    Smoothing multiplies rows by factors that what comes before is divided by, and the columns of a weight whose output
    the next one smooths. Both are undone elsewhere in the graph and are no loss.
    """
    rows, columns = np.ones(got.shape[0], np.float32), np.ones(got.shape[1], np.float32)
    for _ in range(_PASSES):
        for part in row_parts(got):
            scaled = got[part] * columns
            dots = np.einsum("kn,kn->k", scaled, wanted[part], dtype=np.float64)
            norms = np.einsum("kn,kn->k", scaled, scaled, dtype=np.float64)
            rows[part] = dots / np.maximum(norms, 1e-30)
        dots, norms = np.zeros((2, got.shape[1]))
        for part in row_parts(got):
            scaled = got[part] * rows[part, None]
            dots += np.einsum("kn,kn->n", scaled, wanted[part], dtype=np.float64)
            norms += np.einsum("kn,kn->n", scaled, scaled, dtype=np.float64)
        columns = (dots / np.maximum(norms, 1e-30)).astype(np.float32)
    return rows, columns


def unscaled(got: Array, wanted: Array) -> Array:
    """``got`` [K, N] with each row and each column scaled as `scale_factors` says."""
    rows, columns = scale_factors(got, wanted)
    return got * rows[:, None] * columns


def row_parts(array: Array) -> Iterator[slice]:
    """Rows that are handled at once: a head of a large model, whole and widened, would take gigabytes."""
    step = max(1, _PART_VALUES // max(1, array[0].size if len(array) else 1))
    return (slice(start, start + step) for start in range(0, len(array), step))
