"""Quantize to a target, and write down what was kept: docs/results/search.json and search.md.

    python -m benchmarks.search BUNDLE --recipe int8 --target-sqnr 30 [--calib FILE] [--name NAME]
    python -m benchmarks.search --page

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
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS


def measure(bundle: Path, recipe: str, sqnr: float, calibration: Path | None) -> dict[str, Any]:
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
    kept, reached = row["kept"], row["reached"]
    parts = ", ".join(f"`{part}`" for part in kept) or "nothing"
    head = f"**{name}**: of {len(row['damages'])} parts {len(kept)} kept ({parts}), {_loss(reached)} reached."
    lines = [head, "", "| parts kept | logits, dB | KL, nats | same choice |", "|---|---|---|---|"]
    for point in sorted(row["curve"], key=lambda point: point["kept"]):
        lines.append(f"| {point['kept']} | {point['sqnr_db']:.1f} | {point['kl']:.1e} | {point['agreement']:.0%} |")
    lines += ["", "| part quantized alone | logits, dB | KL, nats |", "|---|---|---|"]
    lines += [f"| {d['part']} | {d['sqnr_db']:.1f} | {d['kl']:.1e} |" for d in row["damages"]]
    return lines


def _loss(loss: dict[str, Any]) -> str:
    return f"{loss['sqnr_db']:.1f} dB"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Quantize to a target and write down what was kept.")
    parser.add_argument("bundle", nargs="?", type=Path)
    parser.add_argument("--recipe", default="int8")
    parser.add_argument("--target-sqnr", type=float, default=30.0)
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--name", default="", help="what the page calls the checkpoint; the bundle's folder otherwise")
    parser.add_argument("--page", action="store_true", help="only write the page from search.json")
    options = parser.parse_args()
    place = RESULTS / "search.json"
    results: dict[str, Any] = json.loads(place.read_text()) if place.exists() else {}
    if not options.page:
        if options.bundle is None:
            parser.error("give BUNDLE, or --page")
        name = f"{options.name or options.bundle.name}, {options.recipe}, {options.target_sqnr:g} dB"
        results[name] = measure(options.bundle, options.recipe, options.target_sqnr, options.calib)
        place.write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "search.md").write_text(page(results))


if __name__ == "__main__":
    main()
