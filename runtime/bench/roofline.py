"""Time two ways of doing the same thing, and measure the machine's roofline: memory reads, float32 matrix products.

The two ways are timed in alternation, so that other load affects both.

Both rates are measured with numpy, whose products use the same vector units as any runtime's, and both are the best of
several tries: a roofline is what can be reached, not what happened to be.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..system.host import cpu_name, physical_cores, total_memory
from .results import Environment, Machine, Timing

Clock = Callable[[], float]

#: wall: what a user waits for, on an idle machine. cpu: processor time of the process, which other programs hardly
#: change; it says nothing of threads, so it goes with one.
CLOCKS: Mapping[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}

#: seconds between the two: threads of the one's pool go to sleep before the other is timed
SETTLE = 0.05

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


def alternate(
    ours: Callable[[], object],
    theirs: Callable[[], object] | None,
    rounds: int,
    least: float = 0.2,
    settle: float = SETTLE,
    clock: Clock = time.perf_counter,
) -> tuple[list[float], list[float]]:
    """Seconds of each, round by round. One run of each before the first round warms up and does not count.

    Args:
        least: a round repeats what is short until this many seconds have passed, and counts the average of it.
    """
    runs = [run for run in (ours, theirs) if run is not None]
    repeats = [_repeats(run, least, clock) for run in runs]
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, repeat, kept in zip(runs, repeats, times, strict=True):
            time.sleep(settle)
            kept.append(_seconds(run, repeat, clock))
    return times[0], times[1] if theirs is not None else []


def _repeats(run: Callable[[], object], least: float, clock: Clock) -> int:
    once = _seconds(run, 1, clock)
    return max(1, min(20, round(least / max(once, 1e-9))))


def _seconds(run: Callable[[], object], repeat: int, clock: Clock) -> float:
    begin = clock()
    for _ in range(repeat):
        run()
    return (clock() - begin) / repeat


def spread(values: Sequence[float]) -> Timing:
    """Median, smallest and largest."""
    return Timing(median=statistics.median(values), low=min(values), high=max(values), runs=len(values))


def ratio_of(theirs: Sequence[float], ours: Sequence[float]) -> Timing:
    """How many times as fast ours is, round by round: the two of a round had the same neighbours."""
    return spread([a / b for a, b in zip(theirs, ours, strict=True)])
