"""Measure graphs of a bundle in OpenVINO beside ONNX Runtime, in float32 and bfloat16; writes docs/results/openvino.md.

    python -m benchmarks.openvino BUNDLE [--graphs dit,audio_encoder,talker,bigvgan] [--rounds 7] [--name small]

All take turns in one process, one graph at a time; times are the best of all rounds. Errors are the RMS of the
difference to ONNX Runtime, as a share of the RMS of what that gives. A quantized bundle's rows join those that the file
holds, under its recipe, with the medians of all rounds and without bfloat16.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from omniport.runtime.backends import open_backend
from omniport.runtime.backends.base import Array, Graph
from omniport.runtime.backends.onnxruntime.packages import import_onnxruntime
from omniport.runtime.backends.openvino.packages import import_openvino
from omniport.runtime.bundle.graph_spec import GraphSpec
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.system.host import cpu_name, physical_cores

from benchmarks.harness import command_line, record, table

#: column -> backend and what it computes in
RIVALS: dict[str, tuple[str, str | None]] = {
    "onnxruntime": ("ort-cpu", None),
    "openvino": ("openvino", None),
    "openvino, bf16": ("openvino", "bf16"),
}
#: sizes of the symbolic dimensions; a decoder makes a token behind `CONTEXT` others
SIZES = {"batch": 1, "codes": 84, "frames": 168, "chunks": 5}
CONTEXT = 512


def measure(options: argparse.Namespace, before: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Everything that the page shows, after each graph."""
    bundle = Bundle.open(options.bundle)
    quantized = before.get("quantized", {})
    if bundle.manifest.quantization is not None:
        if not before:
            raise SystemExit("measure the bundle that this one was made from first")
        rows: dict[str, Any] = {}
        result = {**before, "quantized": {**quantized, bundle.manifest.quantization.recipe: rows}}
        for name in options.graphs.split(","):
            rows[name] = _measure_graph(bundle, name, options.rounds, ("onnxruntime", "openvino"), statistics.median)
            rows[name]["rounds"] = options.rounds
            yield result
        return
    result = {
        "bundle": options.name or bundle.manifest.source.name,
        "precision": bundle.manifest.precision,
        "versions": [import_onnxruntime().__version__, import_openvino().__version__.partition("-")[0]],
        "threads": physical_cores(),
        "processor": cpu_name(),
        "rounds": options.rounds,
        "graphs": {},
        "quantized": quantized,
    }
    for name in options.graphs.split(","):
        result["graphs"][name] = _measure_graph(bundle, name, options.rounds, tuple(RIVALS), min)
        yield result


def _measure_graph(
    bundle: Bundle, name: str, rounds: int, rivals: tuple[str, ...], typical: Callable[[list[float]], float]
) -> dict[str, Any]:
    runs, rows, spent = {}, {}, {rival: list[float]() for rival in rivals}
    for rival in rivals:
        backend, compute = RIVALS[rival]
        started = time.perf_counter()
        graph = open_backend(backend, bundle, compute=compute).graph(name)
        rows[rival] = {"load": time.perf_counter() - started}
        runs[rival] = _runner(graph, bundle.manifest.graphs[name])
    wanted: Array | None = None
    for _ in range(rounds):
        for rival, run in runs.items():
            started = time.perf_counter()
            got = run()
            spent[rival].append(time.perf_counter() - started)
            rows[rival]["seconds"] = typical(spent[rival])
            wanted = got if rival == "onnxruntime" else wanted
            assert wanted is not None
            rows[rival]["error"] = float(np.sqrt(np.mean(np.square(got - wanted)) / np.mean(np.square(wanted))))
    del runs
    gc.collect()
    return rows


def _runner(graph: Graph, spec: GraphSpec) -> Callable[[], Array]:
    """Gives the first output of a run; of a decoder, of the next token's."""
    random = np.random.default_rng(0)
    if not spec.cache:
        feeds = {tensor.name: _values(tensor.dtype, _shape(tensor.shape), random) for tensor in spec.inputs}
        return lambda: next(iter(graph.run(feeds).values()))
    width = spec.input("inputs_embeds").shape[2]
    assert isinstance(width, int)
    cache, held = graph.new_cache(2 * CONTEXT), CONTEXT
    graph.run(_tokens(random, 0, CONTEXT, width), cache)

    def step() -> Array:
        nonlocal held
        held += 1
        return next(iter(graph.run(_tokens(random, held - 1, 1, width), cache).values()))

    return step


def _shape(sizes: tuple[int | str, ...]) -> list[int]:
    def size(dim: int | str) -> int:
        if isinstance(dim, int):
            return dim
        factor, _, name = dim.rpartition("*")
        return int(factor or 1) * SIZES[name]

    return list(map(size, sizes))


def _values(dtype: str, shape: list[int], random: np.random.Generator) -> Array:
    if dtype == "int64":
        return random.integers(0, 8, shape) if len(shape) > 1 else np.full(shape, 5)
    return random.standard_normal(shape, dtype=np.float32)


def _tokens(random: np.random.Generator, held: int, count: int, width: int) -> Mapping[str, Array]:
    return {
        "inputs_embeds": random.standard_normal((1, count, width), dtype=np.float32),
        "position_ids": np.broadcast_to(np.arange(held, held + count), (3, 1, count)).copy(),
        "kv_positions": np.arange(held + count),
        "write_index": np.asarray([held]),
    }


def page(found: dict[str, Any]) -> str:
    """docs/results/openvino.md."""
    ours, theirs = found["versions"]
    about = (
        f"Random-weight checkpoint `{found['bundle']}` in {found['precision']}, ONNX Runtime {ours} and OpenVINO "
        f"{theirs} on {found['threads']} threads of {found['processor']}, idle. "
        f"In turns in one process; the best of {found['rounds']} rounds. DiT of {SIZES['codes']} codes, "
        f"vocoder of {SIZES['frames']} frames, audio of {2 * SIZES['chunks']} s, a decoder's token behind {CONTEXT} "
        "others. *Load*: the first time, with nothing kept."
    )
    rows = []
    for name, rivals in found["graphs"].items():
        base = rivals["onnxruntime"]["seconds"]
        for rival, row in rivals.items():
            times = (f"{1e3 * row['seconds']:,.1f}", f"{base / row['seconds']:.2f}")
            rows.append((name, rival, *times, f"{row['error']:.0e}", f"{row['load']:.1f}"))
    lines = [
        "# OpenVINO beside ONNX Runtime",
        "",
        "Made by `python -m benchmarks.openvino` from openvino.json: do not edit by hand.",
        "",
        *textwrap.wrap(about, 118),
        "",
        *table(("graph", "backend", "ms", "times as fast", "error", "load, s"), rows),
        *_quantized(found.get("quantized", {})),
    ]
    return "\n".join(lines) + "\n"


def _quantized(recipes: dict[str, Any]) -> list[str]:
    if not recipes:
        return []
    rows = []
    for recipe, graphs in recipes.items():
        for name, row in graphs.items():
            ours, theirs = row["onnxruntime"], row["openvino"]
            spent = (f"{1e3 * ours['seconds']:,.1f}", f"{1e3 * theirs['seconds']:,.1f}")
            ratio = f"{ours['seconds'] / theirs['seconds']:.2f}"
            loaded = (f"{ours['load']:.1f}", f"{theirs['load']:.1f}")
            rows.append((recipe, name, *spent, ratio, f"{theirs['error']:.0e}", *loaded, row["rounds"]))
    about = (
        "The same work over quantized bundles of the same checkpoint: the median of all rounds, in turns. OpenVINO "
        "runs every integer format; FP8 it leaves to ONNX Runtime. It computes weights that are stored as integers as "
        "what they stand for, where ONNX Runtime also rounds the other factor of those in blocks: hence the errors. "
        "While `w8` and `int4` were measured, other work took most of the processor, and a second run gave some "
        "ratios that differ by up to three times."
    )
    names = ("ONNX Runtime", "OpenVINO")
    times, loads = ([f"{name}, {unit}" for name in names] for unit in ("ms", "load, s"))
    head = ("recipe", "graph", *times, "times as fast", "error", *loads, "rounds")
    return ["", "## Quantized bundles", "", *textwrap.wrap(about, 118), "", *table(head, rows)]


def main() -> None:
    """Parse the command line, and measure."""
    parser = command_line(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--graphs", default="dit,audio_encoder,talker,bigvgan")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--name", default="", help="of the checkpoint, for the page")
    record("openvino", page, measure, parser)


if __name__ == "__main__":
    main()
