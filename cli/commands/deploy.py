"""omniport deploy"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..common import (
    JsonFlag,
    QuietFlag,
    as_json,
    log_console,
    print_json,
    print_table,
    progress_bar,
    require_extra,
    size_text,
)
from ..options import one_of
from .calibrate import CALIB_MODULES
from .export import COMPARE_MODULES

if TYPE_CHECKING:
    from omniport.calib import DeployPlan, DeployReport

NAME = "deploy"
EXAMPLE = "omniport deploy Qwen/Qwen2.5-Omni-3B bundle --target rtx-4090"


def command(
    model: Annotated[str, typer.Argument(help="Checkpoint: folder, Hugging Face id, or modelscope:ID.")],
    out: Annotated[Path, typer.Argument(help="Bundle folder to write; a rerun goes on where it stopped.")],
    target: Annotated[
        str, typer.Option(metavar="NAME", help="Device: see omniport targets; this for the GPU in here, or cpu.")
    ],
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME", help="Precision or recipe, as omniport plan lists them; else chosen.")
    ] = None,
    max_context: Annotated[
        int | None, typer.Option(metavar="N", min=64, help="KV cache capacity in tokens; else chosen.")
    ] = None,
    goal: Annotated[
        str,
        one_of(
            ("quality", "speed", "memory"),
            help="quality: loses least and speaks in real time. speed: works least. memory: takes least.",
        ),
    ] = "quality",
    jetpack: Annotated[
        str | None,
        typer.Option(metavar="VERSION", help="JetPack of a Jetson board; the oldest that there is for it by default."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON lines to calibrate with; a small built-in set without it.")
    ] = None,
    validate: Annotated[
        str, one_of(("quick", "none"), help="Compare the bundle with PyTorch, in ONNX Runtime on this machine.")
    ] = "quick",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be made and why, no more; 3b and 7b need no files."),
    ] = False,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Deploy a checkpoint to a device: from the weights to a bundle that is ready to start.

    Chooses recipe and context by the device's memory and speed, calibrates, exports and quantizes graph by graph,
    compares with PyTorch, and builds engines where their builder needs no GPU. Exits with 1 if the comparison fails.
    """
    require_extra("calib", *COMPARE_MODULES, *CALIB_MODULES)
    from omniport import calib as library

    asked: dict[str, Any] = {"recipe": recipe, "max_context": max_context, "goal": goal, "jetpack": jetpack}
    if dry_run:
        plan = library.deploy_plan(model, target, **asked)
        if json:
            print_json(plan)
        else:
            _print_plan(plan)
        return

    def said(plan: DeployPlan) -> None:
        for line in plan_lines(plan):
            log_console(quiet or json).print(line, markup=False)

    with progress_bar(quiet or json) as progress:
        report = library.deploy(
            model, out, target, **asked, data=data, validation=validate, said=said, progress=progress
        )
    if json:
        print_json(report_dict(report))
    else:
        _print(report, quiet)
    if not report.ok:
        raise typer.Exit(1)


def plan_lines(plan: DeployPlan) -> list[str]:
    """What is going to be made, why, and what to expect."""
    expected = plan.expected
    lines = [f"{plan.model} for {plan.title}: {plan.recipe}, context {plan.context}", *plan.reasons]
    reasons = dict.fromkeys(plan.refused.values())
    for reason in reasons:
        lines.append(f"not {', '.join(name for name, why in plan.refused.items() if why == reason)}: {reason}")
    lines.append(f"memory: {size_text(expected.memory_bytes)} of {size_text(expected.usable_bytes)}")
    if expected.first_audio_seconds is not None and expected.work_per_second_of_speech is not None:
        speaks = "in real time" if expected.real_time else "not in real time"
        lines.append(
            f"first sound after {expected.first_audio_seconds:.2f} s, speech {speaks} with {expected.solver} ("
            f"{expected.work_per_second_of_speech:.2f} s of work for a second of it): predicted, not run"
        )
    lines.append(
        f"disk: {size_text(expected.peak_disk_bytes)} while it is made, {size_text(expected.result_bytes)} in the end"
    )
    return lines


def report_dict(report: DeployReport) -> dict[str, Any]:
    """What ``--json`` prints."""
    record = report.record
    found: dict[str, Any] = as_json(record)
    return found | {
        "path": str(report.path),
        "page": str(report.page),
        "did": list(report.did),
        "ok": report.ok,
        "seconds": round(record.seconds, 3),
        "peak_memory_bytes": record.peak_memory_bytes,
        "peak_disk_bytes": record.peak_disk_bytes,
        "next": report.next,
    }


def _print_plan(plan: DeployPlan) -> None:
    for line in plan_lines(plan):
        typer.echo(line)


def _print(report: DeployReport, quiet: bool) -> None:
    from omniport.calib.deployment.deploy_figures import compared

    record, plan = report.record, report.record.plan
    log = log_console(quiet)
    if not report.did:
        log.print(f"{report.path} is deployed already, and nothing changed: nothing was done", markup=False)
    title = f"{plan.model} for {plan.title} in {report.path}: {plan.recipe}, context {plan.context}"
    print_table(title, ("what", "planned", "measured"), compared(record))
    rows = (
        (name, f"{stage.seconds:.1f}", size_text(stage.peak_memory_bytes), size_text(stage.peak_disk_bytes))
        for name, stage in record.stages.items()
    )
    print_table("Stages", ("stage", "seconds", "memory so far", "disk"), rows)
    if record.validated is not None:
        failed = ", ".join(record.validated.failed)
        log.print(
            f"{record.validated.checks} checks against PyTorch on this machine: "
            + ("all hold" if record.validated.ok else f"not proven{': ' + failed if failed else ''}"),
            markup=False,
        )
    if plan.builder:
        engines = "Engines are built, not run" if record.engines else "Engines are built on the device"
        log.print(f"{engines}. Copy {report.path} there and run: {report.next}", markup=False)
    else:
        log.print(f"Next: {report.next}", markup=False)
    log.print(f"Page: {report.page}", markup=False)
