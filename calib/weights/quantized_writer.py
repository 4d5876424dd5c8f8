"""Write a quantized graph, streaming its weights to the data file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from omniport.runtime.bundle.integer_weights import integers_name, pack_int4, scales_name
from omniport.runtime.system.page_cache import WriteBehind

from .qdq import QdqPass
from .recipe import Choice
from .rounding import rounded_rows
from .smoothing_pass import Factors
from .tensors import Stored, row_blocks

#: file offsets of weights, so that runtimes can map them
ALIGNMENT = 4096


def write_quantized(
    model: ir.Model,
    choices: Sequence[Choice],
    sources: Mapping[str, Stored],
    path: Path,
    advance: Callable[[int], None],
    factors: Mapping[str, Factors] | None = None,
) -> list[Path]:
    """Quantize ``model`` in place and write ``path`` and its data file; check the result with ``onnx.checker``.

    Args:
        sources: where the weights lie that are not inside the model.
        advance: called with the number of bytes read, after each block.
        factors: weight -> what it is multiplied by before it is rounded.

    Returns:
        the data files.

    Raises:
        BundleError: weights that cannot be read or are not finite.
    """
    chosen = {choice.weight.name: choice for choice in choices if choice.scheme.bits}
    QdqPass(choices)(model)
    data = path.with_name(path.name + ".data")
    with open(data, "wb", buffering=0) as file:
        out = _DataFile(file.fileno(), data)
        for name, choice in chosen.items():
            out.quantized(model.graph, choice, sources[name], advance, (factors or {}).get(name, Factors()))
        for name, value in model.graph.initializers.items():
            if isinstance(value.const_value, ir.ExternalTensor) and name in sources:
                out.copied(value, sources[name], advance)
        size = out.end
    if size == 0:
        data.unlink()
    path.write_bytes(ir.to_proto(model).SerializeToString())
    onnx.checker.check_model(str(path))
    return [data] if size else []


class _DataFile:
    """The data file that is being written; ``end`` is its length so far."""

    def __init__(self, fd: int, path: Path) -> None:
        self._fd, self._path = fd, path
        self._behind = WriteBehind(fd)
        self.end = 0

    def quantized(
        self, graph: ir.Graph, choice: Choice, source: Stored, advance: Callable[[int], None], factors: Factors
    ) -> None:
        """Integers at one place, then scales, which are small enough to be held."""
        value, scales = (graph.initializers[name(choice.weight.name)] for name in (integers_name, scales_name))
        start, kept = self._aligned(), []
        self.end = start
        for rows, found in rounded_rows(choice, source, advance, factors):
            self._append(pack_int4(rows) if choice.scheme.bits == 4 else rows)
            if found is not None:
                kept.append(found)
        source.forget()
        self._place(value, start)
        self._whole(scales, np.concatenate(kept))

    def copied(self, value: ir.Value, source: Stored, advance: Callable[[int], None]) -> None:
        """A weight as it is."""
        start = self.end = self._aligned()
        for first, last in row_blocks(source.shape, source.dtype.itemsize):
            rows = source.read(first, last)
            self._append(rows)
            advance(rows.nbytes)
        source.forget()
        self._place(value, start)

    def _whole(self, value: ir.Value, array: NDArray[Any]) -> None:
        start = self.end = self._aligned()
        self._append(array)
        self._place(value, start)

    def _aligned(self) -> int:
        return -(-self.end // ALIGNMENT) * ALIGNMENT

    def _place(self, value: ir.Value, start: int) -> None:
        assert value.dtype is not None
        assert value.shape is not None
        value.const_value = ir.ExternalTensor(
            self._path.name,
            start,
            self.end - start,
            value.dtype,
            shape=ir.Shape(value.shape),
            name=value.name or "",
            base_dir=self._path.parent,
        )

    def _append(self, array: NDArray[Any]) -> None:
        view = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        while view:
            written = os.pwrite(self._fd, view, self.end)
            view, self.end = view[written:], self.end + written
        self._behind.wrote(self.end)
