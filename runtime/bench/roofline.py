"""Measure the two rates of the machine's roofline: memory reads, and float32 matrix products.

Both are measured with numpy, whose products use the same vector units as any runtime's, and both are the best of
several tries: a roofline is what can be reached, not what happened to be.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..system.host import cpu_name, physical_cores, total_memory
from .results import Environment, Machine
from .timing import Clock

#: larger than any last-level cache that this would run beside
_READ_BYTES = 1 << 28
_PIECE = 1 << 20
_SIDE = 1536
_LIBRARIES = ("omniport", "numpy", "onnxruntime")


def environment(more: tuple[str, ...] = ()) -> Environment:
    """This machine, and the versions of what takes part (``more``: further distributions)."""
    return Environment(
        processor=cpu_name(),
        cores=physical_cores(),
        memory_bytes=total_memory(),
        system=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        versions={name: version for name in (*_LIBRARIES, *more) if (version := _version(name))},
    )


def measure_machine(
    threads: int, tries: int = 5, read_bytes: int = _READ_BYTES, side: int = _SIDE, clock: Clock = time.perf_counter
) -> Machine:
    """Read bandwidth and matrix product rate with that many threads.

    Args:
        threads: of one operator; the bandwidth is measured with as many, the product with BLAS's own.
        tries: of each; the best counts.
        read_bytes: of the array that is read. side: of the square float32 matrices.
    """
    return Machine(
        read_bandwidth=_bandwidth(threads, tries, read_bytes, clock),
        matmul_rate=_products(tries, side, clock),
        load_average=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    )


def _bandwidth(threads: int, tries: int, size: int, clock: Clock) -> float:
    """Bytes a second: every thread reads its share of one array, in pieces, by a dot product with itself."""
    array = np.ones(size // 4, np.float32)
    shares = np.array_split(array, threads)

    def read(share: np.ndarray[tuple[int], np.dtype[np.float32]]) -> None:
        for start in range(0, len(share), _PIECE):
            piece = share[start : start + _PIECE]
            np.dot(piece, piece)

    with ThreadPoolExecutor(threads) as pool:
        return size / _best(lambda: list(pool.map(read, shares)), tries, clock)


def _products(tries: int, side: int, clock: Clock) -> float:
    a = np.random.default_rng(0).standard_normal((side, side), np.float32)
    out = np.empty_like(a)
    return 2.0 * side**3 / _best(lambda: np.matmul(a, a, out=out), tries, clock)


def _best(run: Callable[[], object], tries: int, clock: Clock) -> float:
    run()
    times = []
    for _ in range(tries):
        begin = clock()
        run()
        times.append(clock() - begin)
    return min(times)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
