"""One engine built in a process of its own: its size, its seconds, and the memory that building it took.

Memory is resident memory above that before parsing, sampled every 10 ms: all of it, and the anonymous part alone, which
the kernel cannot drop and read again.
"""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Any

from benchmarks.harness import own_process


def measure(bundle: Path, graph: str, target: str) -> dict[str, Any]:
    """Build one engine.

    Returns:
        weights_bytes, engine_bytes, seconds, peak_bytes, anonymous_bytes, layers; or failed, the message of a build
        that did not go well.
    """
    result: dict[str, Any] = own_process(build, str(bundle), graph, target)
    return result


class _Sampler:
    """Largest resident memory, all and anonymous, above the start."""

    def __init__(self) -> None:
        from omniport.runtime.system.host import resident_memory

        self._resident = resident_memory
        self._fields = ("VmRSS", "RssAnon")
        self._start = {field: resident_memory(field) or 0 for field in self._fields}
        self.peak = dict.fromkeys(self._fields, 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            for field in self._fields:
                self.peak[field] = max(self.peak[field], (self._resident(field) or 0) - self._start[field])

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def build(folder: str, graph: str, target: str) -> dict[str, Any]:
    """As `measure`, in this process."""
    from omniport.export.devices.detect import find_target
    from omniport.export.tensorrt.builder_api import load_api
    from omniport.export.tensorrt.engine_builder import build_engine
    from omniport.runtime.bundle.reader import Bundle
    from omniport.runtime.errors import BuildError

    bundle, api = Bundle.open(folder), load_api("tensorrt-rtx")
    spec = bundle.manifest.graphs[graph]
    about = {"graph": graph, "precision": bundle.manifest.precision, "target": target}
    sampler = _Sampler()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "engine"
        try:
            built = build_engine(api, bundle.path(spec.file), spec, find_target(target), out)
        except BuildError as error:
            return {**about, "failed": str(error)}
        finally:
            sampler.stop()
        return {
            **about,
            "weights_bytes": built.weights_bytes,
            "engine_bytes": out.stat().st_size,
            "seconds": round(built.seconds, 1),
            "peak_bytes": sampler.peak["VmRSS"],
            "anonymous_bytes": sampler.peak["RssAnon"],
            "layers": built.layers,
        }
