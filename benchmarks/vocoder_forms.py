"""Measure forms of the vocoder's graph beside transformers; writes docs/results/vocoder-forms.md.

    python -m benchmarks.vocoder_forms CHECKPOINT NAME=BUNDLE ... [--frames 24,116,250] [--threads 1,2] [--rounds 7]
        [--backend openvino] [--title small]

A form is a bundle of the same checkpoint, made by the commit that has the form. All take turns in one process. Seconds
are those of the clock and those of the processor, the least of all rounds: other programs disturb the latter little.
Errors are against transformers' samples.
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
from omniport.export.evaluation.speech_metrics import snr_db
from omniport.export.models.speakers import load_speakers, spoken_mel
from omniport.runtime.backends import open_backend
from omniport.runtime.backends.base import Graph
from omniport.runtime.backends.onnxruntime.packages import import_onnxruntime
from omniport.runtime.backends.openvino.packages import import_openvino
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.system.host import cpu_name

from benchmarks.harness import command_line, record, table

REFERENCE = "transformers"
Array = NDArray[np.float32]


def measure(options: argparse.Namespace, found: Any) -> Iterator[dict[str, Any]]:
    """Everything that the page shows, after each number of frames; what was measured of others is kept."""
    reference = load_reference(Checkpoint.open(options.checkpoint), "bigvgan").eval()
    _, speaker = min(load_speakers(options.checkpoint / "spk_dict.pt").items())
    title, threads_rows = options.title or options.checkpoint.name, dict[str, Any]()
    checkpoints = found.get("checkpoints", {})
    version = (
        import_onnxruntime().__version__
        if options.backend == "ort-cpu"
        else import_openvino().__version__.split("-")[0]
    )
    result = {
        "versions": {**found.get("versions", {}), options.backend: version, REFERENCE: torch.__version__},
        "processor": cpu_name(),
        "rounds": options.rounds,
        "checkpoints": {**checkpoints, title: {**checkpoints.get(title, {}), options.backend: threads_rows}},
    }
    for threads in map(int, options.threads.split(",")):
        runs = {REFERENCE: _reference(reference, threads), **_runs(options, threads)}
        threads_rows[str(threads)] = rows = {}
        for frames in map(int, options.frames.split(",")):
            rows[str(frames)] = _turns(runs, np.ascontiguousarray(spoken_mel(speaker, frames).T[None]), options.rounds)
            yield result


def _reference(module: Any, threads: int) -> Callable[[Array], Array]:
    def run(mel: Array) -> Array:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            return np.asarray(module(torch.from_numpy(mel))).reshape(-1)

    return run


def _runs(options: argparse.Namespace, threads: int) -> dict[str, Callable[[Array], Array]]:
    graphs = {
        name: open_backend(options.backend, Bundle.open(root), threads=threads).graph("bigvgan")
        for name, root in options.forms
    }

    def run(graph: Graph, mel: Array) -> Array:
        return graph.run({"mel": mel})["wav"].reshape(-1)

    return {name: partial(run, graph) for name, graph in graphs.items()}


def _turns(runs: dict[str, Callable[[Array], Array]], mel: Array, rounds: int) -> dict[str, Any]:
    """Form -> its least seconds of both kinds, its largest error, and its error in dB."""
    rows: dict[str, Any] = {name: {"seconds": float("inf"), "processor": float("inf")} for name in runs}
    wanted = runs[REFERENCE](mel)
    for _ in range(rounds):
        for name, run in runs.items():
            clock, processor = time.perf_counter(), time.process_time()
            got = run(mel)
            row, took = rows[name], (time.perf_counter() - clock, time.process_time() - processor)
            row["seconds"], row["processor"] = min(row["seconds"], took[0]), min(row["processor"], took[1])
            if name != REFERENCE:
                row["error"], row["snr"] = float(np.abs(got - wanted).max()), snr_db(got, wanted)
    return rows


def page(found: dict[str, Any]) -> str:
    """docs/results/vocoder-forms.md."""
    versions = found["versions"]
    about = (
        f"PyTorch {versions[REFERENCE]} and the backends of the tables on {found['processor']}, in turns in one "
        f"process: the least milliseconds of {found['rounds']} rounds, by the clock and of the processor. Times as "
        "fast: as transformers, by the clock. Error: the largest difference to transformers' samples, and the whole "
        "one in dB. The machine was shared with other work."
    )
    lines = [
        "# Forms of the vocoder",
        "",
        "Made by `python -m benchmarks.vocoder_forms` from vocoder-forms.json: do not edit by hand.",
        "",
        *textwrap.wrap(about, 118),
    ]
    head = ("frames", "form", "ms", "processor ms", "times as fast", "error", "dB")
    for title, backends in found["checkpoints"].items():
        for backend, threads in ((backend, count) for backend, counts in backends.items() for count in counts):
            rows = [row for frames, forms in backends[backend][threads].items() for row in _rows(frames, forms)]
            what = "1 thread" if threads == "1" else f"{threads} threads"
            lines += ["", f"`{title}`, {backend} {versions[backend]}, {what}:", "", *table(head, rows)]
    return "\n".join(lines) + "\n"


def _rows(frames: str, forms: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    base = forms[REFERENCE]["seconds"]
    for name, row in forms.items():
        times = (f"{1e3 * row['seconds']:,.0f}", f"{1e3 * row['processor']:,.0f}", f"{base / row['seconds']:.2f}")
        errors = ("-", "-") if name == REFERENCE else (f"{row['error']:.0e}", f"{row['snr']:.1f}")
        yield frames, name, *times, *errors


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
    parser.add_argument("--frames", default="24,116,250")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--backend", default="ort-cpu", choices=("ort-cpu", "openvino"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--title", default="", help="of the checkpoint, for the page")
    record("vocoder-forms", page, measure, parser)


if __name__ == "__main__":
    main()
