"""Measure the peak memory of an export above the import of torch, and print it as JSON.

    python -m benchmarks.export_memory CHECKPOINT [--graphs thinker,talker] [--precision fp16] [--out FOLDER]
    python -m benchmarks.export_memory --size small --layers 4,8 [--json docs/results/export-memory.json]

The second form makes random checkpoints that differ in the number of layers of every stack, and measures each. An
export runs in a process of its own. Memory is the resident set as Linux counts it: VmRSS, and its high-water mark
VmHWM, which, unlike ru_maxrss, does not remember the process that started this one. The bundle is thrown away unless
``--out`` is given, and cached traces are not used, because they would hide what tracing needs.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from omniport.runtime.system.host import resident_memory

from benchmarks.harness import StageMeter, command_line, own_process

if TYPE_CHECKING:
    from omniport.export.synthetic.geometries import Size

_LIBRARIES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")


def deepen(size: Size, layers: int) -> Size:
    """The same geometry with this many layers in every stack."""
    return dataclasses.replace(
        size,
        text={**size.text, "num_hidden_layers": layers},
        audio={**size.audio, "encoder_layers": layers},
        vision={**size.vision, "depth": layers},
        talker={**size.talker, "num_hidden_layers": layers},
        dit={**size.dit, "num_hidden_layers": layers},
    )


def make_deep(out: Path, size: Size) -> Path:
    """Make a random checkpoint of a geometry that has no name."""
    from omniport.export.synthetic import make_checkpoint as synthetic

    with mock.patch.object(synthetic, "SIZES", {"custom": size}):
        return synthetic.make_checkpoint(out, size="custom")


def measure(checkpoint: str, out: Path | None = None, graphs: str = "", precision: str = "fp32") -> dict[str, Any]:
    """Export in a fresh process.

    Args:
        checkpoint: folder or id.
        out: where to put the bundle; a temporary folder if None.
        graphs: comma-separated names; all if empty.

    Returns:
        bytes: ``torch`` and ``imports``, resident after importing torch, and all that export imports; ``peak``;
        ``above_torch`` and ``above_imports``; ``stages``, the peak of each stage above ``torch``; ``seconds``.
    """
    with tempfile.TemporaryDirectory() as scratch:
        place = str(out or Path(scratch) / "bundle")
        environment = {"OMNIPORT_CACHE": ""}
        result: dict[str, Any] = own_process(exported, checkpoint, place, graphs, precision, environment=environment)
    return result


def exported(checkpoint: str, out: str, graphs: str, precision: str) -> dict[str, Any]:
    """As `measure`, in this process, which has to be a fresh one."""
    import torch  # noqa: F401

    torch_bytes = resident_memory() or 0
    from omniport.export.exporter import export_checkpoint

    imports = resident_memory() or 0
    meter, names = StageMeter(), tuple(graphs.split(",")) if graphs else None
    report = export_checkpoint(checkpoint, Path(out), graphs=names, precision=precision, progress=meter.progress)
    meter.stop()
    peak = max(meter.peaks.values())
    return {
        "precision": precision,
        "weight_bytes": {graph.name: graph.weight_bytes for graph in report.graphs},
        "torch": torch_bytes,
        "imports": imports,
        "peak": peak,
        "above_torch": peak - torch_bytes,
        "above_imports": peak - imports,
        "stages": {stage: value - torch_bytes for stage, value in meter.peaks.items()},
        "seconds": round(sum(meter.seconds.values()), 1),
    }


def main() -> None:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--size", default="small", help="geometry of the checkpoints that --layers makes")
    parser.add_argument("--layers", default="", help="comma-separated layer counts")
    parser.add_argument("--out", type=Path, default=None, help="keep the bundle here")
    parser.add_argument("--graphs", default="", help="comma-separated names; all by default")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--json", type=Path, default=None, help="also write what --layers measured here")
    options = parser.parse_args()
    if bool(options.checkpoint) == bool(options.layers):
        parser.error("give a checkpoint, or --layers")
    if options.checkpoint:
        print(json.dumps(measure(options.checkpoint, options.out, options.graphs, options.precision), indent=2))
        return
    from omniport.export.synthetic.geometries import SIZES

    results = []
    for layers in map(int, options.layers.split(",")):
        with tempfile.TemporaryDirectory() as scratch:
            folder = make_deep(Path(scratch) / "checkpoint", deepen(SIZES[options.size], layers))
            found = measure(str(folder), None, options.graphs, options.precision)
            results.append({"size": options.size, "layers": layers, **found})
    print(json.dumps(results, indent=2))
    if options.json is not None:
        versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
        whole = {
            "command": f"python -m benchmarks.export_memory --size {options.size} --layers {options.layers}",
            "unit": "bytes",
            "versions": {"python": platform.python_version(), **versions},
            "results": results,
        }
        options.json.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
