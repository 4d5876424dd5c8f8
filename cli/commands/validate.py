"""omniport validate"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from omniport.export.option_values import SUITES
from omniport.runtime.backends import BACKENDS
from omniport.runtime.bundle.parts import decoders

from ..common import (
    QuietFlag,
    log_console,
    print_json_text,
    print_line,
    print_table,
    progress_bar,
    require_extra,
    require_folder,
    size_text,
)
from ..options import BundleArgument, ComputeOption, one_of
from .export import COMPARE_MODULES

if TYPE_CHECKING:
    from omniport.export import ValidationReport

NAME = "validate"
EXAMPLE = "omniport validate bundle Qwen/Qwen2.5-Omni-3B --html report.html"


def command(
    bundle: BundleArgument,
    checkpoint: Annotated[
        str, typer.Argument(help="The checkpoint it was exported from: folder, Hugging Face id, or modelscope:ID.")
    ],
    backend: Annotated[
        str, one_of(BACKENDS, help="What runs the graphs; one that cannot run here is reported as not run.")
    ] = "ort-cpu",
    compute: ComputeOption = None,
    suite: Annotated[str, one_of(SUITES, help="quick: some cases of everything. full: all of them.")] = "quick",
    graphs: Annotated[
        str,
        typer.Option(
            metavar="A,B", help="Check these only: graphs, preprocess, positions, end_to_end, speech; all without it."
        ),
    ] = "",
    data: Annotated[
        Path | None,
        typer.Option(metavar="JSONL", help='Own conversations to reply to: one object with "messages" a line.'),
    ] = None,
    trace: Annotated[
        str | None,
        one_of([part.name for part in decoders()], help="Compare this decoder's hidden states layer by layer as well."),
    ] = None,
    asr: Annotated[
        str, typer.Option(metavar="CMD", help="Speech recogniser: prints the words in the WAV file it is given last.")
    ] = "",
    acceptance: Annotated[
        bool,
        typer.Option(
            "--acceptance",
            help="For the real weights: the recorded question of transformers' own test.",
        ),
    ] = False,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write JSON; - is stdout.")] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a self-contained page.")] = None,
    quiet: QuietFlag = False,
) -> None:
    """Compare a bundle with PyTorch.

    Every graph, the preprocessing, whole replies and their speech are compared with transformers, one part in memory
    at a time. Exit code 0: all checks hold. 1: one failed, or none ran. 2: bad input.
    """
    require_extra("export", *COMPARE_MODULES)
    if html is not None:
        require_extra("export", "matplotlib", "jinja2")  # found out now, not when everything has been computed
    require_folder(json, html)
    from omniport.export import validate
    from omniport.export.validation.summary import encode
    from omniport.runtime.system.files import write_output

    given = tuple(name.strip() for name in graphs.split(",") if name.strip())
    names = (*given, "acceptance") if acceptance else given or None
    with progress_bar(quiet) as progress:
        report, artifacts = validate(
            bundle,
            checkpoint,
            backend=backend,
            compute=compute,
            suite=suite,
            graphs=names,
            data=data,
            trace=trace,
            asr=asr or None,
            progress=progress,
        )
        if json is not None and str(json) != "-":
            write_output(json, encode(report))
        if html is not None:
            from omniport.export.validation.report_page import render

            progress("drawing the report", 1, 1)
            write_output(html, render(report, artifacts).encode())
    if json is not None and str(json) == "-":
        print_json_text(encode(report).decode())
    else:
        print_report(report)
    if html is not None:
        log_console(quiet).print(f"Report: {html}", markup=False)
    if not report.ok:
        raise typer.Exit(1)


def print_report(report: ValidationReport) -> None:
    """The summary table, then what failed and what did not run."""
    from omniport.export.validation.summary import failures, stage_rows
    from omniport.export.validation.types import NOT_RUN

    rows = [
        (
            row.stage + (" (emulated)" if row.emulated else ""),
            row.status.replace("_", " "),
            row.checks,
            row.failed or "",
            row.worst.text if row.worst else "",
            row.worst.check if row.worst else "",
        )
        for row in stage_rows(report)
    ]
    title = f"{report.bundle} ({report.precision}) on {report.backend}, suite {report.suite}"
    print_table(title, ("stage", "status", "checks", "failed", "closest to its limit", "in"), rows)
    for check in failures(report):
        print_line(f"FAIL {check.stage}: {check.name}: {check.message or 'a figure is beyond its limit'}")
    for check in report.checks:
        if check.status == NOT_RUN:
            print_line(f"not run: {check.stage}: {check.name}: {check.message}")
    verdict = "every check that ran holds" if report.ok else "this bundle does NOT match its checkpoint"
    if not report.ok and not any(failures(report)):
        verdict = "not proven: a graph of the bundle, or all of them, could not run here"
    print_line(f"{verdict} ({report.seconds:.0f} s, peak memory {size_text(report.peak_memory_bytes)})")
