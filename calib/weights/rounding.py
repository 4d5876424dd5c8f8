"""Round weights to INT8, INT4 or E4M3 with scales, block by block: symmetric, ties to even as QuantizeLinear does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from omniport.runtime.bundle.recipes import CHANNELS_LAST, Scheme
from omniport.runtime.errors import BundleError

from .choices import Choice
from .smoothing_pass import Factors
from .tensors import Stored, row_blocks

Array = NDArray[Any]
#: lowest and highest number of a format. INT8 leaves -128 out, as is usual; INT4 cannot spare one of 16
_RANGES = {"int8": (-127, 127), "int4": (-8, 7), "fp8": (-448, 448)}
#: format -> highest number
LARGEST = {name: high for name, (_, high) in _RANGES.items()}
_NO_FACTORS = Factors()
_SMALLEST = {"float32": 2.0**-126, "float16": 2.0**-14, "bfloat16": 2.0**-126}


def scale_shape(choice: Choice) -> tuple[int, ...]:
    """Shape of the scales: [channels], or [K / block, N]."""
    shape = choice.weight.shape
    if choice.scheme.block:
        return (shape[0] // choice.scheme.block, *shape[1:])
    return (shape[1] if choice.weight.layout == CHANNELS_LAST else shape[0],)


def rounded_rows(
    choice: Choice, source: Stored, advance: Callable[[int], None], factors: Factors = _NO_FACTORS
) -> Iterator[tuple[Array, Array | None]]:
    """(rows of numbers, int8 or E4M3; their scales) of a weight, in order.

    Scales come with the rows that they belong to; one per channel of [K, N] come all at once, with the first rows, and
    None after. Such a weight is read twice.

    Args:
        advance: called with bytes read.
        factors: what the weight is multiplied by before; [K, N] only.

    Raises:
        BundleError: a weight that is not finite.
    """
    scheme, itemsize = choice.scheme, source.dtype.itemsize
    if scheme.block:
        for start, stop in row_blocks(source.shape, itemsize, scheme.block):
            rows = _read(source, start, stop, advance, factors)
            groups = rows.reshape(-1, scheme.block, rows.shape[1])  # [K / block, block, N]
            scales = _scales(groups.min(axis=1), groups.max(axis=1), scheme, source)
            yield _round(groups, scales[:, None], scheme).reshape(rows.shape), scales
    elif choice.weight.layout == CHANNELS_LAST:
        low, high = np.zeros((2, source.shape[1]), np.float32)
        for start, stop in row_blocks(source.shape, itemsize):
            rows = _read(source, start, stop, lambda _: None, factors)
            np.minimum(low, rows.min(axis=0), out=low)
            np.maximum(high, rows.max(axis=0), out=high)
        scales = _scales(low, high, scheme, source)
        for start, stop in row_blocks(source.shape, itemsize):
            rows = _read(source, start, stop, advance, factors)
            yield _round(rows, scales, scheme), scales if start == 0 else None
    else:
        for start, stop in row_blocks(source.shape, itemsize):
            rows = _read(source, start, stop, advance, _NO_FACTORS)
            flat = rows.reshape(len(rows), -1)
            scales = _scales(flat.min(axis=1), flat.max(axis=1), scheme, source)
            yield _round(flat, scales[:, None], scheme).reshape(rows.shape), scales


def scales_from(low: Array, high: Array, number: str, dtype: np.dtype[Any]) -> Array:
    """The smallest scales, in ``dtype``, that clip neither the lowest nor the highest values (float32).

    ``number`` is the format, as `Scheme.format`. Zeros and denormals become the smallest normal number: they are
    divisors.
    """
    lowest, highest = _RANGES[number]
    scales = np.maximum(low / np.float32(lowest), high / np.float32(highest)).astype(dtype)
    smallest = np.asarray(_SMALLEST[dtype.name], dtype)
    return np.where(scales < smallest, smallest, scales)


def _read(source: Stored, start: int, stop: int, advance: Callable[[int], None], factors: Factors) -> Array:
    rows = source.read(start, stop)
    advance(rows.nbytes)
    rows = rows.astype(np.float32, copy=False)
    if factors.rows is not None:
        rows *= factors.rows[start:stop, None]
    if factors.columns is not None:
        rows /= factors.columns
    return rows


def _scales(low: Array, high: Array, scheme: Scheme, source: Stored) -> Array:
    if not (np.isfinite(low).all() and np.isfinite(high).all()):  # they are NaN or infinite if any value is
        raise BundleError(f"weight {source.name!r} in {source.path} holds values that are not finite: export it again")
    return scales_from(low, high, scheme.format, source.dtype)


def _round(rows: Array, scales: Array, scheme: Scheme) -> Array:
    # by the scale as it is stored: a half-precision one may be smaller than what it was rounded from
    whole = rows / scales.astype(np.float32)
    if scheme.float8:
        return np.clip(whole, *_RANGES["fp8"], out=whole).astype(ml_dtypes.float8_e4m3fn)
    np.rint(whole, out=whole)
    return np.clip(whole, *_RANGES[scheme.format], out=whole).astype(np.int8)
