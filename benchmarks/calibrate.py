"""Measure the peak memory and the time of a calibration; write docs/results/calibrate.json and calibrate.md.

    python -m benchmarks.calibrate CHECKPOINT [--name NAME] [--samples 3] [--max-codes 26]
    python -m benchmarks.calibrate --layers 4,12 [--size small | tiny | wide]
    python -m benchmarks.calibrate --page

The second form makes random checkpoints that differ in the number of layers of every stack (wide: `tiny` with a thinker
of 28 MB a layer, so that layers can be told from noise). A calibration runs in a
process of its own, on the set that `omniport calibrate --sample-data` writes. Memory is the resident set as Linux
counts it, above that after importing all that calibrating imports. Results of several calls gather in the JSON file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.export_memory import deepen, make_deep
from benchmarks.harness import RESULTS, own_process

if TYPE_CHECKING:
    from omniport.export.synthetic.geometries import Size

MB = 1e6


def measure(checkpoint: Path, samples: int, max_codes: int) -> dict[str, Any]:
    """Calibrate in a fresh process; sizes in bytes, peaks above imports by stage."""
    found: dict[str, Any] = own_process(calibrated, str(checkpoint), samples, max_codes)
    return found


def calibrated(checkpoint: str, samples: int, max_codes: int) -> dict[str, Any]:
    """As `measure`, in this process."""
    import torch
    from omniport.calib.calibrate import calibrate
    from omniport.calib.calibration.sample_data import write_samples
    from omniport.calib.calibration.scale_search import AWQ_BLOCKS, awq_factors

    awq_factors(torch.ones(1, 32), torch.ones(1, 32), AWQ_BLOCKS[0])  # imports Model Optimizer
    imports = _status("VmRSS")
    peaks: dict[str, int] = {}
    seconds: dict[str, float] = {}
    current, since = "start", time.perf_counter()

    def close() -> None:
        peaks[current] = max(peaks.get(current, 0), _status("VmHWM"))
        seconds[current] = seconds.get(current, 0.0) + time.perf_counter() - since

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal current, since
        if stage != current:
            close()
            Path("/proc/self/clear_refs").write_text("5")
            current, since = stage, time.perf_counter()

    with tempfile.TemporaryDirectory() as scratch:
        data = write_samples(Path(scratch) / "set")
        report = calibrate(
            checkpoint,
            data,
            Path(scratch) / "x.calib",
            samples=samples,
            max_codes=max_codes,
            progress=progress,
        )
        close()
        size = report.path.stat().st_size
    return {
        "samples": samples,
        "max_codes": max_codes,
        "imports": imports,
        "peaks": {stage: peak - imports for stage, peak in peaks.items()},
        "seconds": {stage: round(spent, 1) for stage, spent in seconds.items()},
        "file": size,
        "weights": _weights(checkpoint),
        "cpus": os.cpu_count(),
        "version": report.calibration.header.created_by,
    }


def _weights(checkpoint: str) -> dict[str, int]:
    """Bytes of each part's parameters in float32."""
    from omniport.calib.calibration.checkpoint_source import Source

    with tempfile.TemporaryDirectory() as scratch:
        definitions = Source.open(checkpoint, Path(scratch)).definitions
    return {name: sum(p.numel() * 4 for p in d.module().parameters()) for name, d in definitions.items()}


def _geometry(name: str) -> Size:
    from omniport.export.synthetic.geometries import SIZES

    if name != "wide":
        return SIZES[name]
    tiny, more = SIZES["tiny"], {"hidden_size": 512, "intermediate_size": 4096}
    return dataclasses.replace(tiny, text={**tiny.text, **more, "mrope_section": [16, 24, 24]})


def _status(field: str) -> int:
    """A size from /proc/self/status in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit(f"/proc/self/status has no {field}: this needs Linux")
    return int(found[1]) * 1024


def page(found: dict[str, Any]) -> str:
    """docs/results/calibrate.md."""
    some = next(iter(found.values()))
    tools = ", ".join(f"{name} {version}" for name, version in some["version"].items())
    head = f"""# Calibration: memory and time

Made by `python -m benchmarks.calibrate`; {some["cpus"]} CPU cores, shared with other work while this was measured:
times are upper bounds. {tools}. Peak is the resident set above what imports take ({some["imports"] / MB:,.0f} MB).

"""
    parts = list(some["weights"])
    rows = [
        "| checkpoint | samples, codes | " + " | ".join(parts) + " | all |",
        "|---|---|" + "---|" * (len(parts) + 1),
    ]
    for name, row in found.items():
        cells = [
            f"{row['peaks'].get(part, 0) / MB:,.0f} of {row['weights'][part] / MB:,.0f} MB, "
            f"{row['seconds'].get(part, 0):,.0f} s"
            for part in parts
        ]
        whole = f"{max(row['peaks'].values()) / MB:,.0f} of {sum(row['weights'].values()) / MB:,.0f} MB, "
        whole += f"{sum(row['seconds'].values()):,.0f} s"
        rows.append(f"| {name} | {row['samples']}, {row['max_codes']} | " + " | ".join((*cells, whole)) + " |")
    note = "\nEach cell: peak of the part's stage, of the part's weights in FP32, and the stage's time.\n"
    return head + "\n".join(rows) + "\n" + note


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure the peak memory and the time of a calibration.")
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--name", default="", help="what the page calls the checkpoint")
    parser.add_argument("--size", default="small", help="geometry of the checkpoints that --layers makes")
    parser.add_argument("--layers", default="", help="comma-separated layer counts")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--max-codes", type=int, default=26)
    parser.add_argument("--page", action="store_true", help="only write the page from calibrate.json")
    options = parser.parse_args()
    place = RESULTS / "calibrate.json"
    found: dict[str, Any] = json.loads(place.read_text()) if place.exists() else {}
    if options.checkpoint:
        name = options.name or options.checkpoint.name
        found[name] = measure(options.checkpoint, options.samples, options.max_codes)
    for layers in map(int, filter(None, options.layers.split(","))):
        with tempfile.TemporaryDirectory() as scratch:
            folder = make_deep(Path(scratch) / "checkpoint", deepen(_geometry(options.size), layers))
            found[f"{options.size}, {layers} layers"] = measure(folder, options.samples, options.max_codes)
    place.write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "calibrate.md").write_text(page(found))


if __name__ == "__main__":
    main()
