"""Stream a traced graph's weights to disk.

Each weight is read, converted and written in row blocks, so that peak memory depends neither on the model's size nor on
its number of layers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from omniport.runtime.errors import CheckpointError

from .weights import Copy, Rule, Transpose, WeightReader, blocks, evaluate

__all__ = ["Pieces", "write_model"]

#: initializers of at least this many bytes go to the data file
EXTERNAL_BYTES = 1024
#: file offsets of weights, so that runtimes can map them
ALIGNMENT = 4096

Array = NDArray[Any]


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
) -> list[Path]:
    """Write ``path`` and its external data ``path + ".data"``; check the result with ``onnx.checker``.

    Args:
        advance: called with the number of bytes written, after each block.

    Returns:
        the data files (none when every weight is small).
    """
    data = path.with_name(path.name + ".data")
    offset = 0
    with open(data, "wb", buffering=0) as file:
        for name, value in model.graph.initializers.items():
            assert value.dtype is not None
            assert value.shape is not None
            shape = value.shape.numpy()
            nbytes = int(np.prod(shape, dtype=np.int64) * value.dtype.itemsize)
            rule = rules.get(name)
            if nbytes < EXTERNAL_BYTES and not isinstance(rule, Pieces):
                value.const_value = ir.tensor(_small(value, rule, reader, shape), name=name)
                continue
            offset = -(-offset // ALIGNMENT) * ALIGNMENT
            _stream(file.fileno(), offset, rule, value, reader, shape, advance)
            value.const_value = ir.ExternalTensor(
                data.name, offset, nbytes, value.dtype, shape=ir.Shape(shape), name=name, base_dir=path.parent
            )
            offset += nbytes
        file.truncate(offset)
    if offset == 0:
        data.unlink()
    path.write_bytes(ir.to_proto(model).SerializeToString())
    onnx.checker.check_model(str(path))
    return [data] if offset else []


def _stream(
    fd: int,
    offset: int,
    rule: Rule | Pieces | None,
    value: ir.Value,
    reader: WeightReader,
    shape: tuple[int, ...],
    advance: Callable[[int], None],
) -> None:
    """Write one weight at ``offset``, block by block."""
    assert value.dtype is not None
    if isinstance(rule, Pieces):
        for piece in rule.make():
            _pwrite(fd, piece, offset)
            offset += piece.nbytes
            advance(piece.nbytes)
        return
    dtype = _torch_dtype(value.dtype)
    if not isinstance(rule, Copy | Transpose):
        array = _convert(_whole(value, rule, reader), dtype)
        _refuse_not_finite(_tensor(array), value.name, dtype)
        _pwrite(fd, array, offset)
        advance(array.nbytes)
        return
    source = reader.shape(rule.key)
    itemsize = dtype.itemsize
    row = int(np.prod(source[1:], dtype=np.int64))
    for start, stop in blocks(source, itemsize):
        block = _tensor(reader.read(rule.key, start, stop)).to(dtype)
        _refuse_not_finite(block, rule.key, dtype)
        if isinstance(rule, Copy):
            array = _numpy(block.contiguous())
            _pwrite(fd, array, offset + start * row * itemsize)
        else:
            # [out, in] rows become columns of [in, out]: one contiguous run per input feature.
            array = _numpy(block.reshape(stop - start, row).t().contiguous())
            for i in range(row):
                _pwrite(fd, array[i], offset + (i * source[0] + start) * itemsize)
        advance(array.nbytes)


def _refuse_not_finite(block: torch.Tensor, name: str | None, dtype: torch.dtype) -> None:
    # The largest magnitude is NaN or infinite if any value is, and needs no mask as large as the block.
    if not dtype.is_floating_point or block.numel() == 0:
        return
    low, high = (float(v) for v in torch.aminmax(block))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CheckpointError(
            f"weight {name!r} holds values that are not finite in {str(dtype).removeprefix('torch.')}. If it is finite "
            "in the checkpoint, export with --precision fp32 or bf16; otherwise download the checkpoint again."
        )


def _pwrite(fd: int, array: Array, offset: int) -> None:
    view = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _tensor(array: Array) -> torch.Tensor:
    """numpy (bfloat16 included) to torch; only a read-only array (constants of a cached graph) is copied."""
    if not array.flags.writeable:
        array = array.copy()
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _numpy(tensor: torch.Tensor) -> Array:
    """torch (bfloat16 included) to numpy without a copy."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _convert(array: Array, dtype: torch.dtype) -> Array:
    return _numpy(_tensor(np.ascontiguousarray(array)).to(dtype))


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
        array = _convert(array, _torch_dtype(value.dtype))
    return array.reshape(shape)
