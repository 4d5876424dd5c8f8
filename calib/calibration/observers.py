"""Observe a tensor while its values stream by: maxima per channel, a histogram, and sampled rows.

Nothing depends on the order of the values but `Observer.rows`: maxima and counts of several samples are those of any
other order, bit for bit.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omniport.runtime.errors import CheckFailed

#: bins of a finished histogram (`omniport.calib.calibration_file.ARRAYS`)
BINS = 2048
#: bins while values stream: the range is at most twice the largest magnitude, so at least eight fall into one of `BINS`
_FINE = 32768
#: values looked at at once
_PIECE = 1 << 22
#: input rows kept for searches that need real inputs, and the bytes that they may take
KEPT_ROWS = 256
_KEPT_BYTES = 8 << 20


class Histogram:
    """Counts of ``|x|`` in equal bins from 0 to a power of two that grows with the values.

    A range that doubles merges its bins in pairs, and the edges stay where they were: so the counts do not depend on
    when the largest value came.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(_FINE, np.int64)
        self.exponent: int | None = None

    def add(self, magnitudes: torch.Tensor, top: float) -> None:
        """Count values.

        Args:
            magnitudes: float32, any shape, none negative.
            top: the largest of them, finite.
        """
        self._grow(math.frexp(top)[1] if top > 0 else None)
        flat = magnitudes.reshape(-1)
        if self.exponent is None:
            self.counts[0] += flat.numel()
            return
        scale = math.ldexp(_FINE, -self.exponent)
        for start in range(0, flat.numel(), _PIECE):
            # in float64: the product with a power of two then neither overflows nor loses a bit
            places = (flat[start : start + _PIECE].double() * scale).long()
            self.counts += torch.bincount(places, minlength=_FINE).numpy()

    def finish(self, top: float) -> NDArray[np.int64]:
        """Counts in `BINS` equal bins from 0 to ``top``; a fine bin goes where its middle is."""
        if self.exponent is None or top <= 0:
            return np.concatenate([self.counts[:1], np.zeros(BINS - 1, np.int64)])
        middles = (np.arange(_FINE) + 0.5) * math.ldexp(1 / _FINE, self.exponent)
        places = np.minimum((middles * (BINS / top)).astype(np.int64), BINS - 1)
        found = np.zeros(BINS, np.int64)
        np.add.at(found, places, self.counts)
        return found

    def _grow(self, exponent: int | None) -> None:
        if exponent is None or (self.exponent is not None and exponent <= self.exponent):
            return
        if self.exponent is not None:
            merged = min(_FINE, 1 << min(exponent - self.exponent, 20))
            counts = np.zeros_like(self.counts)
            counts[: _FINE // merged] = self.counts.reshape(-1, merged).sum(axis=1)
            self.counts = counts
        self.exponent = exponent


class Observer:
    """What one tensor looked like.

    Attributes:
        name: ``graph/weight``, for messages.
        absmax: float32 [K], largest magnitude of each channel so far; empty before the first value.
        count: values seen.
    """

    def __init__(self, name: str, axis: int, keep: bool, side: str = "input") -> None:
        """``axis``: where the channels are. ``keep``: whether rows are kept for `rows`. ``side``: for messages."""
        self.name = name
        self.absmax: NDArray[np.float32] = np.zeros(0, np.float32)
        self.count = 0
        self._axis, self._keep, self._side = axis, keep, side
        self._histogram = Histogram()
        self._kept: list[torch.Tensor] = []
        self._rows, self._stride = 0, 1

    def see(self, x: torch.Tensor) -> None:
        """Take values in.

        Raises:
            CheckFailed: NaN or infinity among them; names the layer.
        """
        if not x.numel():
            return
        size = x.detach().float().abs()
        axes = [axis for axis in range(size.ndim) if axis != self._axis % size.ndim]
        top = size.amax(dim=axes).numpy()  # NaN or infinite if any value of the channel is
        if not np.isfinite(top).all():
            channels = np.flatnonzero(~np.isfinite(top))
            raise CheckFailed(
                f"{self.name}: its {self._side} is not finite in {len(channels)} of {len(top)} channels (channel "
                f"{channels[0]}: {top[channels[0]]}), in FP32. Weights or input are broken: run omniport validate on "
                "an FP32 bundle of this checkpoint"
            )
        self.absmax = np.maximum(self.absmax, top) if len(self.absmax) else top
        self.count += size.numel()
        self._histogram.add(size, float(top.max()))
        if self._keep:
            self._sample(x.detach().float().movedim(self._axis, -1).reshape(-1, len(top)))

    @property
    def hist(self) -> NDArray[np.int64]:
        """int64 [BINS]: counts of magnitudes from 0 to the largest."""
        return self._histogram.finish(float(self.absmax.max(initial=0)))

    @property
    def rows(self) -> torch.Tensor:
        """float32 [n, K]: at most `KEPT_ROWS` of the inputs, evenly spread over all that came."""
        return torch.cat(self._kept) if self._kept else torch.zeros(0, len(self.absmax))

    def state(self) -> tuple[Any, ...]:
        """All that was seen, for `restore`."""
        histogram = self._histogram
        counts, absmax = torch.from_numpy(histogram.counts), torch.from_numpy(self.absmax)
        return absmax, self.count, counts, histogram.exponent, self._kept, self._rows, self._stride

    def restore(self, state: tuple[Any, ...]) -> None:
        """Go on from what another observer had seen, as its `state` gave it."""
        absmax, self.count, counts, self._histogram.exponent, self._kept, self._rows, self._stride = state
        self.absmax, self._histogram.counts = absmax.numpy(), counts.numpy()

    def _sample(self, rows: torch.Tensor) -> None:
        """Keep every ``_stride``-th row; when there are too many, every other one of them."""
        first = -self._rows % self._stride
        self._kept.append(rows[first :: self._stride].clone())
        self._rows += len(rows)
        most = max(1, min(KEPT_ROWS, _KEPT_BYTES // (4 * rows.shape[1])))
        while sum(len(kept) for kept in self._kept) > most:
            self._kept = [torch.cat(self._kept)[::2].clone()]
            self._stride *= 2
