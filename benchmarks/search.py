"""Quantize to a target, and write down what was kept: docs/results/search.json and search.md.

    python -m benchmarks.search BUNDLE --recipe int8 --target-sqnr 30 [--calib FILE] [--name NAME]

Runs `omniport quantize` with its curve, in a process of its own, and throws the bundle away. Results of several calls
gather in the JSON file, under the name and what was asked.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import command_line, record, table


def quantized(bundle: Path, recipe: str, sqnr: float, calibration: Path | None) -> dict[str, Any]:
    """The curve that the command writes, and its seconds."""
    with tempfile.TemporaryDirectory(dir=bundle.absolute().parent) as scratch:
        curve = Path(scratch) / "curve.json"
        command = [sys.executable, "-c", "from omniport.cli.main import run; run()", "quantize", str(bundle)]
        command += [str(Path(scratch) / "out"), "--recipe", recipe, "--target-sqnr", str(sqnr), "--curve", str(curve)]
        command += ["--quiet"] if calibration is None else ["--quiet", "--calib", str(calibration)]
        begun = time.perf_counter()
        subprocess.run(command, check=True)
        found: dict[str, Any] = json.loads(curve.read_text())
        return found | {"recipe": recipe, "seconds": round(time.perf_counter() - begun)}


def measure(options: argparse.Namespace, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One more search."""
    name = f"{options.name or options.bundle.name}, {options.recipe}, {options.target_sqnr:g} dB"
    yield found | {name: quantized(options.bundle, options.recipe, options.target_sqnr, options.calib)}


def page(results: dict[str, Any]) -> str:
    """docs/results/search.md."""
    lines = [
        "# Quantizing to a target",
        "",
        "Made by `python -m benchmarks.search` from search.json: do not edit by hand. What the search is:",
        "[quantize-report.md](../quantize-report.md#quantizing-to-a-target). Random weights, ONNX Runtime on a CPU of",
        "two cores; losses are of the logits on recorded calls.",
    ]
    for name, found in results.items():
        lines += ["", f"## {name}", "", f"Asked: {found['target']}. {found['seconds']} s in all."]
        for decoder, row in found["decoders"].items():
            lines += ["", *_decoder(decoder, row)]
    return "\n".join(lines) + "\n"


def _decoder(name: str, row: dict[str, Any]) -> list[str]:
    kept = row["kept"]
    parts = ", ".join(f"`{part}`" for part in kept) or "nothing"
    return [
        f"**{name}**: of {len(row['damages'])} parts {len(kept)} kept ({parts}), {_loss(row['reached'])} dB reached.",
        "",
        *table(
            ("parts kept", "logits, dB", "KL, nats", "same choice"),
            (
                (point["kept"], _loss(point), f"{point['kl']:.1e}", f"{point['agreement']:.0%}")
                for point in sorted(row["curve"], key=lambda point: point["kept"])
            ),
        ),
        "",
        *table(
            ("part quantized alone", "logits, dB", "KL, nats"),
            ((damage["part"], _loss(damage), f"{damage['kl']:.1e}") for damage in row["damages"]),
        ),
    ]


def _loss(loss: dict[str, Any]) -> str:
    return f"{loss['sqnr_db']:.1f}"


def main() -> None:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--recipe", default="int8")
    parser.add_argument("--target-sqnr", type=float, default=30.0)
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--name", default="", help="what the page calls the checkpoint; the bundle's folder otherwise")
    record("search", page, measure, parser)


if __name__ == "__main__":
    main()
