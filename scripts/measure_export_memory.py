"""Measure the peak memory of an export above the import of torch, and print it as JSON.

    python scripts/measure_export_memory.py CHECKPOINT [--graphs thinker,talker] [--precision fp16] [--out FOLDER]

The export runs in a process of its own. Memory is the resident set as Linux counts it (VmRSS, and its high-water mark
VmHWM, which, unlike ru_maxrss, does not remember the process that started this one). The bundle is thrown away unless
``--out`` is given.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

__all__ = ["main", "measure"]


def measure(
    checkpoint: str, out: Path | None = None, graphs: str = "", precision: str = "fp32", trace_cache: bool = False
) -> dict[str, Any]:
    """Export in a fresh process.

    Args:
        checkpoint: folder or id.
        out: where to put the bundle; a temporary folder if None.
        graphs: comma-separated names; all if empty.
        trace_cache: let graphs come from the cache of traced graphs, which hides what tracing needs.

    Returns:
        bytes: ``torch`` and ``imports``, resident after importing torch, and all that export imports; ``peak``;
        ``above_torch`` and ``above_imports``; ``stages``, the peak of each stage above ``torch``; ``seconds``.
    """
    with tempfile.TemporaryDirectory() as scratch:
        arguments = [checkpoint, str(out or Path(scratch) / "bundle"), graphs, precision]
        environment = dict(os.environ) if trace_cache else dict(os.environ) | {"OMNIPORT_CACHE": ""}
        command = [sys.executable, __file__, "--child", *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _child(checkpoint: str, out: str, graphs: str, precision: str) -> dict[str, Any]:
    import torch  # noqa: F401

    torch_bytes = _status("VmRSS")
    from omniport.export.exporter import export_checkpoint

    imports = _status("VmRSS")
    stages: dict[str, int] = {}
    current = "start"

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal current
        if stage != current:
            stages[current] = _status("VmHWM")
            _reset_peak()
            current = stage

    started = time.perf_counter()
    names = tuple(graphs.split(",")) if graphs else None
    report = export_checkpoint(checkpoint, Path(out), graphs=names, precision=precision, progress=progress)
    stages[current] = _status("VmHWM")
    peak = max(stages.values())
    return {
        "precision": precision,
        "weight_bytes": {graph.name: graph.weight_bytes for graph in report.graphs},
        "torch": torch_bytes,
        "imports": imports,
        "peak": peak,
        "above_torch": peak - torch_bytes,
        "above_imports": peak - imports,
        "stages": {stage: value - torch_bytes for stage, value in stages.items()},
        "seconds": round(time.perf_counter() - started, 1),
    }


def _status(field: str) -> int:
    """A size from /proc/self/status in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit(f"/proc/self/status has no {field}: this needs Linux")
    return int(found[1]) * 1024


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """The command line."""
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(_child(*sys.argv[2:])))
        return
    parser = argparse.ArgumentParser(description="Measure the peak memory of an export.")
    parser.add_argument("checkpoint")
    parser.add_argument("--out", type=Path, default=None, help="keep the bundle here")
    parser.add_argument("--graphs", default="", help="comma-separated names; all by default")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--trace-cache", action="store_true", help="allow cached traces")
    arguments = vars(parser.parse_args())
    print(json.dumps(measure(**arguments), indent=2))


if __name__ == "__main__":
    main()
