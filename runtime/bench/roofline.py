"""The roofline: what a machine reaches, what a graph's run asks of it, and the time of two ways in alternation.

The two ways are timed in alternation, so that other load affects both.

Operations are counted from ONNX Runtime's profile: it names the operators that really ran, with the shapes that they
had. So it also says where the time went.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..backends.onnxruntime.backend import OrtBackend, OrtGraph
from ..backends.onnxruntime.product_rate import product_rate
from ..bundle.reader import Bundle
from ..system.files import scratch_folder
from ..system.host import cpu_name, physical_cores, total_memory
from ..system.rates import READ_BYTES, SIDE, Clock, read_bandwidth
from .results import Environment, Machine, Timing

#: wall: what a user waits for, on an idle machine. cpu: processor time of the process, which other programs hardly
#: change; it says nothing of threads, so it goes with one.
CLOCKS: Mapping[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}

#: seconds between the two: threads of the one's pool go to sleep before the other is timed
SETTLE = 0.05

_LIBRARIES = ("omniport", "numpy", "onnxruntime", "onnxruntime-gpu", "openvino")

#: operators, by how their operations are counted
_PRODUCTS = {
    "MatMul",
    "FusedMatMul",
    "Gemm",
    "FusedGemm",
    "MatMulNBits",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
}
_CONVOLUTIONS = {"Conv", "FusedConv", "ConvInteger"}


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
    threads: int, tries: int = 5, read_bytes: int = READ_BYTES, side: int = SIDE, clock: Clock = time.perf_counter
) -> Machine:
    """Read bandwidth and matrix product rate with that many threads.

    Args:
        threads: of one operator; both are measured with as many, but BLAS has its own.
        tries: of each; the best counts.
        read_bytes: of the array that is read. side: of the square float32 matrices.
    """
    return Machine(
        read_bandwidth=read_bandwidth(threads, tries, read_bytes, clock),
        matmul_rate=product_rate(threads, tries, side, clock),
        load_average=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    )


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


@dataclass(frozen=True)
class Profile:
    """One run: operations (a multiplication and an addition are two), and seconds by operator, largest first."""

    operations: float
    seconds: dict[str, float]


def profile_run(bundle: Bundle, name: str, threads: int, run: Callable[[OrtGraph], object]) -> Profile:
    """Run a graph once, after a warm-up, in a separate session that keeps a profile."""
    with scratch_folder("omniport-profile-") as folder:
        backend = OrtBackend(bundle, threads=threads, profiles=folder)
        graph = backend.graph(name)
        run(graph)
        run(graph)
        events = json.loads(graph.end_profile().read_text(encoding="utf-8"))
        backend.close()
    return read_profile(events)


def weight_bytes(bundle: Bundle, name: str) -> int:
    """Size of a graph's weights as they are stored."""
    manifest = bundle.manifest
    return sum(manifest.files[file].size for file in manifest.graphs[name].data)


def read_profile(events: list[dict[str, Any]]) -> Profile:
    """The last run of a profile."""
    begin = max(event["ts"] for event in events if event["name"] == "model_run")
    seconds: dict[str, float] = {}
    operations = 0.0
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time") or event["ts"] < begin:
            continue
        arguments = event["args"]
        kind = arguments["op_name"]
        seconds[kind] = seconds.get(kind, 0.0) + event["dur"] / 1e6
        operations += _operations(kind, _shapes(arguments, "input"), _shapes(arguments, "output"))
    return Profile(operations, dict(sorted(seconds.items(), key=lambda item: -item[1])))


def _shapes(arguments: Mapping[str, Any], side: str) -> list[list[int]]:
    """Shapes of a node's inputs or outputs: the profile has one {type: shape} for each."""
    return [next(iter(entry.values()), []) for entry in arguments.get(f"{side}_type_shape", [])]


def _operations(kind: str, inputs: list[list[int]], outputs: list[list[int]]) -> float:
    if kind in _PRODUCTS:
        return 2.0 * math.prod(outputs[0]) * inputs[0][-1]
    if kind in _CONVOLUTIONS:  # weight [out, in / groups, kernel...]
        return 2.0 * math.prod(outputs[0]) * math.prod(inputs[1][1:])
    if kind == "QLinearConv":  # a scale and a zero point come behind each: the weight is the fourth input
        return 2.0 * math.prod(outputs[0]) * math.prod(inputs[3][1:])
    if kind == "ConvTranspose":  # weight [in, out / groups, kernel...]: every input meets all of it
        return 2.0 * math.prod(inputs[0]) * math.prod(inputs[1][1:])
    if kind == "Attention":  # q [B, H, S, D], k [B, Hkv, L, D], v [B, Hkv, L, Dv]
        query, key, value = inputs[:3]
        return 2.0 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    return 0.0
