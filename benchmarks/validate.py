"""Measure `omniport validate` on random weights and on Wren's trained ones, and write validate.md and validate.json.

    python -m benchmarks.validate FOLDER
    python -m benchmarks.validate FOLDER --sizes tiny --suites quick

FOLDER keeps checkpoints (``tiny``, ``small``; Wren's is this repository's), bundles (``tiny-fp16``, ...), references
and reports; what is missing is made. Each run is the command itself, in a process of its own. ``empty cache``
computes every reference, ``cached`` finds them in FOLDER.
Runs that were measured before and are not measured now stay in the JSON.

"Largest reference part": the parameters and buffers, in float32, of the largest of the six transformers modules that
validation loads (one at a time). "Peak memory": VmHWM of the whole process: interpreter, torch and mapped files too.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from omniport.calib import Calibration, calibrate, quantize
from omniport.export.checkpoint.checkpoint import Checkpoint
from omniport.export.checkpoint.config import quiet_transformers
from omniport.export.evaluation.reference_modules import reference_bytes
from omniport.export.exporter import export_checkpoint
from omniport.export.synthetic.make_checkpoint import make_checkpoint
from omniport.export.validation.summary import StageRow, stage_rows
from omniport.export.validation.types import FAIL, NOT_RUN, ValidationReport
from omniport.runtime.bundle.parts import PARTS

from benchmarks.harness import GIB, ROOT, command_line, record, table

WREN = "wren"
RECIPES = ("w8", "int8", "int4", "fp8", "edge-8gb", "edge-16gb")
SIZES, PRECISIONS, SUITES = ("tiny", "small", WREN), ("fp32", "fp16", "bf16", *RECIPES), ("quick", "full")
#: what the cache of references holds before a run. ``small`` computes each reference once: what a precision adds is in
#: its graphs, which follow the references and are never in memory with them
CACHES: dict[str, dict[str, tuple[str, ...]]] = {
    "tiny": dict.fromkeys(("fp32", "fp16", "bf16"), ("empty cache", "cached")),
    "small": {"fp32": ("empty cache",), "fp16": ("cached",), "bf16": ("cached",)},
    WREN: {"fp32": ("empty cache",), **dict.fromkeys(PRECISIONS[1:], ("cached",))},
}
_STATES = ("empty cache", "cached")
#: what the issue of validation asks for: seconds of the quick suite on tiny, bytes above the largest reference part
QUICK_SECONDS, ROOM = 60, GIB

Result = dict[str, Any]


def prepare(folder: Path, size: str, precision: str) -> tuple[Path, Path]:
    """Checkpoint and bundle, made if they are not there."""
    checkpoint, bundle = folder / size, folder / f"{size}-{precision}"
    if size == WREN:
        checkpoint = ROOT / "wren" / "checkpoint"
    if not checkpoint.exists():
        make_checkpoint(checkpoint, size=size, seed=0)
    if precision in RECIPES:
        if not bundle.exists():
            _quantize(checkpoint, folder / f"{size}-fp32", bundle)
    elif not bundle.exists():
        export_checkpoint(checkpoint, bundle, precision=precision, token2wav="fp16" if precision == "fp16" else "fp32")
    return checkpoint, bundle


def _quantize(checkpoint: Path, source: Path, bundle: Path) -> None:
    """By the recipe that ends ``bundle``'s name, calibrated with Wren's own questions."""
    ranges = bundle.with_name(f"{WREN}-calib")
    if not ranges.exists():
        calibrate(checkpoint, checkpoint.parent / "questions" / "calib" / "calib.jsonl", ranges)
    quantize(source, bundle, bundle.name.removeprefix(f"{WREN}-"), calibration=Calibration.load(ranges))


def run_suite(folder: Path, size: str, suite: str, precisions: Sequence[str], cache: Path) -> Iterator[Result]:
    """Run the suite for each precision, on the states of the cache that `CACHES` says.

    Args:
        cache: folder of references: emptied before a run on an empty cache.

    Raises:
        SystemExit: a run ended with another code than 0 or 1, or nothing is cached.
    """
    for precision in (name for name in precisions if name in CACHES[size]):
        checkpoint, bundle = prepare(folder, size, precision)
        with quiet_transformers():
            opened = Checkpoint.open(checkpoint)
            parts = {name: reference_bytes(opened, name) for name in PARTS}
        for state in CACHES[size][precision]:
            if state == "empty cache":
                shutil.rmtree(cache, ignore_errors=True)
            elif not cache.exists():
                sys.exit(f"there is no {cache}: measure {PRECISIONS[0]} first, which fills it")
            sys.stderr.write(f"{size} {precision} {suite}, {state}\n")
            seconds, processor, report = _run(bundle, checkpoint, suite, cache)
            yield {
                "size": size,
                "precision": precision,
                "suite": suite,
                "cache": state,
                "ok": report.ok,
                "checks": len(report.checks),
                "failed": [f"{c.stage}: {c.name}: {c.message}" for c in report.checks if c.status == FAIL],
                "not_run": [f"{c.stage}: {c.name}: {c.message}" for c in report.checks if c.status == NOT_RUN],
                "emulated": report.emulated,
                "seconds": round(seconds, 1),
                "processor_seconds": round(processor, 1),
                "peak_bytes": report.peak_memory_bytes,
                "reference_bytes": parts,
                "nearest": {row.stage: _nearest(row) for row in stage_rows(report) if row.worst is not None},
                "environment": report.environment,
            }


def _run(bundle: Path, checkpoint: Path, suite: str, cache: Path) -> tuple[float, float, ValidationReport]:
    """Wall and processor seconds of the command, page and JSON written, and its report."""
    files = {kind: bundle.with_name(f"{bundle.name}.report.{kind}") for kind in ("json", "html")}
    command = [str(Path(sys.executable).with_name("omniport")), "validate", str(bundle), str(checkpoint), "--quiet"]
    command += ["--suite", suite, "--json", str(files["json"]), "--html", str(files["html"])]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = dict(os.environ) | {"OMNIPORT_CACHE": str(cache)}
    code = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False).returncode
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if code not in (0, 1):
        sys.exit(f"{' '.join(command)} ended with code {code}")
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, processor, msgspec.json.decode(files["json"].read_bytes(), type=ValidationReport)


def _nearest(row: StageRow) -> Result:
    worst = row.worst
    assert worst is not None
    return {"figure": worst.figure, "value": worst.value, "limit": worst.limit, "used": worst.used, "in": worst.check}


# --- the page --------------------------------------------------------------------------------------------------------


def page(results: Sequence[Result]) -> str:
    """docs/results/validate.md.

    Args:
        results: as `measure` gives them.
    """
    env = results[0]["environment"]
    packages = ", ".join(f"{name} {env[name]}" for name in ("torch", "transformers", "onnxruntime") if name in env)
    lines = [
        "# Validation, measured",
        "",
        "Written by `python -m benchmarks.validate FOLDER`; every figure is in [validate.json](validate.json).",
        f"Random-weight checkpoints (seed 0) and Wren, ONNX Runtime's CPU provider, {env['cpu']},",
        f"Python {env['python']}, {packages}. Real weights were not run.",
        "",
        "*Largest reference part*: parameters and buffers, in float32, of the largest of the six transformers modules",
        "that validation loads, one at a time. *Peak memory*: the largest resident set of the whole process (VmHWM):",
        "interpreter, torch, ONNX Runtime and mapped files included. *Empty cache*: every reference is computed;",
        "*cached*: it is kept from an earlier run. Times include the JSON and the HTML page; *wall* is longer than the",
        "processor time where other work ran on the machine.",
        "",
        "```sh",
        "omniport make-checkpoint FOLDER/small --size small",
        "omniport export FOLDER/small FOLDER/small-bf16 --precision bf16",
        "omniport validate FOLDER/small-bf16 FOLDER/small --suite full --json report.json --html report.html",
        "```",
        "",
        *_verdicts(results),
    ]
    for size in SIZES:
        found = [result for result in results if result["size"] == size]
        if found:
            lines += ["", f"## {size}", "", *_runs(found), "", *_limits(found)]
    return "\n".join(lines) + "\n"


def _verdicts(results: Sequence[Result]) -> list[str]:
    """What holds and what does not, of what is asked for."""
    failed = [_name(result) for result in results if not result["ok"]]
    quick = [result["seconds"] for result in results if result["size"] == "tiny" and result["suite"] == "quick"]
    small = [_above(result) for result in results if result["size"] == "small"]
    lines = [
        f"- {len(results) - len(failed)} of {len(results)} runs pass with the limits of their precision"
        + (f"; these fail: {', '.join(failed)}." if failed else ".")
    ]
    for said, field in (("Fails", "failed"), ("Not run", "not_run")):
        runs: dict[str, list[str]] = {}
        for result in results:
            for line in result[field]:
                runs.setdefault(line, []).append(_name(result))
        lines += [f"- {said} in {', '.join(names)}: {line}." for line, names in runs.items()]
    if quick:
        lines.append(f"- `--suite quick` on `tiny`: at most {max(quick):.0f} s (asked for: under {QUICK_SECONDS} s).")
    if small:
        lines.append(
            f"- Peak memory on `small`: at most the largest reference part plus {max(small) / GIB:.2f} GiB (asked "
            f"for: plus {ROOM / GIB:g} GiB)."
        )
    return lines


def _name(result: Result) -> str:
    return f"{result['size']} {result['precision']} {result['suite']} ({result['cache']})"


def _above(result: Result) -> int:
    """Peak memory above the largest reference part, in bytes."""
    parts: dict[str, int] = result["reference_bytes"]
    return int(result["peak_bytes"]) - max(parts.values())


def _runs(results: Sequence[Result]) -> list[str]:
    """Time and memory of one checkpoint's runs."""
    parts = results[0]["reference_bytes"]
    name, threads = max(parts, key=parts.get), results[0]["environment"]["threads"]
    rows = [
        (
            result["suite"],
            result["precision"] + (" (emulated)" if result["emulated"] else ""),
            result["cache"],
            result["checks"],
            "yes" if result["ok"] else "NO",
            f"{result['seconds']:.0f} s",
            f"{result['processor_seconds']:.0f} s",
            f"{result['peak_bytes'] / GIB:.2f} GiB",
            f"{_above(result) / GIB:.2f} GiB",
        )
        for result in results
    ]
    runs = ("suite", "precision", "references", "checks", "passes")
    return [
        f"Largest reference part: `{name}`, {parts[name] / GIB:.2f} GiB. Threads: {threads}.",
        "",
        *table((*runs, "wall", "processor time", "peak memory", "above the part"), rows),
    ]


def _limits(results: Sequence[Result]) -> list[str]:
    """The figure closest to its limit by stage, from the longest suite that was run."""
    suite = max((result["suite"] for result in results), key=SUITES.index)
    chosen = {r["precision"]: r for r in results if r["suite"] == suite}
    order = list(dict.fromkeys(stage for result in chosen.values() for stage in result["nearest"]))
    nearest = [result["nearest"] for result in chosen.values()]
    return [
        f"Figure closest to its limit by stage, suite {suite} (BF16: emulated, DiT and vocoder stay float32):",
        "",
        *table(("stage", *chosen), ((stage, *(_nearest_text(row.get(stage)) for row in nearest)) for stage in order)),
    ]


def _nearest_text(nearest: Result | None) -> str:
    return "" if nearest is None else f"{nearest['figure']} {nearest['value']:.2g} of {nearest['limit']:g}"


def _key(result: Result) -> tuple[int, ...]:
    """Where a run stands in the page; runs with the same place replace each other."""
    return tuple(
        known.index(result[field])
        for field, known in (("size", SIZES), ("suite", SUITES), ("precision", PRECISIONS), ("cache", _STATES))
    )


def measure(options: argparse.Namespace, found: Sequence[Result]) -> Iterator[list[Result]]:
    """Every run that is asked for, beside those that were measured before."""
    results = {_key(result): result for result in found}
    for size in options.sizes.split(","):
        for suite in options.suites.split(","):
            cache = options.folder / f"{size}-{suite}-references"
            for result in run_suite(options.folder, size, suite, options.precisions.split(","), cache):
                results[_key(result)] = result
                yield [results[key] for key in sorted(results)]


def main() -> None:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("folder", type=Path, help="checkpoints and bundles; what is missing is made")
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--suites", default=",".join(SUITES))
    record("validate", page, measure, parser)


if __name__ == "__main__":
    main()
