"""Weights to integers and scales, block by block: symmetric, rounded to nearest (ties to even, as QuantizeLinear)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omniport.runtime.errors import BundleError

from .recipe import Choice
from .weights import CHANNELS_LAST, Stored, row_blocks

__all__ = ["pack_int4", "quantize", "scale_shape", "scales_from"]

Array = NDArray[Any]
#: bits -> lowest and highest integer. INT8 leaves -128 out, as is usual; INT4 cannot spare one of 16
_RANGES = {8: (-127, 127), 4: (-8, 7)}
_SMALLEST = {"float32": 2.0**-126, "float16": 2.0**-14, "bfloat16": 2.0**-126}


def scale_shape(choice: Choice) -> tuple[int, ...]:
    """Shape of the scales: [channels], or [K / block, N]."""
    shape = choice.weight.shape
    if choice.scheme.block:
        return (shape[0] // choice.scheme.block, *shape[1:])
    return (shape[1] if choice.weight.layout == CHANNELS_LAST else shape[0],)


def quantize(choice: Choice, source: Stored, advance: Callable[[int], None]) -> Iterator[tuple[Array, Array | None]]:
    """(rows of integers int8, their scales) of a weight, in order.

    Scales come with the rows that they belong to; one per channel of [K, N] come all at once, with the first rows, and
    None after. Such a weight is read twice.

    Args:
        advance: called with bytes read.

    Raises:
        BundleError: a weight that is not finite.
    """
    scheme, itemsize = choice.scheme, source.dtype.itemsize
    if scheme.block:
        for start, stop in row_blocks(source.shape, itemsize, scheme.block):
            rows = _read(source, start, stop, advance)
            groups = rows.reshape(-1, scheme.block, rows.shape[1])  # [K / block, block, N]
            scales = _scales(groups.min(axis=1), groups.max(axis=1), scheme.bits, source)
            yield _round(groups, scales[:, None], scheme.bits).reshape(rows.shape), scales
    elif choice.weight.layout == CHANNELS_LAST:
        low, high = np.zeros((2, source.shape[1]), np.float32)
        for start, stop in row_blocks(source.shape, itemsize):
            rows = _read(source, start, stop, lambda _: None)
            np.minimum(low, rows.min(axis=0), out=low)
            np.maximum(high, rows.max(axis=0), out=high)
        scales = _scales(low, high, scheme.bits, source)
        for start, stop in row_blocks(source.shape, itemsize):
            rows = _read(source, start, stop, advance)
            yield _round(rows, scales, scheme.bits), scales if start == 0 else None
    else:
        for start, stop in row_blocks(source.shape, itemsize):
            rows = _read(source, start, stop, advance)
            flat = rows.reshape(len(rows), -1)
            scales = _scales(flat.min(axis=1), flat.max(axis=1), scheme.bits, source)
            yield _round(flat, scales[:, None], scheme.bits).reshape(rows.shape), scales


def scales_from(low: Array, high: Array, bits: int, dtype: np.dtype[Any]) -> Array:
    """The smallest scales, in ``dtype``, that clip neither the lowest nor the highest values (float32).

    Zeros and denormals become the smallest normal number: they are divisors.
    """
    lowest, highest = _RANGES[bits]
    scales = np.maximum(low / np.float32(lowest), high / np.float32(highest)).astype(dtype)
    smallest = np.asarray(_SMALLEST[dtype.name], dtype)
    return np.where(scales < smallest, smallest, scales)


def pack_int4(rows: Array) -> Array:
    """Integers -8..7 as uint8, two a byte, the first in the low half (ONNX, TensorProto.raw_data); an even count."""
    flat = (rows.reshape(-1).view(np.uint8)) & 0x0F
    return flat[0::2] | (flat[1::2] << 4)


def _read(source: Stored, start: int, stop: int, advance: Callable[[int], None]) -> Array:
    rows = source.read(start, stop)
    advance(rows.nbytes)
    return rows.astype(np.float32, copy=False)


def _scales(low: Array, high: Array, bits: int, source: Stored) -> Array:
    if not (np.isfinite(low).all() and np.isfinite(high).all()):  # they are NaN or infinite if any value is
        raise BundleError(f"weight {source.name!r} in {source.path} holds values that are not finite: export it again")
    return scales_from(low, high, bits, source.dtype)


def _round(rows: Array, scales: Array, bits: int) -> Array:
    # by the scale as it is stored: a half-precision one may be smaller than what it was rounded from
    whole = np.rint(rows / scales.astype(np.float32))
    return np.clip(whole, *_RANGES[bits], out=whole).astype(np.int8)
