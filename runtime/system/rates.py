"""What a processor reaches: reading memory, and FP32 matrix products.

Both are measured with numpy, and both are the best of several tries: what can be reached, not what happened to be. BLAS
may know less of a processor than a runtime does: see `omniport.runtime.backends.onnxruntime.product_rate`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

Clock = Callable[[], float]

#: larger than any last-level cache that this would run beside
READ_BYTES = 1 << 28
SIDE = 1536
_PIECE = 1 << 20


def read_bandwidth(threads: int, tries: int = 5, size: int = READ_BYTES, clock: Clock = time.perf_counter) -> float:
    """Bytes a second: every thread reads its share of one array, in pieces, by a dot product with itself."""
    array = np.ones(size // 4, np.float32)
    shares = np.array_split(array, threads)

    def read(share: np.ndarray[tuple[int], np.dtype[np.float32]]) -> None:
        for start in range(0, len(share), _PIECE):
            piece = share[start : start + _PIECE]
            np.dot(piece, piece)

    with ThreadPoolExecutor(threads) as pool:
        return size / best(lambda: list(pool.map(read, shares)), tries, clock)


def product_rate(tries: int = 5, side: int = SIDE, clock: Clock = time.perf_counter) -> float:
    """Operations a second of a product of square float32 matrices, with BLAS's own threads."""
    a = np.random.default_rng(0).standard_normal((side, side), np.float32)
    out = np.empty_like(a)
    return 2.0 * side**3 / best(lambda: np.matmul(a, a, out=out), tries, clock)


def best(run: Callable[[], object], tries: int, clock: Clock) -> float:
    """Seconds of the quickest of several runs; one before them does not count."""
    run()
    times = []
    for _ in range(tries):
        begin = clock()
        run()
        times.append(clock() - begin)
    return min(times)
