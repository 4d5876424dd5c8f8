"""omniport build"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from omniport.export.option_values import BUILDERS, PRECISIONS

from ..common import JsonFlag, QuietFlag, log_console, print_json, print_table, progress_bar, require_extra, size_text
from ..options import one_of
from .export import graph_list

if TYPE_CHECKING:
    from omniport.export import BuildReport, CheckReport
    from omniport.runtime.bundle.engines import EngineRecord

NAME = "build"
EXAMPLE = "omniport build bundle --target rtx-4090"


def command(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder; engines are put into its folder engines.")],
    target: Annotated[
        str, typer.Option(metavar="NAME", help="Machine to build for: see omniport targets; this is the GPU in here.")
    ],
    precision: Annotated[
        str | None,
        one_of(
            (*PRECISIONS, "int8", "w8", "int4", "fp8"),
            help="What the bundle is of. It decides: another one is refused, with the way to make it.",
        ),
    ] = None,
    builder: Annotated[
        str, one_of(BUILDERS, help="auto takes TensorRT-RTX for the GPUs it knows, and TensorRT for the others.")
    ] = "auto",
    graphs: Annotated[
        str, typer.Option(metavar="A,B", help="Build these graphs only, for example thinker,talker.")
    ] = "",
    max_context: Annotated[
        int | None, typer.Option(metavar="N", min=64, help="KV cache capacity in tokens; the bundle's by default.")
    ] = None,
    max_pixels: Annotated[
        int, typer.Option(metavar="N", min=1, help="Largest image that the vision engine takes.")
    ] = 3_211_264,
    image_classes: Annotated[
        str,
        typer.Option(
            metavar="A,B", help="Pixels of the largest image of each class below --max-pixels; empty for one class."
        ),
    ] = "262144,1048576",
    max_codes: Annotated[
        int | None,
        typer.Option(metavar="N", help="Longest window of speech in codec tokens; 84 are enough to stream."),
    ] = None,
    tf32: Annotated[
        bool,
        typer.Option("--tf32", help="Let float32 products be rounded to ten bits: quicker, and misses float32's 1e-4."),
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Build nothing: prove what can be proven here about the target.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Build also the engines of which nothing changed.")] = False,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Build TensorRT engines from a bundle.

    Only what changed is built again. GPUs that TensorRT-RTX knows are built for on any machine, without a GPU; Jetson
    boards and Hopper build for themselves. Exits with 1 when --check finds that something does not fit.
    """
    wanted = graph_list(graphs)
    from omniport.export.devices.detect import find_target

    require_extra("rtx" if find_target(target).built_anywhere else "trt", "onnx")
    from omniport.export import EngineLimits, build_engines, check_engines

    limits = EngineLimits(max_context, max_pixels, max_codes, _pixels(image_classes))
    options: dict[str, Any] = {"graphs": wanted, "limits": limits, "precision": precision}
    with progress_bar(quiet or json) as progress:
        if check:
            found = check_engines(bundle, target, progress=progress, **options)
        else:
            made = build_engines(bundle, target, builder=builder, tf32=tf32, force=force, progress=progress, **options)
    if check:
        _show_check(found, json, quiet)
    elif json:
        print_json(report_dict(made))
    else:
        _print(made)


def _pixels(text: str) -> tuple[int, ...]:
    """Numbers out of ``a,b``.

    Raises:
        UsageError: something else is in it.
    """
    from omniport.runtime.errors import UsageError

    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"--image-classes {text}: numbers of pixels separated by commas were expected")
    return tuple(int(part) for part in parts)


def _print(report: BuildReport) -> None:
    rows = (
        (row.graph, size_text(record.engine.size), size_text(record.weights_bytes), *_cost(row.built, record))
        for row in report.graphs
        if (record := row.record)
    )
    title = f"Engines of {report.bundle} for {report.target.name} by {report.builder} {report.version}"
    print_table(title, ("graph", "engine", "weights", "seconds", "peak memory"), rows)


def _show_check(report: CheckReport, json: bool, quiet: bool) -> None:
    if json:
        print_json(check_dict(report))
    else:
        rows = (
            (
                row.graph,
                row.compiled_for or "-",
                size_text(row.engine_bytes),
                row.problem or row.note or "nothing found",
            )
            for row in report.graphs
        )
        print_table(f"{report.bundle} on {report.target.name}", ("graph", "compiled for", "engine", "finding"), rows)
        fits = "fit" if report.fits else "do not fit"
        needed, usable = size_text(report.memory_needed), size_text(report.memory_usable)
        print(f"Weights and caches of {needed} {fits} the {usable} that engines can use. Nothing was run.")
        if not report.builds_there:
            print(f"Building there takes {size_text(report.build_memory)}, which is more than {usable}.")
        log_console(quiet).print(f"To build: {report.command}")
    if not report.ok:
        raise typer.Exit(1)


def report_dict(report: BuildReport) -> dict[str, Any]:
    """The report of a build as plain JSON values."""
    return {
        "bundle": str(report.bundle),
        "target": report.target.name,
        "compute_capability": report.target.capability,
        "builder": report.builder,
        "version": report.version,
        "seconds": round(report.seconds, 3),
        "engines": [
            {
                "graph": row.graph,
                "path": str(row.path),
                "built": row.built,
                "engine_bytes": row.record.engine.size,
                "weights_bytes": row.record.weights_bytes,
                "build_seconds": row.record.build_seconds,
                "peak_memory_bytes": row.record.peak_memory_bytes,
                "layers": row.record.layers,
            }
            for row in report.graphs
        ],
    }


def check_dict(report: CheckReport) -> dict[str, Any]:
    """The report of ``--check`` as plain JSON values."""
    return {
        "bundle": str(report.bundle),
        "target": report.target.name,
        "ok": report.ok,
        "memory_needed_bytes": report.memory_needed,
        "memory_usable_bytes": report.memory_usable,
        "memory_fits": report.fits,
        "build_memory_bytes": report.build_memory,
        "builds_there": report.builds_there,
        "command": report.command,
        "graphs": [
            {
                "graph": row.graph,
                "compiled_for": row.compiled_for or None,
                "engine_bytes": row.engine_bytes,
                "problem": row.problem or None,
                "note": row.note or None,
            }
            for row in report.graphs
        ],
    }


def _cost(built: bool, record: EngineRecord) -> tuple[str, str]:
    if not built:
        return "unchanged", "-"
    return f"{record.build_seconds:.1f}", size_text(record.peak_memory_bytes)
