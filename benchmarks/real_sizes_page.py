"""docs/results/real-sizes.md from what `benchmarks.real_sizes` measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.harness import GIB, table

SIZES = ("tiny", "small", "3b", "7b")
FIELDS = ("VmRSS", "RssAnon", "RssFile")
_COLUMNS = ("seconds", "of it tracing", "processor seconds", "times a copy", "peak memory")
#: of a reply
FIGURES = (
    "prompt_tokens",
    "text_tokens",
    "codec_tokens",
    "tokens_per_second",
    "codes_per_second",
    "time_to_first_token",
    "time_to_first_audio",
    "total_time",
    "real_time_factor",
)


def page(results: dict[str, Any]) -> str:
    """docs/results/real-sizes.md."""
    rows = [row for size in SIZES for row in _rows(size, results.get(size, {}))]
    lines = [
        "# Real sizes",
        "",
        "Made by `python -m benchmarks.real_sizes` from real-sizes.json: do not edit by hand. Random weights of the",
        f"published models' geometry. {results['machine']}, no GPU; ONNX Runtime on the CPU.",
        "Times include flushing what was written to the disk. Inputs are not in the page cache when a step begins.",
        "Other work took one core beside exports and quantizing of the 3b, and both beside the rest; there was none",
        "beside the spoken questions.",
        "",
        "## Making and exporting",
        "",
        "Limits: 2 GiB of resident memory, and twice the time of copying the checkpoint's files, tracing apart. Of",
        "several rounds, copy and export in turns, the seconds are the median, and every round's stand behind it.",
        "",
        *table(("size", "step", "written", *_COLUMNS), rows),
    ]
    hollow = [size for size in SIZES if "hollow" in results.get(size, {})]
    if hollow:
        lines += [
            "",
            f"The disk could not hold checkpoint and bundle of the {', '.join(hollow)} at once. Its weights are holes",
            "(*hollow*), which read as zeros without the disk; copy and export read them, and write every byte.",
        ]
    lines += _stage_lines(results)
    lines += _trace_lines(results)
    for size, _, found in _steps(results, "run"):
        lines += _answer_lines(size, found)
    return "\n".join(lines) + "\n"


def _rows(size: str, steps: dict[str, Any]) -> Iterator[tuple[object, ...]]:
    copied = _copied(steps, "export bf16")
    for name, found in steps.items():
        if name.startswith(("run", "trace")):
            continue
        tracing = _tracing(found.get("stages", {}))
        beside = _copied(steps, name) if name.startswith("export") else None
        yield (
            size,
            _title(name),
            f"{found['bytes'] / 1e9:.2f} GB",
            _rounds(found),
            f"{tracing:.1f}" if "stages" in found else "-",
            found.get("cpu_seconds", "-"),
            f"{(found['synced_seconds'] - tracing) / beside:.2f}" if beside else "-",
            f"{found['peak_bytes'] / GIB:.2f} GiB",
        )
    halves = [found for name, found in steps.items() if name.startswith("export bf16 ")]
    if len(halves) > 1 and copied:
        tracing = sum(_tracing(half["stages"]) for half in halves)
        seconds = sum(half["synced_seconds"] for half in halves)
        cpu = round(sum(half["cpu_seconds"] for half in halves), 1)
        peak = max(half["peak_bytes"] for half in halves) / GIB
        times = (f"{seconds:.1f}", f"{tracing:.1f}", cpu, f"{(seconds - tracing) / copied:.2f}", f"{peak:.2f} GiB")
        yield size, "export bf16, both runs", "", *times


def _tracing(stages: dict[str, float]) -> float:
    return sum(seconds for stage, seconds in stages.items() if stage.startswith("tracing"))


def _copied(steps: dict[str, Any], export: str) -> float | None:
    """Seconds of the copy that was made beside an export, or of the one copy there is."""
    copy = steps.get(export.replace("export", "copy", 1), steps.get("copy", {}))
    seconds: float | None = copy.get("synced_seconds")
    return seconds


def _title(name: str) -> str:
    if name == "let-go":
        return "copy that leaves nothing in the page cache"
    if name == "copy let-go":
        return "copy, beside that"
    beside = f"copy, beside the export to {name.removeprefix('copy ')}" if name.startswith("copy ") else name
    return beside.replace(",", ", ").replace(",  ", ", ")


def _rounds(found: dict[str, Any]) -> str:
    """The seconds of a step, and those of all its rounds in the order in which they ran."""
    rounds = found.get("rounds", [])
    each = f" ({', '.join(f'{seconds:.1f}' for seconds in rounds)})" if rounds else ""
    return f"{found['synced_seconds']:.1f}{each}"


def _stage_lines(results: dict[str, Any]) -> list[str]:
    rows = []
    for size, name, found in _steps(results, "export"):
        stages = found["stages"]
        tracing = _tracing(stages)
        thinker = stages.get("writing thinker", 0.0)
        others = sum(s for stage, s in stages.items() if stage.startswith("writing")) - thinker
        embeddings = stages.get("embeddings", 0.0)
        rest = sum(stages.values()) - tracing - thinker - others - embeddings
        parts = (tracing, thinker, others, embeddings, rest)
        rows.append((size, name.removeprefix("export ").replace(",", ", "), *(f"{seconds:.1f}" for seconds in parts)))
    columns = ("tracing", "writing the thinker", "writing the others", "embeddings", "the rest")
    return ["", "Where the seconds of an export go:", "", *table(("size", "export", *columns), rows)]


def _trace_lines(results: dict[str, Any]) -> list[str]:
    traced = [(size, found["traced"]) for size, _, found in _steps(results, "trace")]
    rows = [(size, graph, f"{seconds:.1f}") for size, graphs in traced for graph, seconds in graphs.items()]
    head = (
        "Tracing depends on the geometry alone and its result is cached, so that it is a constant of the first export:"
    )
    return ["", head, "", *table(("size", "graph", "seconds"), rows)] if rows else []


def _steps(results: dict[str, Any], kind: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for size in SIZES:
        for name, found in results.get(size, {}).items():
            if name.startswith(kind):
                yield size, name, found


def _answer_lines(size: str, found: dict[str, Any]) -> list[str]:
    memory, stats = found["memory"], found["stats"]
    loaded = [
        (step, *(f"{sizes[field] / 1e6:,.0f} MB" for field in FIELDS), found["loading"].get(step, "-"))
        for step, sizes in memory.items()
    ]
    figures = [(key, _number(stats[key])) for key in FIGURES]
    busy = [(f"busy, {stage}", _number(seconds)) for stage, seconds in stats["busy"].items()]
    return [
        "",
        f"## A spoken question to the {size} in `{found['recipe']}`, solver `{found.get('solver', 'rk4')}`, on the CPU",
        "",
        f"{found['question_seconds']:.0f} s of sound, answered in {stats['text_tokens']} text tokens and",
        f"{stats['codec_tokens']} codec tokens ({found['samples'] / 24000:.2f} s of speech), with every stage.",
        f"Opening and loading all graphs took {found['load_seconds']:.0f} s.",
        "",
        *table(("after", "resident", "anonymous", "mapped files", "seconds to load"), loaded),
        "",
        f"Highest: {found['peak_bytes'] / 1e9:.2f} GB. Anonymous memory is weights that ONNX Runtime packs for its",
        "products, once; convolutions stay in the mapped file, of which the kernel holds what was touched.",
        "",
        *table(("figure", "value"), [*figures, *busy]),
    ]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.2f}"
