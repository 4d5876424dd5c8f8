"""Measure forms of the vocoder's graph beside transformers; writes docs/results/vocoder-forms.md.

    python -m benchmarks.vocoder_forms CHECKPOINT NAME=BUNDLE ... [--frames 24,116] [--rounds 7] [--title small]

A form is a bundle of the same checkpoint, made by the commit that has the form. All take turns in one process, on one
thread and in seconds of the processor, which other programs disturb little. Errors are the largest difference to
transformers' samples.
"""

from __future__ import annotations

import argparse
import textwrap
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omniport.export.checkpoint.checkpoint import Checkpoint
from omniport.export.evaluation.reference_modules import load_reference
from omniport.export.models.signals import log_mel_like
from omniport.runtime.backends.base import Graph
from omniport.runtime.backends.onnxruntime.backend import OrtBackend
from omniport.runtime.backends.onnxruntime.packages import import_onnxruntime
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.system.host import cpu_name

from benchmarks.harness import command_line, record, table

REFERENCE = "transformers"
Array = NDArray[np.float32]


def measure(options: argparse.Namespace, found: Any) -> Iterator[dict[str, Any]]:
    """Everything that the page shows, after each number of frames; what was measured of others is kept."""
    checkpoint = Checkpoint.open(options.checkpoint)
    runs = {REFERENCE: _reference(load_reference(checkpoint, "bigvgan").eval()), **_runs(dict(options.forms))}
    title = options.title or options.checkpoint.name
    rows = dict(found.get("checkpoints", {}).get(title, {}))
    result = {
        "versions": [import_onnxruntime().__version__, torch.__version__],
        "processor": cpu_name(),
        "rounds": options.rounds,
        "checkpoints": {**found.get("checkpoints", {}), title: rows},
    }
    for frames in map(int, options.frames.split(",")):
        rows[str(frames)] = _turns(runs, log_mel_like(frames), options.rounds)
        yield result


def _reference(module: Any) -> Callable[[Array], Array]:
    def run(mel: Array) -> Array:
        torch.set_num_threads(1)
        with torch.inference_mode():
            return np.asarray(module(torch.from_numpy(mel))).reshape(-1)

    return run


def _runs(forms: dict[str, Path]) -> dict[str, Callable[[Array], Array]]:
    graphs = {name: OrtBackend(Bundle.open(root), threads=1).graph("bigvgan") for name, root in forms.items()}

    def run(graph: Graph, mel: Array) -> Array:
        return graph.run({"mel": mel})["wav"].reshape(-1)

    return {name: partial(run, graph) for name, graph in graphs.items()}


def _turns(runs: dict[str, Callable[[Array], Array]], mel: Array, rounds: int) -> dict[str, Any]:
    """Form -> its least seconds, and its largest error."""
    rows: dict[str, Any] = {name: {"seconds": float("inf")} for name in runs}
    wanted = runs[REFERENCE](mel)
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.process_time()
            got = run(mel)
            rows[name]["seconds"] = min(rows[name]["seconds"], time.process_time() - began)
            rows[name]["error"] = float(np.abs(got - wanted).max())
    return rows


def page(found: dict[str, Any]) -> str:
    """docs/results/vocoder-forms.md."""
    ours, torchs = found["versions"]
    about = (
        f"ONNX Runtime {ours} and PyTorch {torchs} on one thread of {found['processor']}, in turns in one process: the "
        f"least milliseconds of the processor of {found['rounds']} rounds. Error: the largest difference to "
        "transformers' samples."
    )
    rows = []
    for title, sizes in found["checkpoints"].items():
        for frames, forms in sizes.items():
            base = forms[REFERENCE]["seconds"]
            for name, row in forms.items():
                error = f"{row['error']:.0e}" if name != REFERENCE else "-"
                rows.append(
                    (title, frames, name, f"{1e3 * row['seconds']:,.0f}", f"{base / row['seconds']:.2f}", error)
                )
    lines = [
        "# Forms of the vocoder",
        "",
        "Made by `python -m benchmarks.vocoder_forms` from vocoder-forms.json: do not edit by hand.",
        "",
        *textwrap.wrap(about, 118),
        "",
        *table(("checkpoint", "frames", "form", "ms", "times as fast", "error"), rows),
    ]
    return "\n".join(lines) + "\n"


def _named(text: str) -> tuple[str, Path]:
    name, equals, root = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError("NAME=BUNDLE was expected")
    return name, Path(root)


def main() -> None:
    """Parse the command line, and measure."""
    parser = command_line(__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("forms", nargs="+", type=_named, metavar="NAME=BUNDLE")
    parser.add_argument("--frames", default="24,116")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--title", default="", help="of the checkpoint, for the page")
    record("vocoder-forms", page, measure, parser)


if __name__ == "__main__":
    main()
