"""Find the constant weights of a graph that can be quantized, and read them row by row.

Weights are read with plain file reads into fresh arrays: nothing is memory-mapped, so resident memory does not grow
with the file.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from omniport.runtime.bundle.recipes import CHANNELS_FIRST, CHANNELS_LAST, Weight
from omniport.runtime.errors import BundleError
from omniport.runtime.system.page_cache import forget

Array = NDArray[Any]
#: bytes of a weight handled at once
BLOCK_BYTES = 32 << 20
#: weights of fewer bytes stay as they are: nothing is gained
SMALLEST_BYTES = 1024

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Stored:
    """Where a tensor's bytes lie: ``length`` of them from ``offset`` of ``path``; rows are its first dimension."""

    name: str
    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, start: int, stop: int) -> Array:
        """Rows ``start`` to ``stop``, in a fresh array.

        Raises:
            BundleError: the file ends before they do.
        """
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        view = out.reshape(-1).view(np.uint8).data
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset + start * row)
            while view and (got := file.readinto(view)):
                view = view[got:]
        if view:
            raise BundleError(f"{self.path} ends before weight {self.name!r} does. Copy or export the bundle again")
        return out

    def forget(self) -> None:
        """What was read will not be read again: the system need not hold it."""
        with contextlib.suppress(OSError), open(self.path, "rb", buffering=0) as file:
            forget(file.fileno(), self.offset, self.nbytes)


def find_weights(model: ir.Model) -> tuple[Weight, ...]:
    """Weights that can be quantized, in the graph's order: constants that MatMul, Gemm or Conv alone read."""
    found: dict[str, Weight] = {}
    for node in model.graph:
        value = node.inputs[1] if len(node.inputs) > 1 else None
        if value is None or value.name is None or value.name not in model.graph.initializers or value.shape is None:
            continue
        kind, layout = _use(node)
        shape = value.shape.numpy()
        if not kind or value.dtype not in _FLOATS or (kind == "matmul" and len(shape) != 2):
            continue
        if math.prod(shape) * value.dtype.itemsize < SMALLEST_BYTES:
            continue
        if all(use.idx == 1 and _use(use.node) == (kind, layout) for use in value.uses()):
            found[value.name] = Weight(value.name, kind, layout, shape, value.dtype.numpy().name)
    return tuple(found.values())


def _use(node: ir.Node) -> tuple[str, str]:
    """(kind, layout) of a node's second input; empty if it is no weight."""
    if node.op_type == "MatMul":
        return "matmul", CHANNELS_LAST
    if node.op_type == "Gemm":
        flag = node.attributes.get("transB")
        return "matmul", CHANNELS_FIRST if flag is not None and flag.as_int() else CHANNELS_LAST
    return ("conv", CHANNELS_FIRST) if node.op_type == "Conv" else ("", "")


def stored(model: ir.Model, folder: Path, listed: Mapping[str, Path]) -> dict[str, Stored]:
    """Where the weights outside an ONNX file lie.

    Args:
        folder: of the ONNX file, relative to the bundle, as in bundle.json (for names).
        listed: data files of the graph by path relative to the bundle.

    Raises:
        BundleError: a weight in a file that the bundle does not list.
    """
    result = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        file = (folder / tensor.location).as_posix()
        if file not in listed:
            raise BundleError(
                f"weight {name!r} lies in {str(tensor.location)!r}, which bundle.json does not list for its graph. "
                "Export the bundle again"
            )
        dtype = np.dtype(tensor.dtype.numpy())
        result[name] = Stored(name, listed[file], tensor.offset or 0, tensor.shape.numpy(), dtype)
    return result


def row_blocks(shape: tuple[int, ...], itemsize: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Row ranges of a tensor, each about ``BLOCK_BYTES`` and, but for the last, a multiple of ``multiple`` rows."""
    if not shape:
        yield 0, 1
        return
    row = max(1, math.prod(shape[1:]) * itemsize)
    step = max(1, BLOCK_BYTES // row // multiple) * multiple
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])
