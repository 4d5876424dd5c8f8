"""Write a quantized graph, streaming its weights to the data file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from omniport.runtime.bundle.data_file import DataFile
from omniport.runtime.bundle.integer_weights import integers_name, pack_int4, scales_name
from omniport.runtime.bundle.manifest import FileRecord

from .choices import Choice
from .qdq import QdqPass
from .rounding import rounded_rows
from .smoothing_pass import Factors
from .tensors import Stored, row_blocks


def write_quantized(
    model: ir.Model,
    choices: Sequence[Choice],
    sources: Mapping[str, Stored],
    path: Path,
    advance: Callable[[int], None],
    factors: Mapping[str, Factors] | None = None,
) -> dict[Path, FileRecord]:
    """Quantize ``model`` in place and write ``path`` and its data file; check the result with ``onnx.checker``.

    Args:
        sources: where the weights lie that are not inside the model.
        advance: called with the number of bytes read, after each block.
        factors: weight -> what it is multiplied by before it is rounded.

    Returns:
        the data files (none when every weight is small), with size and sha256.

    Raises:
        BundleError: weights that cannot be read or are not finite.
    """
    chosen = {choice.weight.name: choice for choice in choices if choice.scheme.bits}
    QdqPass(choices)(model)
    data = path.with_name(path.name + ".data")
    with DataFile(data) as file:
        out = _Weights(file)
        for name, choice in chosen.items():
            out.quantized(model.graph, choice, sources[name], advance, (factors or {}).get(name, Factors()))
        for name, value in model.graph.initializers.items():
            if isinstance(value.const_value, ir.ExternalTensor) and name in sources:
                out.copied(value, sources[name], advance)
        record = file.finish()
    if record.size == 0:
        data.unlink()
    path.write_bytes(ir.to_proto(model).SerializeToString())
    onnx.checker.check_model(str(path))
    return {data: record} if record.size else {}


class _Weights:
    """Puts weights into a data file, and tells the graph where they lie."""

    def __init__(self, file: DataFile) -> None:
        self._file = file

    def quantized(
        self, graph: ir.Graph, choice: Choice, source: Stored, advance: Callable[[int], None], factors: Factors
    ) -> None:
        """Integers at one place, then scales, which are small enough to be held."""
        value, scales = (graph.initializers[name(choice.weight.name)] for name in (integers_name, scales_name))
        kept: list[NDArray[Any]] = []

        def integers() -> Iterator[NDArray[Any]]:
            for rows, found in rounded_rows(choice, source, advance, factors):
                yield pack_int4(rows) if choice.scheme.bits == 4 else rows
                if found is not None:
                    kept.append(found)

        self._put(value, integers())
        source.forget()
        self._put(scales, [np.concatenate(kept)])

    def copied(self, value: ir.Value, source: Stored, advance: Callable[[int], None]) -> None:
        """A weight as it is."""

        def blocks() -> Iterator[NDArray[Any]]:
            for first, last in row_blocks(source.shape, source.dtype.itemsize):
                rows = source.read(first, last)
                yield rows
                advance(rows.nbytes)

        self._put(value, blocks())
        source.forget()

    def _put(self, value: ir.Value, pieces: Iterable[NDArray[Any]]) -> None:
        assert value.dtype is not None
        assert value.shape is not None
        start = self._file.align()
        for piece in pieces:
            self._file.append(piece)
        value.const_value = ir.ExternalTensor(
            self._file.path.name,
            start,
            self._file.end - start,
            value.dtype,
            shape=ir.Shape(value.shape),
            name=value.name or "",
            base_dir=self._file.path.parent,
        )
