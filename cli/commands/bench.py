"""omniport bench"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..common import (
    QuietFlag,
    print_json_text,
    print_line,
    print_table,
    progress_bar,
    require_extra,
    require_folder,
    size_text,
)
from ..options import BundleArgument, ComputeOption, one_of
from .export import EXPORT_MODULES

if TYPE_CHECKING:
    from omniport.runtime.bench.results import BenchReport, Figure, StageResult
    from omniport.runtime.bench.workloads import Rival
    from omniport.runtime.bundle.reader import Bundle

NAME = "bench"
EXAMPLE = "omniport bench bundle --against Qwen/Qwen2.5-Omni-3B --json bench.json"


def command(
    bundle: BundleArgument,
    against: Annotated[
        str,
        typer.Option(metavar="CHECKPOINT", help="Measure transformers beside it, on the checkpoint it was made from."),
    ] = "",
    stages: Annotated[
        str,
        typer.Option(
            metavar="A,B",
            help="Measure these only: audio_encoder, vision_encoder, prefill, decode, talker, dit, solver, bigvgan, "
            "reply; all without it.",
        ),
    ] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each figure: ours and the reference in turns.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of one operator; the physical cores.")] = None,
    clock: Annotated[
        str, one_of(("wall", "cpu"), help="wall, or cpu: processor time, for busy machines, with --threads 1.")
    ] = "wall",
    backend: Annotated[str, one_of(("ort-cpu", "openvino"), help="What runs the graphs.")] = "ort-cpu",
    compute: ComputeOption = None,
    json: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write JSON after each stage; other stages of a file that is there are kept. - is stdout.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw roofline, latency by context, first sound (.svg, .png)."),
    ] = None,
    quiet: QuietFlag = False,
) -> None:
    """Measure a bundle's speed on this CPU.

    Each graph and the whole spoken reply, as a share of what the machine's memory bandwidth and arithmetic allow.
    Without --against nothing but the runtime is needed.
    """
    from omniport.runtime.bench.benchmark import bench
    from omniport.runtime.bench.results import encode_report, read_report, write_report

    _check_outputs(json, plot)
    if against:
        require_extra("export", *EXPORT_MODULES)
    file = json if str(json) != "-" else None
    before = read_report(file) if file is not None and file.exists() else None
    named = [name.strip() for name in stages.split(",") if name.strip()]
    with progress_bar(quiet) as progress:
        report = bench(
            bundle,
            named,
            rival=(lambda opened: _rival(opened, against, threads)) if against else None,
            rounds=rounds,
            threads=threads,
            clock=clock,
            backend=backend,
            compute=compute,
            before=before,
            keep=None if file is None else partial(write_report, file),
            progress=progress,
        )
    if plot is not None:
        from omniport.export.evaluation.bench_picture import draw

        draw(report, plot)
    if str(json) == "-":
        print_json_text(encode_report(report).decode())
        return
    _print(report, named)


def _rival(bundle: Bundle, checkpoint: str, threads: int | None) -> Rival:
    from omniport.export.evaluation.transformers_rival import TransformersRival
    from omniport.runtime.system.host import physical_cores

    return TransformersRival(bundle, checkpoint, physical_cores() if threads is None else threads)


def _check_outputs(json: Path | None, plot: Path | None) -> None:
    """UsageError if a file could not be written; found out before minutes of work."""
    from omniport.runtime.errors import UsageError

    require_folder(json, plot)
    if plot is not None:
        if plot.suffix not in (".svg", ".png"):
            raise UsageError(f"--plot is {plot}; a name that ends in .svg or .png was expected")
        require_extra("export", "matplotlib")


def _print(report: BenchReport, named: Sequence[str]) -> None:
    """One row a figure, and the machine's rates of each stage below: of the stages named, or of all."""
    stages = {name: stage for name, stage in report.stages.items() if not named or name in named}
    rows = [_row(name, figure) for name, stage in stages.items() for figure in stage.figures]
    columns = ("stage", "input", "time", "rate", "of the roofline", f"{report.against or 'reference'}", "times as fast")
    print_table(f"{report.bundle} ({report.precision}) on {report.environment.processor}", columns, rows)
    for name, stage in stages.items():
        print_line(_rates(name, stage))


def _row(stage: str, figure: Figure) -> tuple[str, ...]:
    seconds = figure.seconds
    share = "" if figure.share is None else f"{figure.share:.0%}"
    faster = figure.faster
    return (
        stage,
        figure.name,
        f"{_ms(seconds.median)} ({_ms(seconds.low)} to {_ms(seconds.high)})",
        f"{figure.rate:.3g} {figure.unit}/s",
        share,
        "" if figure.reference is None else _ms(figure.reference.median),
        "" if faster is None else f"{faster.median:.2f} ({faster.low:.2f} to {faster.high:.2f})",
    )


def _rates(name: str, stage: StageResult) -> str:
    machine = stage.machine
    memory = "" if stage.resident_bytes is None else f", {size_text(max(0, stage.resident_bytes))} of memory"
    return (
        f"{name}: {machine.read_bandwidth / 1e9:.1f} GB/s read, {machine.matmul_rate / 1e9:.0f} GFLOP/s, "
        f"{stage.threads} threads{memory}"
    )


def _ms(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 10 else f"{1e3 * seconds:.1f} ms"
