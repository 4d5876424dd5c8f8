"""The process in which graphs are measured: both backends in turns, one graph at a time.

    python -m omniport.runtime.backends.mixed.measuring_child BUNDLE THREADS COMPUTE GRAPH...

A process of its own can be ended when the time is up, and its memory, or a crash in a native library, is nobody
else's. It tells on stdout, a line of JSON each, which graph it begins, and what it found. Nothing that OpenVINO
compiles is kept: a process that is ended may leave half a file.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from ...bench.workloads import Sizes, stage_jobs
from ...bundle.parts import PARTS
from ...bundle.reader import Bundle
from ...errors import OmniportError
from ...generation.decoder import Decoder
from ...system import host
from ..base import Array, Backend
from ..onnxruntime.backend import OrtBackend
from ..openvino.backend import OpenVinoBackend, OpenVinoGraph
from .graph_times import OPENVINO, ORT, GraphTimes, Told

#: rounds at least and at most, and seconds after which there is no more than the least
_ROUNDS, _MOST_ROUNDS, _SECONDS = 2, 5, 1.0
#: a backend that takes so many times as long in its second run is not given more rounds
_HOPELESS = 1.5
#: what a decoder is given: tokens at once, and one by one
_PREFILL, _STEPS = 64, 16
_SIZES = Sizes(audio=(2,), images=((384, 512),), codes=(60,), frames=(116,))
#: copies of a graph's weights that two backends hold while the second loads
_COPIES = 3


def measure_graph(bundle: Bundle, name: str, threads: int, compute: str) -> GraphTimes:
    """Seconds of the same work in both backends.

    Args:
        threads: of one operator. compute: dtype of float32 graphs in OpenVINO.
    """
    spec = bundle.manifest.graphs[name]
    weights = sum(bundle.manifest.files[file].size for file in (spec.file, *spec.data))
    free = host.available_memory()
    if free is not None and _COPIES * weights > free:
        return GraphTimes(
            problem=f"not measured: {_COPIES * weights >> 20} MiB are needed for it, {free >> 20} are free"
        )
    only = bundle.with_graphs((name,))
    try:
        runs = {ORT: _work(only, name, OrtBackend(only, threads=threads))}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            other = OpenVinoBackend(only, threads, compute)
            if not isinstance(other.graph(name), OpenVinoGraph):
                return GraphTimes(problem=str(said[-1].message) if said else "OpenVINO cannot load it")
        runs[OPENVINO] = _work(only, name, other)
        watch = host.BusyWatch()
        return msgspec.structs.replace(_in_turns(runs), busy=round(watch.share() or 0.0, 3))
    except OmniportError as error:
        return GraphTimes(problem=f"not measured: {error}")


def _in_turns(runs: dict[str, Callable[[], Array]]) -> GraphTimes:
    results = {name: np.asarray(run(), np.float64) for name, run in runs.items()}  # a first run takes longer
    expected, got = results[ORT], results[OPENVINO]
    size = float(np.sqrt(np.mean(np.square(expected))))
    difference = float(np.sqrt(np.mean(np.square(got - expected)))) / max(size, 1e-30)
    if not np.isfinite(difference):
        return GraphTimes(problem="OpenVINO's result is not finite")
    best = dict.fromkeys(runs, float("inf"))
    begun = time.perf_counter()
    for done in range(_MOST_ROUNDS):
        slow, quick = max(best.values()), min(best.values())
        if done and slow > _HOPELESS * quick:
            break
        if done >= _ROUNDS and time.perf_counter() - begun > _SECONDS:
            break
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return GraphTimes(seconds=best, difference=difference)


def _work(bundle: Bundle, name: str, backend: Backend) -> Callable[[], Array]:
    if PARTS[name].decodes:
        return _decoding(bundle, name, backend)
    (job,) = stage_jobs(name, bundle, backend, _SIZES)
    return job.run


def _decoding(bundle: Bundle, name: str, backend: Backend) -> Callable[[], Array]:
    """A prompt, and tokens behind it one by one; gives the last one's logits."""
    count = min(_PREFILL + _STEPS, bundle.manifest.kv.max_context)
    table = bundle.embedding(name)
    rows = table.rows(np.random.default_rng(0).integers(0, table.vocab_size, count))
    graph = backend.graph(name)
    decoder = Decoder(graph, graph.new_cache(count))
    prefill = max(1, count - _STEPS)

    def positions(start: int, stop: int) -> Array:
        return np.repeat(np.arange(start, stop)[None], 3, axis=0)

    def run() -> Array:
        decoder.truncate(0)
        logits = decoder.forward(rows[:prefill], positions(0, prefill))[0]
        for at in range(prefill, count):
            logits = decoder.forward(rows[at : at + 1], positions(at, at + 1))[0]
        return logits

    return run


def _tell(channel: int, told: Told) -> None:
    os.write(channel, msgspec.json.encode(told) + b"\n")


def main(root: str, threads: str, compute: str, *names: str) -> None:
    """Measure graphs of a bundle, in this order."""
    channel = os.dup(1)
    os.dup2(2, 1)  # what libraries print is none of our lines
    os.environ["OMNIPORT_CACHE"] = ""
    tell = partial(_tell, channel)
    bundle = Bundle.open(Path(root))
    for name in names:
        tell(Told(name))
        tell(Told(name, measure_graph(bundle, name, int(threads), compute)))


if __name__ == "__main__":
    main(*sys.argv[1:])
