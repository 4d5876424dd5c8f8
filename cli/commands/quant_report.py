"""omniport quant-report"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..common import (
    JsonFlag,
    QuietFlag,
    log_console,
    print_json,
    print_line,
    print_table,
    progress_bar,
    require_extra,
    require_folder,
    size_text,
)
from .export import COMPARE_MODULES

if TYPE_CHECKING:
    from omniport.calib import BundleLoss, LossReport

NAME = "quant-report"
EXAMPLE = "omniport quant-report bundle bundle-w8 bundle-int4 --html report.html"


def command(
    bundle: Annotated[Path, typer.Argument(help="The bundle that the others were made from; not quantized.")],
    quantized: Annotated[list[Path], typer.Argument(help="Quantized bundles to compare with it.")],
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a self-contained page.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="JSONL", help="Conversations to measure on; built-in ones without it."),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(metavar="JSONL", help="Questions with right answers: how many are right, and are heard right."),
    ] = None,
    calib: Annotated[Path | None, typer.Option(metavar="FILE", help="Calibration whose ranges the page shows.")] = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Compare quantized bundles with the one they were made from.

    Runs all of them on the same recorded calls: output error of each graph and layer, agreement of text and codes under
    teacher forcing, distance of the sound, size and speed.
    """
    require_extra("export", *COMPARE_MODULES, *(("matplotlib", "jinja2") if html is not None else ()))
    require_folder(html)
    from omniport.calib import Calibration, compare

    calibration = None if calib is None else Calibration.load(calib)
    with progress_bar(quiet or json) as progress:
        report, waves = compare(
            bundle, quantized, data=data, questions=questions, calibration=calibration, progress=progress
        )
        if html is not None:
            from omniport.calib.report.quant_page import render
            from omniport.runtime.system.files import write_output

            progress("drawing the report", 1, 1)
            write_output(html, render(report, waves).encode())
    if json:
        print_json(report)
        return
    _print(report)
    if html is not None:
        log_console(quiet).print(f"Report: {html}", markup=False)


def _print(report: LossReport) -> None:
    columns = ["bundle", "recipe", "size", "thinker dB", "text same", "talker dB", "codes same", "mel dB", "step ms"]
    asked = any(bundle.answers is not None for bundle in report.bundles)
    columns += ["right answers", "words heard wrong"] if asked else []
    print_table(f"Quantization of {report.base}", columns, (_row(bundle, asked) for bundle in report.bundles))
    for bundle in report.bundles:
        for what, why in bundle.missing.items():
            print_line(f"{bundle.name}: {what} not measured: {why}", err=True)


def _row(bundle: BundleLoss, asked: bool) -> list[str]:
    from omniport.runtime.bundle.parts import decoders

    cells = [bundle.name, bundle.recipe, size_text(bundle.bytes)]
    losses = {graph.graph: graph.loss for graph in bundle.graphs}
    for part in decoders():
        loss = losses.get(part.name)
        agreement = None if loss is None else loss.agreement
        cells += ["-" if loss is None else _decibels(loss.sqnr_db), "-" if agreement is None else f"{agreement:.0%}"]
    cells.append("-" if bundle.sound is None else _decibels(bundle.sound.mel_sqnr_db))
    step = next((graph.step_ms for graph in bundle.graphs if graph.graph == decoders()[0].name), 0.0)
    cells.append(f"{step:.1f}")
    if asked and bundle.answers is not None:
        error = bundle.answers.word_error_rate
        cells += [f"{bundle.answers.right_share:.1%}", "-" if error is None else f"{error:.1%}"]
    return cells


def _decibels(value: float) -> str:
    return "exact" if value >= 300 else f"{value:.1f}"
