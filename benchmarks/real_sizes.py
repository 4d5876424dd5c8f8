"""Measure the published models' sizes: making, copying, exporting, quantizing, and answering a spoken question.

    python -m benchmarks.real_sizes make 3b FOLDER
    python -m benchmarks.real_sizes hollow 7b FOLDER     # instead of make, where the disk is too small
    python -m benchmarks.real_sizes trace 3b FOLDER [--precision bf16] [--graphs thinker]
    python -m benchmarks.real_sizes export 3b FOLDER [--precision bf16] [--graphs thinker] [--rounds 3]
    python -m benchmarks.real_sizes let-go 3b FOLDER [--rounds 3]
    python -m benchmarks.real_sizes quantize 3b FOLDER [--recipe int4] [--graph-recipe GRAPH=RECIPE]
    python -m benchmarks.real_sizes run 3b FOLDER [--recipe int4] [--solver fast]
    python -m benchmarks.real_sizes --page

FOLDER takes the checkpoint, ``3b``, and the bundles, ``3b-bf16`` and ``3b-int4``: 12 to 45 GB. Every step runs in a
process of its own and adds its figures to docs/results/real-sizes.json, of which real-sizes.md is made. Before a step
its input is dropped from the page cache, and after it what was written is flushed to the disk: both count as
``synced_seconds``, so that neither a copy nor an export gains from what the memory happens to hold.

An export comes after a copy of the checkpoint, in turns if there are several rounds: a disk that others use as well
can be twice as fast a minute later. ``let-go`` is a copy that leaves nothing in the page cache, after one as usual.

Memory is resident memory as the kernel counts it: the high-water mark of the process, and after loading the anonymous
part, which cannot be dropped and read again, apart from the mapped files.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from omniport.runtime.system.host import peak_memory, resident_memory

from benchmarks.harness import StageMeter, command_line, own_process, record
from benchmarks.real_sizes_page import FIELDS, FIGURES, SIZES, page

BLOCK = 8 << 20
QUESTION_SECONDS = 3.0


def _make(options: argparse.Namespace) -> dict[str, Any]:
    from omniport.export.synthetic.make_checkpoint import make_checkpoint

    return {"path": make_checkpoint(_checkpoint(options), options.size)}


def _hollow(options: argparse.Namespace) -> dict[str, Any]:
    """A checkpoint whose weights are holes in its files, which read as zeros and take no space on the disk.

    For a disk that cannot hold checkpoint and bundle at once: copies and exports read it and write in full.
    """
    from unittest import mock

    from omniport.export.synthetic import make_checkpoint as synthetic
    from omniport.export.synthetic import random_weights as synthetic_weights

    with (
        mock.patch.object(synthetic_weights, "tensor_blocks", return_value=()),
        mock.patch.object(synthetic, "check_space"),
    ):
        path = synthetic.make_checkpoint(_checkpoint(options), options.size)
    for shard in path.glob("*.safetensors"):
        content = shard.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        header.pop("__metadata__", None)
        os.truncate(shard, len(content) + max(entry["data_offsets"][1] for entry in header.values()))
    return {"path": path}


def _copy(options: argparse.Namespace, let_go: bool = False) -> dict[str, Any]:
    """A plain copy of the checkpoint's files, block by block, as any program would make it.

    Each copy is flushed and, off the clock, removed before the next one: the disk need not hold all of it twice.

    Args:
        let_go: tell the system that what was read and written is not used again, as an export does.
    """
    from omniport.runtime.system.page_cache import WriteBehind, forget

    target = options.folder / f"{options.size}-copy"
    seconds, total = 0.0, 0
    for file in _files(_checkpoint(options)):
        started = time.perf_counter()
        with open(file, "rb", buffering=0) as source, open(target, "wb", buffering=0) as out:
            done, behind = 0, WriteBehind(out.fileno())
            while block := source.read(BLOCK):
                out.write(block)
                if let_go:
                    forget(source.fileno(), done, len(block))
                    done += len(block)
                    behind.wrote(done)
            os.fsync(out.fileno())
        seconds += time.perf_counter() - started
        total += target.stat().st_size
        target.unlink()
    return {"synced_seconds": round(seconds, 1), "bytes": total}


def _trace(options: argparse.Namespace) -> dict[str, Any]:
    """Trace graphs that are not in the cache, which then holds them; no checkpoint is needed."""
    from omniport.export.checkpoint.config import normalise_config
    from omniport.export.graphs.trace import trace
    from omniport.export.models.model_parts import graph_definitions
    from omniport.export.synthetic.geometries import SIZES as KNOWN
    from omniport.export.synthetic.geometries import checkpoint_config
    from omniport.export.synthetic.tokenizer_files import train_tokenizer
    from omniport.runtime.speech.ode import rk4_schedule
    from transformers import AutoConfig

    size = KNOWN[options.size]
    raw = checkpoint_config(size, train_tokenizer(size.regular_tokens, size.real_ids))
    config = AutoConfig.for_model(**normalise_config(raw))
    definitions = graph_definitions(config, options.precision, 8192, rk4_schedule(), False)
    traced = {}
    for name in options.graphs.split(",") if options.graphs else definitions:
        started = time.perf_counter()
        trace(definitions[name])
        traced[name] = round(time.perf_counter() - started, 1)
    return {"traced": traced}


def _export(options: argparse.Namespace) -> dict[str, Any]:
    from omniport.export.exporter import export_checkpoint

    meter = StageMeter()
    out = options.folder / f"{options.size}-{options.precision}"
    graphs = options.graphs.split(",") if options.graphs else None
    report = export_checkpoint(
        _checkpoint(options), out, precision=options.precision, graphs=graphs, progress=meter.progress
    )
    meter.stop()
    return {
        "path": out,
        "precision": options.precision,
        "stages": {stage: round(seconds, 2) for stage, seconds in meter.seconds.items()},
        "peak_bytes": max(meter.peaks.values()),
        "weight_bytes": {graph.name: graph.weight_bytes for graph in report.graphs},
    }


def _quantize(options: argparse.Namespace) -> dict[str, Any]:
    from omniport.calib.quantizer import quantize

    source = options.folder / f"{options.size}-{options.precision}"
    out = options.folder / f"{options.size}-{options.recipe}"
    chosen = dict(text.split("=") for text in options.graph_recipe)
    report = quantize(source, out, options.recipe, graph_recipes=chosen)
    return {
        "path": out,
        "precision": options.precision,
        "recipe": options.recipe,
        "graph_recipes": chosen,
        "weight_bytes": {graph.name: graph.bytes_after for graph in report.graphs},
    }


def _run(options: argparse.Namespace) -> dict[str, Any]:
    """Open the bundle, load every graph, and answer a spoken question in speech."""
    import numpy as np
    from omniport.runtime.bundle.manifest import SamplingConfig
    from omniport.runtime.session import OmniSession

    memory = {"start": _memory()}
    started = time.perf_counter()
    session = OmniSession.open(options.folder / f"{options.size}-{options.recipe}", backend="ort-cpu", max_context=2048)
    loading = {}
    for name in session.bundle.manifest.graphs:
        begun = time.perf_counter()
        session.backend.graph(name)
        loading[name] = round(time.perf_counter() - begun, 1)
        memory[name] = _memory()
    loaded = time.perf_counter() - started
    draw = np.random.default_rng(0)
    voice = (0.1 * draw.standard_normal(int(16000 * QUESTION_SECONDS))).astype(np.float32)
    done, samples = None, 0
    limits = {"max_new_tokens": options.tokens}
    for event in session.reply(
        [{"role": "user", "content": [{"type": "audio", "audio": (voice, 16000)}]}],
        thinker=SamplingConfig(**limits),
        talker=SamplingConfig(max_new_tokens=options.codes),
        solver=options.solver,
    ):
        samples += len(getattr(event, "samples", ()))
        done = event
    memory["answered"] = _memory()
    stats = done.stats  # type: ignore[union-attr]
    return {
        "recipe": options.recipe,
        "solver": options.solver,
        "load_seconds": round(loaded, 1),
        "loading": loading,
        "memory": memory,
        "question_seconds": QUESTION_SECONDS,
        "samples": samples,
        "stats": {key: value for key, value in vars(stats).items() if key in (*FIGURES, "busy")},
    }


def _checkpoint(options: argparse.Namespace) -> Path:
    return Path(options.folder) / str(options.size)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _drop(files: Iterable[Path]) -> None:
    """Let the kernel forget what it holds of these files."""
    for file in files:
        with open(file, "rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _flush(files: Iterable[Path]) -> None:
    for file in files:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


def _memory() -> dict[str, int | None]:
    return {field: resident_memory(field) for field in FIELDS}


_STEPS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "make": _make,
    "hollow": _hollow,
    "copy": _copy,
    "let-go": lambda options: _copy(options, let_go=True),
    "trace": _trace,
    "export": _export,
    "quantize": _quantize,
    "run": _run,
}


def done(step: str, given: dict[str, Any]) -> dict[str, Any]:
    """The figures of one step, taken in this process."""
    options = argparse.Namespace(**given | {"step": step, "folder": Path(given["folder"])})
    folder = _checkpoint(options)
    if options.step == "quantize":
        folder = options.folder / f"{options.size}-{options.precision}"
    elif options.step == "run":
        folder = options.folder / f"{options.size}-{options.recipe}"
    if folder.exists():
        _drop(_files(folder))
    started = time.perf_counter()
    found = _STEPS[options.step](options)
    found["seconds"] = round(time.perf_counter() - started, 1)
    out = found.pop("path", None)
    if out is not None:
        _flush(_files(out))
        found["synced_seconds"] = round(time.perf_counter() - started, 1)
        found["bytes"] = sum(file.stat().st_size for file in _files(out))
    used = resource.getrusage(resource.RUSAGE_SELF)
    found["cpu_seconds"] = round(used.ru_utime + used.ru_stime, 1)
    found.setdefault("peak_bytes", peak_memory())
    return found


def measure(options: argparse.Namespace, results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One step beside those that were measured before."""
    steps = ("copy", options.step) if options.step in ("export", "let-go") else (options.step,)
    found: dict[str, list[dict[str, Any]]] = {step: [] for step in steps}
    for _ in range(options.rounds):
        for step in steps:
            found[step].append(_in_process(step, options))
    results["machine"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    for step, rounds in found.items():
        middle = sorted(rounds, key=lambda one: float(one.get("synced_seconds", one["seconds"])))[len(rounds) // 2]
        if len(rounds) > 1:
            middle["rounds"] = [one["synced_seconds"] for one in rounds]
            middle["peak_bytes"] = max(one["peak_bytes"] for one in rounds)
        results.setdefault(options.size, {})[_key(step, options)] = middle
    yield results


def _in_process(step: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one step in a process of its own. An export finds nothing of an earlier one, whose graphs it would keep."""
    if step == "export":
        shutil.rmtree(options.folder / f"{options.size}-{options.precision}", ignore_errors=True)
    found: dict[str, Any] = own_process(done, step, {**vars(options), "folder": str(options.folder)})
    print(json.dumps(found, indent=1), flush=True)
    return found


def _key(step: str, options: argparse.Namespace) -> str:
    """Where a step's figures stand; those of a copy beside an export are of the same minutes."""
    if step in ("make", "hollow", "let-go") or options.step == "copy":
        return step
    return f"{step} {_variant(options)}"


def _variant(options: argparse.Namespace) -> str:
    if options.step == "let-go":
        return "let-go"
    if options.step in ("export", "trace", "copy"):
        return f"{options.precision} {options.graphs}".strip()
    if options.step == "run" and options.solver != "rk4":
        return f"{options.recipe} {options.solver}"
    return str(options.recipe)


def main() -> None:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("step", choices=_STEPS)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", default="bf16", help="of the bundle that is exported or quantized")
    parser.add_argument("--graphs", default="", help="export these only, where the disk cannot hold all of them")
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--graph-recipe", action="append", default=[], metavar="GRAPH=RECIPE")
    parser.add_argument("--rounds", type=int, default=1, help="of an export, each after a copy: medians, and all times")
    parser.add_argument("--tokens", type=int, default=12, help="most text tokens of the reply")
    parser.add_argument("--solver", default="rk4", help="of the reply")
    parser.add_argument("--codes", type=int, default=50, help="most codec tokens of the reply")
    record("real-sizes", page, measure, parser)


if __name__ == "__main__":
    main()
