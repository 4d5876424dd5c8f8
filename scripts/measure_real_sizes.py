"""Measure the published models' sizes: making, copying, exporting, quantizing, and answering a spoken question.

    python scripts/measure_real_sizes.py make 3b FOLDER
    python scripts/measure_real_sizes.py copy 3b FOLDER
    python scripts/measure_real_sizes.py export 3b FOLDER [--precision bf16] [--graphs thinker]
    python scripts/measure_real_sizes.py quantize 3b FOLDER [--recipe int4] [--graph-recipe GRAPH=RECIPE]
    python scripts/measure_real_sizes.py run 3b FOLDER [--recipe int4]
    python scripts/measure_real_sizes.py page

FOLDER takes the checkpoint, ``3b``, and the bundles, ``3b-bf16`` and ``3b-int4``: 12 to 45 GB. Every step runs in a
process of its own and adds its figures to docs/results/real-sizes.json; ``page`` writes real-sizes.md from it. Before a
step its input is dropped from the page cache, and after it what was written is flushed to the disk: both count as
``synced_seconds``, so that neither a copy nor an export gains from what the memory happens to hold.

Memory is resident memory as the kernel counts it: the high-water mark of the process, and after loading the anonymous
part, which cannot be dropped and read again, apart from the mapped files.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

__all__ = ["main", "page"]

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
STEPS = ("make", "copy", "export", "quantize", "run")
SIZES = ("small", "3b", "7b")
BLOCK = 8 << 20
FIELDS = ("VmRSS", "RssAnon", "RssFile")
QUESTION_SECONDS = 3.0
GIB = 1 << 30


def _make(options: argparse.Namespace) -> dict[str, Any]:
    from omniport.export.synthetic import make_checkpoint

    return {"path": make_checkpoint(_checkpoint(options), options.size)}


def _copy(options: argparse.Namespace) -> dict[str, Any]:
    """A plain copy of the checkpoint's files, block by block, as any program would make it.

    Each copy is flushed and, off the clock, removed before the next one: the disk need not hold all of it twice.
    """
    target = options.folder / f"{options.size}-copy"
    seconds, total = 0.0, 0
    for file in _files(_checkpoint(options)):
        started = time.perf_counter()
        with open(file, "rb", buffering=0) as source, open(target, "wb", buffering=0) as out:
            while block := source.read(BLOCK):
                out.write(block)
            os.fsync(out.fileno())
        seconds += time.perf_counter() - started
        total += target.stat().st_size
        target.unlink()
    return {"synced_seconds": round(seconds, 1), "bytes": total}


def _export(options: argparse.Namespace) -> dict[str, Any]:
    from omniport.export.exporter import export_checkpoint

    clock = _StageClock()
    out = options.folder / f"{options.size}-{options.precision}"
    graphs = options.graphs.split(",") if options.graphs else None
    report = export_checkpoint(
        _checkpoint(options), out, precision=options.precision, graphs=graphs, progress=clock.progress
    )
    return {
        "path": out,
        "precision": options.precision,
        "stages": clock.stop(),
        "weight_bytes": {graph.name: graph.weight_bytes for graph in report.graphs},
    }


def _quantize(options: argparse.Namespace) -> dict[str, Any]:
    from omniport.calib.quantize import quantize_bundle

    source = options.folder / f"{options.size}-{options.precision}"
    out = options.folder / f"{options.size}-{options.recipe}"
    chosen = dict(text.split("=") for text in options.graph_recipe)
    report = quantize_bundle(source, out, options.recipe, graph_recipes=chosen)
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
    from omniport.runtime.manifest import SamplingConfig
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
    ):
        samples += len(getattr(event, "samples", ()))
        done = event
    memory["answered"] = _memory()
    stats = done.stats  # type: ignore[union-attr]
    return {
        "recipe": options.recipe,
        "load_seconds": round(loaded, 1),
        "loading": loading,
        "memory": memory,
        "question_seconds": QUESTION_SECONDS,
        "samples": samples,
        "stats": {key: value for key, value in vars(stats).items() if key != "workers"},
    }


class _StageClock:
    """Seconds spent in each stage that a progress callback names."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._stage, self._since = "start", time.perf_counter()

    def progress(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._turn(stage)

    def stop(self) -> dict[str, float]:
        self._turn("end")
        return {stage: round(seconds, 2) for stage, seconds in self._seconds.items()}

    def _turn(self, stage: str) -> None:
        now = time.perf_counter()
        self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = stage, now


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


def _memory() -> dict[str, int]:
    from omniport.export.memory import resident

    return {field: resident(field) for field in FIELDS}


_CHILD: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "make": _make,
    "copy": _copy,
    "export": _export,
    "quantize": _quantize,
    "run": _run,
}


def _child(options: argparse.Namespace) -> None:
    sources = {"make": [], "run": []}.get(options.step)
    folder = _checkpoint(options)
    if options.step == "quantize":
        folder = options.folder / f"{options.size}-{options.precision}"
    elif options.step == "run":
        folder = options.folder / f"{options.size}-{options.recipe}"
    if sources is None or options.step == "run":
        _drop(_files(folder))
    started = time.perf_counter()
    found = _CHILD[options.step](options)
    found["seconds"] = round(time.perf_counter() - started, 1)
    out = found.pop("path", None)
    if out is not None:
        _flush(_files(out))
        found["synced_seconds"] = round(time.perf_counter() - started, 1)
        found["bytes"] = sum(file.stat().st_size for file in _files(out))
    # in kB; it also covers the process that started this one, which is small
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(found))


def _measure(options: argparse.Namespace) -> None:
    done = subprocess.run([sys.executable, __file__, "--child", *sys.argv[1:]], stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout)
    path = RESULTS / "real-sizes.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results["machine"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    key = options.step if options.step in ("make", "copy") else f"{options.step} {_variant(options)}"
    results.setdefault(options.size, {})[key] = found
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def _variant(options: argparse.Namespace) -> str:
    if options.step == "export":
        return f"{options.precision} {options.graphs}".strip()
    return str(options.recipe)


def page(results: dict[str, Any]) -> str:
    """docs/results/real-sizes.md."""
    lines = [
        "# Real sizes",
        "",
        "Made by `scripts/measure_real_sizes.py` from real-sizes.json: do not edit by hand. Random weights of the",
        f"published models' geometry. {results['machine']}, no GPU, shared with other work; ONNX Runtime on the CPU.",
        "Times include flushing what was written to the disk. Inputs are not in the page cache when a step begins.",
        "",
        "## Making and exporting",
        "",
        "Limits: 2 GiB of resident memory, and twice the time of copying the checkpoint's files, tracing apart.",
        "",
        "| size | step | written | seconds | of it tracing | times a copy | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in SIZES:
        lines += _size_lines(size, results.get(size, {}))
    lines += _stage_lines(results)
    lines += _run_lines(results)
    return "\n".join(lines) + "\n"


def _size_lines(size: str, steps: dict[str, Any]) -> list[str]:
    copied = steps.get("copy", {}).get("synced_seconds")
    lines = []
    for name, found in steps.items():
        if name.startswith("run"):
            continue
        tracing = sum(seconds for stage, seconds in found.get("stages", {}).items() if stage.startswith("tracing"))
        seconds = found["synced_seconds"]
        ratio = f"{(seconds - tracing) / copied:.2f}" if name.startswith("export") and copied else "-"
        traced = f"{tracing:.1f}" if "stages" in found else "-"
        lines.append(
            f"| {size} | {name.replace(',', ', ')} | {found['bytes'] / 1e9:.2f} GB | {seconds:.1f} | {traced} "
            f"| {ratio} | {found['peak_bytes'] / GIB:.2f} GiB |"
        )
    halves = [found for name, found in steps.items() if name.startswith("export bf16 ")]
    if len(halves) > 1 and copied:
        tracing = sum(s for half in halves for stage, s in half["stages"].items() if stage.startswith("tracing"))
        seconds = sum(half["synced_seconds"] for half in halves)
        peak = max(half["peak_bytes"] for half in halves) / GIB
        lines.append(
            f"| {size} | export bf16, both runs | | {seconds:.1f} | {tracing:.1f} | {(seconds - tracing) / copied:.2f} "
            f"| {peak:.2f} GiB |"
        )
    return lines


def _stage_lines(results: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "Where the seconds of an export go:",
        "",
        "| size | export | "
        + " | ".join(("tracing", "writing the thinker", "writing the others", "embeddings", "the rest"))
        + " |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in SIZES:
        for name, found in results.get(size, {}).items():
            if not name.startswith("export"):
                continue
            stages = found["stages"]
            tracing = sum(seconds for stage, seconds in stages.items() if stage.startswith("tracing"))
            thinker = stages.get("writing thinker", 0.0)
            others = sum(s for stage, s in stages.items() if stage.startswith("writing")) - thinker
            embeddings = stages.get("embeddings", 0.0)
            rest = sum(stages.values()) - tracing - thinker - others - embeddings
            cells = " | ".join(f"{seconds:.1f}" for seconds in (tracing, thinker, others, embeddings, rest))
            lines.append(f"| {size} | {name.removeprefix('export ').replace(',', ', ')} | {cells} |")
    return lines


def _run_lines(results: dict[str, Any]) -> list[str]:
    lines = []
    for size in SIZES:
        for name, found in results.get(size, {}).items():
            if name.startswith("run"):
                lines += _answer_lines(size, found)
    return lines


def _answer_lines(size: str, found: dict[str, Any]) -> list[str]:
    memory, stats = found["memory"], found["stats"]
    lines = [
        "",
        f"## A spoken question to the {size} in `{found['recipe']}`, on the CPU",
        "",
        f"{found['question_seconds']:.0f} s of sound, answered in {stats['text_tokens']} text tokens and",
        f"{stats['codec_tokens']} codec tokens ({found['samples'] / 24000:.2f} s of speech), with every stage.",
        f"Opening and loading all graphs took {found['load_seconds']:.0f} s.",
        "",
        "| after | resident | anonymous | mapped files | seconds to load |",
        "|---|---|---|---|---|",
    ]
    for step, sizes in memory.items():
        cells = " | ".join(f"{sizes[field] / 1e6:,.0f} MB" for field in FIELDS)
        lines.append(f"| {step} | {cells} | {found['loading'].get(step, '-')} |")
    lines += [
        "",
        f"Highest: {found['peak_bytes'] / 1e9:.2f} GB. Anonymous memory is weights that ONNX Runtime packs for its",
        "products, once; convolutions stay in the mapped file, of which the kernel holds what was touched.",
        "",
        "| figure | value |",
        "|---|---|",
    ]
    for key in ("prompt_tokens", "text_tokens", "codec_tokens", "tokens_per_second", "codes_per_second"):
        lines.append(f"| {key} | {_number(stats[key])} |")
    for key in ("time_to_first_token", "time_to_first_audio", "total_time", "real_time_factor"):
        lines.append(f"| {key} | {_number(stats[key])} |")
    lines += [f"| busy, {stage} | {_number(seconds)} |" for stage, seconds in stats["busy"].items()]
    return lines


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def main() -> None:
    """The command line."""
    child = sys.argv[1:2] == ["--child"]
    parser = argparse.ArgumentParser(description="Measure the published models' sizes.")
    parser.add_argument("step", choices=(*STEPS, "page"))
    parser.add_argument("size", nargs="?", choices=SIZES)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--precision", default="bf16", help="of the bundle that is exported or quantized")
    parser.add_argument("--graphs", default="", help="export these only, where the disk cannot hold all of them")
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--graph-recipe", action="append", default=[], metavar="GRAPH=RECIPE")
    parser.add_argument("--tokens", type=int, default=12, help="most text tokens of the reply")
    parser.add_argument("--codes", type=int, default=50, help="most codec tokens of the reply")
    options = parser.parse_args(sys.argv[2:] if child else None)
    if options.step == "page":
        found = json.loads((RESULTS / "real-sizes.json").read_text())
        (RESULTS / "real-sizes.md").write_text(page(found))
    elif options.folder is None:
        parser.error("give a size and a folder")
    elif child:
        _child(options)
    else:
        _measure(options)


if __name__ == "__main__":
    main()
