"""Build every graph of a checkpoint in several precisions for several GPUs, and write down what came of it.

    python scripts/build_matrix.py CHECKPOINT [--work FOLDER] [--precisions fp16,bf16,fp32] [--out docs/results]

Needs no GPU: nothing is run. Each engine is built in a process of its own and thrown away. Exported bundles are made in
``--work`` (a temporary folder by default) and reused if they are there. Writes build-matrix.json and build-matrix.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["NATIVE", "TARGETS", "main", "render"]

ROOT = Path(__file__).resolve().parent.parent
PRECISIONS = ("fp16", "bf16", "fp32")
#: one card per compute capability
TARGETS = ("rtx-3090", "rtx-4090", "rtx-5090")
#: layer types that have to be the builder's own, by the name they are shown under
NATIVE = {"KV_CACHE_UPDATE": "cache", "ATTENTION_INPUT": "attention", "ROTARY_EMBEDDING": "rotary"}
Row = dict[str, Any]


def build_all(checkpoint: Path, work: Path, precisions: Sequence[str]) -> list[Row]:
    """Export and build; one row an engine."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from measure_build_memory import measure

    rows = []
    for precision in precisions:
        bundle = work / precision
        if not (bundle / "bundle.json").exists():
            command = [sys.executable, "-c", "from omniport.cli.main import run; run()"]
            subprocess.run([*command, "export", str(checkpoint), str(bundle), "--precision", precision], check=True)
        for target in TARGETS:
            for graph in json.loads((bundle / "bundle.json").read_text())["graphs"]:
                print(f"{precision} {target} {graph}", file=sys.stderr, flush=True)
                rows.append(measure(bundle, graph, target))
    return rows


def fp8_rows() -> list[Row]:
    """FP8 where it is and where it is not, on a graph of one quantized matrix product (tests/graphs.py)."""
    sys.path.insert(0, str(ROOT / "tests"))
    import onnx
    from graphs import fp8_model
    from omniport.export.engine import build_engine
    from omniport.export.targets import find_target
    from omniport.export.trt_api import load_api
    from omniport.runtime.errors import BuildError

    model, spec = fp8_model()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fp8.onnx"
        onnx.save(model, path)
        for target in TARGETS:
            row: Row = {"target": target, "built": True, "message": None}
            try:
                build_engine(load_api("tensorrt-rtx"), path, spec, find_target(target), Path(folder) / "fp8.engine")
            except BuildError as error:
                row |= {"built": False, "message": str(error)}
            rows.append(row)
    return rows


def render(document: dict[str, Any]) -> str:
    """The page."""
    rows: list[Row] = document["engines"]
    over = [row["engine_bytes"] - row["weights_bytes"] for row in rows]
    ratios = [row["engine_bytes"] / row["weights_bytes"] for row in rows]
    lines = [
        "# Engines of real-width graphs",
        "",
        "Made by `make build-matrix` (`scripts/build_matrix.py`): do not edit by hand. The graphs of `make-checkpoint",
        "--size small` (the 3B's layer widths, four layers a stack), built without a GPU: *built, not run*.",
        "",
        f"{document['builder']}, on {document['machine']}.",
        "",
        f"{len(rows)} engines. The one furthest from its weights is {max(ratios):.3f} times them, and none is more",
        f"than its weights and {max(over) / 1e6:.1f} MB.",
        "Peak memory is resident memory of the building process above what it held before parsing, over the weights;",
        "*anonymous* is the part that the kernel cannot drop and read again. Layers are those of the parsed network.",
        "",
        "| precision | GPU | graph | weights MB | engine MB | over weights MB | seconds | peak / weights | anonymous "
        "| cache | attention | rotary |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        weights, engine = row["weights_bytes"], row["engine_bytes"]
        native = " | ".join(str(row["layers"].get(kind, 0)) for kind in NATIVE)
        lines.append(
            f"| {row['precision']} | {row['sm']} | {row['graph']} | {weights / 1e6:.1f} | {engine / 1e6:.1f} "
            f"| {(engine - weights) / 1e6:.1f} | {row['seconds']} | {row['peak_bytes'] / weights:.2f} "
            f"| {row['anonymous_bytes'] / weights:.2f} | {native} |"
        )
    lines += ["", "FP8, one matrix product with Q/DQ on both sides:", "", "| GPU | built | message |", "|---|---|---|"]
    lines += [f"| {r['sm']} | {'yes' if r['built'] else 'no'} | {r['message'] or ''} |" for r in document["fp8"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Build every graph of a checkpoint for several GPUs.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, help="folder for the exported bundles; kept")
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    options = parser.parse_args()
    from omniport.export.build import builder_version
    from omniport.export.targets import find_target

    with tempfile.TemporaryDirectory() as scratch:
        rows = build_all(options.checkpoint, options.work or Path(scratch), options.precisions.split(","))
    document = {
        "builder": f"tensorrt-rtx {builder_version('tensorrt-rtx')}",
        "machine": f"{platform.system()} {platform.machine()}, {_cpu()}",
        "engines": [{**row, "sm": find_target(row["target"]).sm} for row in rows],
        "fp8": [{**row, "sm": find_target(row["target"]).sm} for row in fp8_rows()],
    }
    (options.out / "build-matrix.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (options.out / "build-matrix.md").write_text(render(document), encoding="utf-8")


def _cpu() -> str:
    from omniport.cli.doctor import examine

    facts = examine()
    return f"{facts['cpu_cores']} cores ({facts['cpu']})"


if __name__ == "__main__":
    main()
