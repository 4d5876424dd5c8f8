"""Write a traced graph, streaming its weights from the checkpoint to disk.

Each weight is read and converted in row blocks and written in pieces, so that peak memory depends neither on the
model's size nor on its number of layers. Every byte is written once, in order, and hashed while it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from omniport.runtime.bundle.data_file import DataFile
from omniport.runtime.bundle.manifest import FileRecord

from ..models.module import (
    Copy,
    Rule,
    Transpose,
    WeightReader,
    blocks,
    evaluate,
    refuse_not_finite,
    to_numpy,
    to_torch,
    torch_threads,
)

#: initializers of at least this many bytes go to the data file
EXTERNAL_BYTES = 1024
#: bytes of a transposed weight that are put together at once: any of a 7B's layers, a quarter of its head in 16 bits
PANEL_BYTES = 288 << 20
#: rows that are transposed at once
STRIP_ROWS = 128

Array = NDArray[Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Pieces:
    """A tensor's bytes, in order, as arrays that are made when they are written."""

    make: Callable[[], Iterator[Array]]


def write_model(
    model: ir.Model,
    rules: Mapping[str, Rule | Pieces],
    reader: WeightReader,
    path: Path,
    advance: Callable[[int], None],
) -> dict[Path, FileRecord]:
    """Write ``path`` and its external data ``path + ".data"``; check the result with ``onnx.checker``.

    Args:
        advance: called with the number of bytes written, after each block.

    Returns:
        the data files (none when every weight is small), with size and sha256.
    """
    data = path.with_name(path.name + ".data")
    initializers = model.graph.initializers
    large = [(rules.get(name), value) for name, value in initializers.items() if _is_large(rules.get(name), value)]
    # one thread converts: another one writes, and handing pieces of a block to more costs more than it saves
    with DataFile(data) as file, torch_threads(1), closing(prefetch(_stored_blocks(large, reader))) as stored:
        for name, value in initializers.items():
            assert value.dtype is not None
            assert value.shape is not None
            shape, rule = value.shape.numpy(), rules.get(name)
            if not isinstance(rule, Pieces) and not _is_large(rule, value):
                value.const_value = ir.tensor(_small(value, rule, reader, shape), name=name)
                continue
            offset = file.align()
            for piece in _pieces(rule, value, reader, stored):
                file.append(piece)
                advance(piece.nbytes)
            value.const_value = ir.ExternalTensor(
                data.name, offset, _nbytes(value), value.dtype, shape=ir.Shape(shape), name=name, base_dir=path.parent
            )
        record = file.finish()
    if record.size == 0:
        data.unlink()
    path.write_bytes(ir.to_proto(model).SerializeToString())
    onnx.checker.check_model(str(path))
    return {data: record} if record.size else {}


def _is_large(rule: Rule | Pieces | None, value: ir.Value) -> bool:
    """Whether a weight goes to the data file."""
    return isinstance(rule, Pieces) or _nbytes(value) >= EXTERNAL_BYTES


def _nbytes(value: ir.Value) -> int:
    assert value.dtype is not None
    assert value.shape is not None
    return int(np.prod(value.shape.numpy(), dtype=np.int64) * value.dtype.itemsize)


def prefetch(items: Iterator[T]) -> Generator[T, None, None]:
    """Yield the same items while a background thread makes the next one. Its exceptions are raised in the item's place.

    Worth it where making and using them leave the interpreter: reading files, and torch's or numpy's work on large
    arrays. Two items are held at a time.
    """
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="omniport-read") as pool:
        pending = pool.submit(next, items, end)
        while (item := pending.result()) is not end:
            pending = pool.submit(next, items, end)
            yield item  # type: ignore[misc]


def _stored_blocks(
    weights: Iterable[tuple[Rule | Pieces | None, ir.Value]], reader: WeightReader
) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows) of all stored weights, converted, in the order in which `_pieces` takes them."""
    for rule, value in weights:
        if isinstance(rule, Copy | Transpose):
            assert value.dtype is not None
            dtype = _torch_dtype(value.dtype)
            yield from _blocks_of(rule, dtype, reader)


def _blocks_of(rule: Copy | Transpose, dtype: torch.dtype, reader: WeightReader) -> Iterator[tuple[int, torch.Tensor]]:
    source = reader.shape(rule.key)
    times = len(_panels(source, dtype)) if isinstance(rule, Transpose) else 1
    for time in range(times):
        for start, stop in blocks(source, dtype.itemsize):
            block = to_torch(reader.read(rule.key, start, stop)).to(dtype)
            if time == times - 1:
                reader.forget(rule.key, start, stop)
            refuse_not_finite(block, rule.key, dtype)
            yield start, block


def _pieces(
    rule: Rule | Pieces | None, value: ir.Value, reader: WeightReader, stored: Iterator[tuple[int, torch.Tensor]]
) -> Iterator[Array]:
    """One weight as it is to be stored, in pieces that follow one another; ``stored`` gives its blocks next."""
    assert value.dtype is not None
    if isinstance(rule, Pieces):
        yield from rule.make()
        return
    dtype = _torch_dtype(value.dtype)
    if isinstance(rule, Transpose):
        yield from _transposed(reader.shape(rule.key), dtype, stored)
    elif isinstance(rule, Copy):
        for _ in blocks(reader.shape(rule.key), dtype.itemsize):
            yield to_numpy(next(stored)[1].contiguous())
    else:
        array = _convert(_whole(value, rule, reader), dtype)
        refuse_not_finite(to_torch(array), value.name, dtype)
        yield array


def _panels(source: tuple[int, ...], dtype: torch.dtype) -> list[tuple[int, int]]:
    """Input features [first, last) of an [out, in] weight that are transposed together, of about the same number: a
    narrow last panel would read the whole weight again for little."""
    rows, columns = source[0], int(np.prod(source[1:], dtype=np.int64))
    most = max(1, PANEL_BYTES // (rows * dtype.itemsize))
    width = -(-columns // -(-columns // most))
    return [(first, min(columns, first + width)) for first in range(0, columns, width)]


def _transposed(
    source: tuple[int, ...], dtype: torch.dtype, stored: Iterator[tuple[int, torch.Tensor]]
) -> Iterator[Array]:
    """A stored [out, in] weight as [in, out], a panel of input features at a time.

    A weight larger than a panel is read once for each of them. The file is written in order all the same, which costs
    less than many short writes all over it, and lets it be hashed.
    """
    for first, last in _panels(source, dtype):
        panel = _large((last - first, source[0]), dtype)
        for _ in blocks(source, dtype.itemsize):
            start, block = next(stored)
            _transpose_into(panel, start, block.flatten(1)[:, first:last])
        yield to_numpy(panel)


def _large(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """An array to be filled. numpy asks the system for huge pages, without which half the time goes to page faults."""
    return torch.from_numpy(np.empty(shape, f"i{dtype.itemsize}")).view(dtype)


def _transpose_into(panel: torch.Tensor, start: int, block: torch.Tensor) -> None:
    """``panel[:, start : start + rows] = block.t()``, for a block [rows, columns].

    In strips that stay in the cache, each made whole first: torch has a quick transpose for that, and none into a part
    of something larger.
    """
    for first in range(0, len(block), STRIP_ROWS):
        strip = block[first : first + STRIP_ROWS].contiguous()
        panel[:, start + first : start + first + len(strip)] = strip.t().contiguous()


def _convert(array: Array, dtype: torch.dtype) -> Array:
    return to_numpy(to_torch(np.ascontiguousarray(array)).to(dtype))


def _torch_dtype(dtype: ir.DataType) -> torch.dtype:
    name = "float32" if dtype == ir.DataType.FLOAT else dtype.name.lower()
    result: torch.dtype = getattr(torch, name)
    return result


def _whole(value: ir.Value, rule: Rule | None, reader: WeightReader) -> Array:
    if rule is not None:
        return evaluate(rule, reader)
    assert value.const_value is not None
    return value.const_value.numpy()


def _small(value: ir.Value, rule: Rule | None, reader: WeightReader, shape: tuple[int, ...]) -> Array:
    assert value.dtype is not None
    array = np.asarray(_whole(value, rule, reader))
    if rule is not None:
        dtype = _torch_dtype(value.dtype)
        array = _convert(array, dtype)
        refuse_not_finite(to_torch(array), rule.key if isinstance(rule, Copy | Transpose) else value.name, dtype)
    return array.reshape(shape)
