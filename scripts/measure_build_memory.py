"""Measure the memory and size of engine builds, one process a build, and print them as JSON.

    python scripts/measure_build_memory.py BUNDLE [--graphs thinker,talker] [--target rtx-4090] [--ways ours,plain,two]

Ways: ``ours``, as omniport builds: weights by address, mapped pages let go of, the engine streamed to its file.
``plain``: the parser reads the file and the engine comes back as one block of memory. ``two``: as ours, with a second
profile for new_tokens = 1 (decoders only). Memory is resident memory above that before parsing, sampled every 10 ms:
all of it, and the anonymous part alone, which the kernel cannot drop and read again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any
from unittest import mock

__all__ = ["WAYS", "main", "measure"]

WAYS = ("ours", "plain", "two")


def measure(bundle: Path, graph: str, target: str, way: str = "ours") -> dict[str, Any]:
    """Build one engine in a process of its own.

    Returns:
        weights_bytes, engine_bytes, seconds, peak_bytes, anonymous_bytes, layers.
    """
    command = [sys.executable, __file__, "--child", str(bundle), graph, target, way]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


class _Sampler:
    """Largest resident memory, all and anonymous, above the start."""

    def __init__(self) -> None:
        from omniport.export.memory import resident

        self._resident = resident
        self._fields = ("VmRSS", "RssAnon")
        self._start = {field: resident(field) for field in self._fields}
        self.peak = dict.fromkeys(self._fields, 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            for field in self._fields:
                self.peak[field] = max(self.peak[field], self._resident(field) - self._start[field])

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def _child(folder: str, graph: str, target: str, way: str) -> dict[str, Any]:
    from omniport.export import engine
    from omniport.export.targets import find_target
    from omniport.export.trt_api import load_api
    from omniport.runtime.bundle import Bundle

    bundle, api = Bundle.open(folder), load_api("tensorrt-rtx")
    spec = bundle.manifest.graphs[graph]
    if way == "plain":
        api.features = dataclasses.replace(api.features, mapped_weights=False, streamed_engine=False)
    make = engine.make_profiles if way != "two" else _two_profiles
    sampler = _Sampler()
    with tempfile.TemporaryDirectory() as scratch, mock.patch.object(engine, "make_profiles", make):
        out = Path(scratch) / "engine"
        built = engine.build_engine(api, bundle.path(spec.file), spec, find_target(target), out)
        sampler.stop()
        return {
            "graph": graph,
            "precision": bundle.manifest.precision,
            "target": target,
            "way": way,
            "weights_bytes": built.weights_bytes,
            "engine_bytes": out.stat().st_size,
            "seconds": round(built.seconds, 1),
            "peak_bytes": sampler.peak["VmRSS"],
            "anonymous_bytes": sampler.peak["RssAnon"],
            "layers": built.layers,
        }


def _two_profiles(spec: Any, dims: Any) -> Any:
    from omniport.export.profiles import make_profiles
    from omniport.runtime.graphs import DimRange

    (whole,) = make_profiles(spec, dims)
    (decode,) = make_profiles(spec, {**dims, "new_tokens": DimRange(1, 1, 1)})
    return whole, decode


def main() -> None:
    """The command line."""
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(_child(*sys.argv[2:])))
        return
    parser = argparse.ArgumentParser(description="Measure the memory of engine builds.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--graphs", default="thinker,talker", help="comma-separated names")
    parser.add_argument("--target", default="rtx-4090")
    parser.add_argument("--ways", default="ours,plain", help=f"comma-separated: {', '.join(WAYS)}")
    options = parser.parse_args()
    rows = [
        measure(options.bundle, graph, options.target, way)
        for graph in options.graphs.split(",")
        for way in options.ways.split(",")
    ]
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
