"""docs/results/real-sizes.md from what benchmarks/real_sizes.py measured."""

from __future__ import annotations

from typing import Any

SIZES = ("tiny", "small", "3b", "7b")
FIELDS = ("VmRSS", "RssAnon", "RssFile")
GIB = 1 << 30


def page(results: dict[str, Any]) -> str:
    """docs/results/real-sizes.md."""
    lines = [
        "# Real sizes",
        "",
        "Made by `python -m benchmarks.real_sizes` from real-sizes.json: do not edit by hand. Random weights of the",
        f"published models' geometry. {results['machine']}, no GPU; ONNX Runtime on the CPU.",
        "Times include flushing what was written to the disk. Inputs are not in the page cache when a step begins.",
        "",
        "## Making and exporting",
        "",
        "Limits: 2 GiB of resident memory, and twice the time of copying the checkpoint's files, tracing apart. Of",
        "several rounds, copy and export in turns, the seconds are the median, and every round's stand behind it.",
        "",
        "| size | step | written | seconds | of it tracing | processor seconds | times a copy | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in SIZES:
        lines += _size_lines(size, results.get(size, {}))
    hollow = [size for size in SIZES if "hollow" in results.get(size, {})]
    if hollow:
        lines += [
            "",
            f"The disk could not hold checkpoint and bundle of the {', '.join(hollow)} at once. Its weights are holes",
            "(*hollow*), which read as zeros without the disk; copy and export read them, and write every byte.",
        ]
    lines += _stage_lines(results)
    lines += _trace_lines(results)
    lines += _run_lines(results)
    return "\n".join(lines) + "\n"


def _size_lines(size: str, steps: dict[str, Any]) -> list[str]:
    copied = _copied(steps, "export bf16")
    lines = []
    for name, found in steps.items():
        if name.startswith(("run", "trace")):
            continue
        tracing = sum(seconds for stage, seconds in found.get("stages", {}).items() if stage.startswith("tracing"))
        seconds = found["synced_seconds"]
        beside = _copied(steps, name) if name.startswith("export") else None
        ratio = f"{(seconds - tracing) / beside:.2f}" if beside else "-"
        traced = f"{tracing:.1f}" if "stages" in found else "-"
        lines.append(
            f"| {size} | {_title(name)} | {found['bytes'] / 1e9:.2f} GB | {_rounds(found)} | {traced} "
            f"| {found.get('cpu_seconds', '-')} | {ratio} | {found['peak_bytes'] / GIB:.2f} GiB |"
        )
    halves = [found for name, found in steps.items() if name.startswith("export bf16 ")]
    if len(halves) > 1 and copied:
        tracing = sum(s for half in halves for stage, s in half["stages"].items() if stage.startswith("tracing"))
        seconds = sum(half["synced_seconds"] for half in halves)
        cpu = round(sum(half["cpu_seconds"] for half in halves), 1)
        peak = max(half["peak_bytes"] for half in halves) / GIB
        lines.append(
            f"| {size} | export bf16, both runs | | {seconds:.1f} | {tracing:.1f} | {cpu} "
            f"| {(seconds - tracing) / copied:.2f} | {peak:.2f} GiB |"
        )
    return lines


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


def _trace_lines(results: dict[str, Any]) -> list[str]:
    if not any(name.startswith("trace") for size in SIZES for name in results.get(size, {})):
        return []
    lines = [
        "",
        "Tracing depends on the geometry alone and its result is cached, so that it is a constant of the first export:",
        "",
        "| size | graph | seconds |",
        "|---|---|---|",
    ]
    for size in SIZES:
        for name, found in results.get(size, {}).items():
            if name.startswith("trace"):
                lines += [f"| {size} | {graph} | {seconds:.1f} |" for graph, seconds in found["traced"].items()]
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
