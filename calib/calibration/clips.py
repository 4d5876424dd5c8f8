"""Choose a quantization range from a histogram: maximum, percentile, least entropy or least squared error."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_PERCENTILE = 0.9999
#: magnitudes that INT8 can tell apart
_LEVELS = 128
#: bins between two ranges that are tried
_STEP = 16


def choose_clips(hist: NDArray[np.int64], top: float) -> dict[str, float]:
    """The largest magnitude to keep, for each way to choose one (`omniport.calib.calibration_file.CLIPS`).

    Args:
        hist: counts of magnitudes in equal bins from 0 to ``top``.
    """
    if top <= 0 or not hist.any():
        return dict.fromkeys(("max", "percentile", "entropy", "mse"), top)
    width = top / len(hist)
    return {
        "max": top,
        "percentile": min(top, (_quantile(hist) + 1) * width),
        "entropy": min(top, _least_entropy(hist) * width),
        "mse": min(top, _least_error(hist) * width),
    }


def _quantile(hist: NDArray[np.int64]) -> int:
    """The first bin up to which `_PERCENTILE` of the values lie."""
    return int(np.searchsorted(np.cumsum(hist), _PERCENTILE * hist.sum()))


def _candidates(hist: NDArray[np.int64]) -> range:
    return range(_LEVELS, len(hist) + 1, _STEP)


def _least_error(hist: NDArray[np.int64]) -> int:
    """Bins to keep for the least squared error of 127 steps: rounding inside the range, clipping outside."""
    middle = np.arange(len(hist)) + 0.5
    errors = []
    for kept in _candidates(hist):
        step = kept / (_LEVELS - 1)
        rounded = np.minimum(np.rint(middle / step), _LEVELS - 1) * step
        errors.append(float((hist * (middle - rounded) ** 2).sum()))
    return _candidates(hist)[int(np.argmin(errors))]


def _least_entropy(hist: NDArray[np.int64]) -> int:
    """Bins to keep for the least Kullback-Leibler divergence from what the values were to what `_LEVELS` steps leave.

    After "8-bit inference with TensorRT" (GTC 2017): what is cut off is added to the last bin that is kept; a step's
    count is spread over those of its bins that hold anything. Bin 0, where zeros of activations pile up, is left out.
    """
    counts = hist.astype(np.float64)
    counts[0] = 0
    if not counts.any():
        return len(hist)
    losses = []
    for kept in _candidates(hist):
        inside = counts[:kept]
        reference = inside.copy()
        reference[-1] += counts[kept:].sum()
        losses.append(_divergence(reference, _spread(inside)))
    return _candidates(hist)[int(np.argmin(losses))]


def _spread(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Counts after each step's have become equal over its bins that hold anything."""
    step = np.arange(len(counts)) * _LEVELS // len(counts)
    held = counts > 0
    total = np.bincount(step, counts, _LEVELS)
    bins = np.bincount(step, held, _LEVELS)
    return np.where(held, (total / np.maximum(bins, 1))[step], 0.0)


def _divergence(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    if not q.any():
        return float("inf")
    p, q = p / p.sum(), q / q.sum()
    # a bin that q lacks (only the last can be one) counts as if it held next to nothing, not as infinity
    held = p > 0
    return float((p[held] * np.log(p[held] / np.maximum(q[held], 1e-9))).sum())
