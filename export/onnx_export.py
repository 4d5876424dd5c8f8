"""Trace one graph on the meta device and stream its weights to disk.

Nothing but names and shapes is in memory while tracing; afterwards each weight is read, converted and written in row
blocks, so that peak memory depends neither on the model's size nor on its number of layers.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from omniport.runtime.graphs import TensorSpec
from torch.export import Dim

from .graph_defs import GraphDefinition
from .ops import translations
from .passes import finish
from .weights import Copy, Rule, Transpose, WeightReader, blocks, evaluate

__all__ = ["OPSET", "trace", "write_model"]

OPSET = 24
#: initializers of at least this many bytes go to the data file
EXTERNAL_BYTES = 1024
#: file offsets of weights, so that runtimes can map them
ALIGNMENT = 4096

Array = NDArray[Any]


def trace(definition: GraphDefinition, reader: WeightReader) -> tuple[ir.Model, dict[str, Rule]]:
    """Trace a graph; its initializers are lazy: nothing is read until it is written.

    Returns:
        the model, and the rule of each initializer that still comes from the checkpoint.
    """
    module = definition.module()
    sizes = _example_sizes(definition)
    examples = [_example(spec, sizes) for spec in definition.inputs]
    dims = {name: Dim(name) for name in sizes}
    shapes = [_dynamic(spec, dims) for spec in definition.inputs]
    if definition.past:
        n = len(examples) - definition.past
        args, dynamic = (*examples[:n], examples[n:]), (*shapes[:n], shapes[n:])
    else:
        args, dynamic = tuple(examples), tuple(shapes)
    with warnings.catch_warnings(), _quiet("torch.onnx"):
        # Names of shared dimensions and pytree internals: nothing the user can act on.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            args,
            dynamic_shapes=dynamic,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            custom_translation_table=translations(),
        )
    assert program is not None
    model = program.model
    rules = dict(module.named_rules(module.prefix))  # type: ignore[arg-type]
    for name, value in model.graph.initializers.items():
        if name in rules:
            value.const_value = _lazy(name, rules[name], value, reader)
    finish(model, definition.inputs, definition.outputs)
    return model, {name: rules[name] for name in model.graph.initializers if name in rules}


def write_model(
    model: ir.Model,
    rules: Mapping[str, Rule],
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
            shape = tuple(int(d) for d in value.shape)
            nbytes = int(np.prod(shape, dtype=np.int64) * value.dtype.itemsize)
            if nbytes < EXTERNAL_BYTES:
                value.const_value = ir.tensor(_small(value, rules.get(name), reader, shape), name=name)
                continue
            offset = -(-offset // ALIGNMENT) * ALIGNMENT
            _stream(file.fileno(), offset, rules.get(name), value, reader, shape, advance)
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
    rule: Rule | None,
    value: ir.Value,
    reader: WeightReader,
    shape: tuple[int, ...],
    advance: Callable[[int], None],
) -> None:
    """Write one weight at ``offset``, block by block."""
    assert value.dtype is not None
    dtype = _torch_dtype(value.dtype)
    if not isinstance(rule, Copy | Transpose):
        array = _convert(_whole(value, rule, reader), dtype)
        _pwrite(fd, array, offset)
        advance(array.nbytes)
        return
    source = reader.shape(rule.key)
    itemsize = dtype.itemsize
    row = int(np.prod(source[1:], dtype=np.int64))
    for start, stop in blocks(source, itemsize):
        block = _tensor(reader.read(rule.key, start, stop))
        if isinstance(rule, Copy):
            array = _numpy(block.to(dtype).contiguous())
            _pwrite(fd, array, offset + start * row * itemsize)
        else:
            # [out, in] rows become columns of [in, out]: one contiguous run per input feature.
            array = _numpy(block.reshape(stop - start, row).to(dtype).t().contiguous())
            for i in range(row):
                _pwrite(fd, array[i], offset + (i * source[0] + start) * itemsize)
        advance(array.nbytes)


def _pwrite(fd: int, array: Array, offset: int) -> None:
    view = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _tensor(array: Array) -> torch.Tensor:
    """numpy (bfloat16 included) to torch without a copy."""
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


def _lazy(name: str, rule: Rule, value: ir.Value, reader: WeightReader) -> ir.TensorProtocol:
    """A tensor that is read when somebody asks: constant folding asks for the small ones only."""
    assert value.dtype is not None
    assert value.shape is not None
    dtype, shape = value.dtype, value.shape

    def read() -> ir.TensorProtocol:
        array = _convert(evaluate(rule, reader), _torch_dtype(dtype))
        return ir.tensor(array.reshape([int(d) for d in shape]), dtype=dtype, name=name)

    return ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(shape), name=name)


def _split(dim: int | str) -> tuple[int, str | None]:
    """``"4*units"`` -> (4, "units"); ``"live"`` -> (1, "live"); 80 -> (80, None)."""
    if isinstance(dim, int):
        return dim, None
    factor, star, name = dim.partition("*")
    return (int(factor), name) if star else (1, dim)


def _example_sizes(definition: GraphDefinition) -> dict[str, int]:
    """A size for each symbolic input dimension: distinct and never 0 or 1, which tracing would specialise on."""
    names: dict[str, int] = {}
    for spec in definition.inputs:
        for dim in spec.shape:
            name = _split(dim)[1]
            if name is not None and name not in names:
                names[name] = 3 + 2 * len(names)
    return names


def _example(spec: TensorSpec, sizes: Mapping[str, int]) -> torch.Tensor:
    shape = [factor * sizes[name] if name else factor for factor, name in map(_split, spec.shape)]
    return torch.empty(shape, dtype=getattr(torch, spec.dtype), device="meta")


def _dynamic(spec: TensorSpec, dims: Mapping[str, Any]) -> dict[int, Any]:
    result = {}
    for axis, (factor, name) in enumerate(map(_split, spec.shape)):
        if name is not None:
            result[axis] = factor * dims[name] if factor > 1 else dims[name]
    return result


class _quiet:
    """Silence a logger's warnings for a while."""

    def __init__(self, name: str) -> None:
        self.logger = logging.getLogger(name)

    def __enter__(self) -> None:
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self.logger.setLevel(self.level)
