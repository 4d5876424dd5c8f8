"""omniport calibrate"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..common import (
    JsonFlag,
    QuietFlag,
    log_console,
    print_json,
    print_line,
    print_table,
    progress_bar,
    require_extra,
    size_text,
)
from ..options import number
from .export import EXPORT_MODULES

if TYPE_CHECKING:
    from omniport.calib import CalibrateReport

NAME = "calibrate"
EXAMPLE = "omniport calibrate Qwen/Qwen2.5-Omni-3B --data calib.jsonl 3b.calib"

#: what calibrating imports beside what exporting does
CALIB_MODULES = ("modelopt", "requests", "huggingface_hub")


def command(
    checkpoint: Annotated[
        str | None, typer.Argument(help="Folder, Hugging Face id, or modelscope:ID.", metavar="CHECKPOINT")
    ] = None,
    out: Annotated[Path | None, typer.Argument(help="File to write.", metavar="OUT.calib")] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help='JSON lines with "messages", and "reply" for those that are spoken.'),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Take this many lines; all if left out.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the speech that is sampled.")] = 0,
    max_speech: Annotated[float, number("SECONDS", 0.1, help="Seconds of speech of a sample at most.")] = 3.0,
    sample_data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write a small ready set to this folder, and do nothing else.")
    ] = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Calibrate a checkpoint for quantization.

    Samples run through every part in FP32, a layer at a time. Ranges of what each product reads and each convolution
    gives, and scales chosen from them, go to OUT.calib. An interrupted run goes on where it stopped.
    """
    from omniport.runtime.errors import UsageError

    if sample_data is not None:
        if checkpoint is not None or out is not None or data is not None:
            raise UsageError(
                "--sample-data only writes a set: give it alone, and calibrate with --data DIR/calib.jsonl"
            )
        _write_samples(sample_data, json, quiet)
        return
    if checkpoint is None or out is None or data is None:
        raise UsageError(
            "CHECKPOINT, OUT.calib and --data FILE are needed; omniport calibrate --sample-data DIR writes a small set"
        )
    require_extra("calib", *EXPORT_MODULES, *CALIB_MODULES)
    from omniport.calib import calibrate

    with progress_bar(quiet or json) as progress:
        report = calibrate(
            checkpoint,
            data,
            out,
            samples=samples,
            seed=seed,
            max_codes=max(1, round(max_speech * 50)),
            progress=progress,
        )
    facts = _facts(report)
    if json:
        print_json(facts)
        return
    rows = [(name, f["sites"], f["weights"], f"{f['largest']:.4g}", f["at"]) for name, f in facts["graphs"].items()]
    print_table(f"Calibrated on {facts['samples']} samples", ("graph", "tensors", "weights", "largest", "at"), rows)
    log = log_console(quiet)
    for name in report.missing:
        log.print(f"No sample reached {name}: it cannot be quantized with this file", markup=False)
    log.print(f"{report.path}: {size_text(facts['bytes'])}", markup=False)


def _write_samples(folder: Path, json: bool, quiet: bool) -> None:
    require_extra("calib", *EXPORT_MODULES)
    from omniport.calib.calibration.sample_data import write_samples

    path = write_samples(folder)
    total = sum(file.stat().st_size for file in folder.iterdir())
    if json:
        print_json({"path": str(path), "samples": path.read_bytes().count(b"\n"), "bytes": total})
        return
    print_line(path)
    log_console(quiet).print(f"{size_text(total)}. Next: omniport calibrate CHECKPOINT --data {path} OUT.calib")


def _facts(report: CalibrateReport) -> dict[str, Any]:
    """What ``--json`` prints."""
    header = report.calibration.header
    graphs = {}
    for name, sites in report.calibration.graphs.items():
        top = max(sites, key=lambda site: site.record.clips["max"])
        graphs[name] = {
            "sites": len(sites),
            "weights": sum(len(site.record.weights) for site in sites if not site.record.output),
            "largest": top.record.clips["max"],
            "at": top.name,
        }
    return {
        "path": str(report.path),
        "bytes": report.path.stat().st_size,
        "fingerprint": header.fingerprint,
        "samples": header.samples,
        "seed": header.seed,
        "resumed": report.resumed,
        "missing": list(report.missing),
        "graphs": graphs,
    }
