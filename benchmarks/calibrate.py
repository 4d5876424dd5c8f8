"""Measure the peak memory and the time of a calibration; write docs/results/calibrate.json and calibrate.md.

    python -m benchmarks.calibrate CHECKPOINT [--name NAME] [--samples 3] [--max-codes 26]
    python -m benchmarks.calibrate --layers 4,12 [--size small | tiny | wide]

The second form makes random checkpoints that differ in the number of layers of every stack (wide: `tiny` with a thinker
of 28 MB a layer, so that layers can be told from noise). A calibration runs in a
process of its own, on the set that `omniport calibrate --sample-data` writes. Memory is the resident set as Linux
counts it, above that after importing all that calibrating imports. Results of several calls gather in the JSON file.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omniport.runtime.system.host import resident_memory

from benchmarks.export_memory import deepen, make_deep
from benchmarks.harness import StageMeter, command_line, own_process, record, table

if TYPE_CHECKING:
    from omniport.export.synthetic.geometries import Size

MB = 1e6


def calibrated(checkpoint: str, samples: int, max_codes: int) -> dict[str, Any]:
    """Calibrate in this process, which has to be a fresh one; sizes in bytes, peaks above imports by stage."""
    import torch
    from omniport.calib.calibration.sample_data import write_samples
    from omniport.calib.calibration.scale_search import AWQ_BLOCKS, awq_factors
    from omniport.calib.calibrator import calibrate

    awq_factors(torch.ones(1, 32), torch.ones(1, 32), AWQ_BLOCKS[0])  # imports Model Optimizer
    imports = resident_memory() or 0
    meter = StageMeter()
    with tempfile.TemporaryDirectory() as scratch:
        data = write_samples(Path(scratch) / "set")
        out = Path(scratch) / "x.calib"
        report = calibrate(checkpoint, data, out, samples=samples, max_codes=max_codes, progress=meter.progress)
        meter.stop()
        size = report.path.stat().st_size
    return {
        "samples": samples,
        "max_codes": max_codes,
        "imports": imports,
        "peaks": {stage: peak - imports for stage, peak in meter.peaks.items()},
        "seconds": {stage: round(spent, 1) for stage, spent in meter.seconds.items()},
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
        (
            name,
            f"{row['samples']}, {row['max_codes']}",
            *(_cell(row["peaks"].get(p, 0), row["weights"][p], row["seconds"].get(p, 0)) for p in parts),
            _cell(max(row["peaks"].values()), sum(row["weights"].values()), sum(row["seconds"].values())),
        )
        for name, row in found.items()
    ]
    note = "\nEach cell: peak of the part's stage, of the part's weights in FP32, and the stage's time.\n"
    return head + "\n".join(table(("checkpoint", "samples, codes", *parts, "all"), rows)) + "\n" + note


def _cell(peak: int, weights: int, seconds: float) -> str:
    return f"{peak / MB:,.0f} of {weights / MB:,.0f} MB, {seconds:,.0f} s"


def measure(options: argparse.Namespace, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The checkpoint that is named, or one for each number of layers, beside what was measured before."""
    limits = options.samples, options.max_codes
    if options.checkpoint:
        found[options.name or options.checkpoint.name] = own_process(calibrated, str(options.checkpoint), *limits)
        yield found
    for layers in map(int, filter(None, options.layers.split(","))):
        with tempfile.TemporaryDirectory() as scratch:
            folder = make_deep(Path(scratch) / "checkpoint", deepen(_geometry(options.size), layers))
            found[f"{options.size}, {layers} layers"] = own_process(calibrated, str(folder), *limits)
        yield found


def main() -> None:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--name", default="", help="what the page calls the checkpoint")
    parser.add_argument("--size", default="small", help="geometry of the checkpoints that --layers makes")
    parser.add_argument("--layers", default="", help="comma-separated layer counts")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--max-codes", type=int, default=26)
    record("calibrate", page, measure, parser)


if __name__ == "__main__":
    main()
