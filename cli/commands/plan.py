"""omniport plan"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from omniport.export.option_values import TOKEN2WAV_PRECISIONS

from ..common import JsonFlag, as_json, print_json, print_table, require_extra, size_text
from ..options import number, one_of
from .inspect import auto_on_cpu, print_auto_on_cpu

if TYPE_CHECKING:
    from omniport.export import RecipePlan, TargetPlan

NAME = "plan"
EXAMPLE = "omniport plan 3b --target jetson-orin-nx-16gb"


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A bundle, a checkpoint's folder, or 3b or 7b, which need no files.")
    ],
    target: Annotated[
        str,
        typer.Option(
            help="As listed by omniport targets; this for the machine's own GPU, cpu for its processor, or all."
        ),
    ] = "all",
    context: Annotated[int, typer.Option(help="Tokens of the KV caches.")] = 4096,
    bandwidth: Annotated[
        float | None,
        number("GB/S", 0.1, help="GB/s at which the target's memory is read, where you measured it yourself."),
    ] = None,
    token2wav: Annotated[
        str, one_of(TOKEN2WAV_PRECISIONS, help="DiT and vocoder where the rest is FP16 or BF16, as for export.")
    ] = "fp32",
    sweep: Annotated[
        Path | None, typer.Option(help="Draw every target by every recipe as a heat map: a .png or .svg file.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Predict memory and speed on a device, without building anything.

    For each precision and recipe: what its weights, caches and activations take, whether they fit, and how fast it
    listens and speaks. docs/plan.md has the formulas, and how far they were from what was measured.
    """
    from omniport.export import plan
    from omniport.runtime.errors import UsageError

    if sweep is not None:
        if sweep.suffix not in (".png", ".svg"):
            raise UsageError(f"--sweep {sweep}: a file that ends in .png or .svg was expected")
        require_extra("export", "matplotlib")
    rate = None if bandwidth is None else bandwidth * 1e9
    plans = plan(model, target, context=context, bandwidth=rate, token2wav=token2wav)
    if sweep is not None:
        from omniport.export.planning.picture import draw_sweep

        draw_sweep(plans, sweep)
    chosen = _auto_on_cpu(model)
    if json:
        dicts = [plan_dict(plan) for plan in plans]
        print_json([each | ({"auto_on_cpu": chosen} if each["target"] == "cpu" and chosen else {}) for each in dicts])
    elif len(plans) == 1:
        _print_one(plans[0])
        if plans[0].machine.name == "cpu" and chosen:
            print_auto_on_cpu(chosen)
    else:
        _print_all(plans)


def _auto_on_cpu(model: str) -> dict[str, dict[str, str]]:
    """Where ``auto`` runs the graphs of a bundle on this machine's CPU; nothing for what is no bundle."""
    from omniport.runtime.bundle.reader import MANIFEST_FILE, Bundle

    return auto_on_cpu(Bundle.open(model)) if (Path(model) / MANIFEST_FILE).exists() else {}


def plan_dict(plan: TargetPlan) -> dict[str, Any]:
    """A plan as plain JSON values."""
    return {
        "model": plan.model,
        "target": plan.machine.name,
        "title": plan.machine.title,
        "context": plan.context,
        "usable_bytes": plan.machine.usable,
        "best": plan.best or None,
        "recipes": [_recipe_dict(row) for row in plan.recipes],
    }


def _recipe_dict(row: RecipePlan) -> dict[str, Any]:
    found: dict[str, Any] = {"recipe": row.recipe.name, "command": row.recipe.command, "problem": row.problem or None}
    if row.memory is None or row.speed is None:
        return found
    memory, speed = row.memory, row.speed
    return found | {
        "fits": row.fits,
        "builds": row.builds,
        "build_bytes": row.build_bytes,
        "real_time": speed.real_time,
        "memory": {"total": memory.total, **as_json(memory)},
        "prefill_tokens_per_second": speed.prefill,
        "decode_tokens_per_second": speed.decode,
        "codes_per_second": speed.codes,
        "first_token_seconds": speed.first_token,
        "first_audio_seconds": speed.first_audio,
        "seconds_per_second_of_speech": speed.speech,
        "solver": speed.solver or None,
    }


def _print_one(plan: TargetPlan) -> None:
    columns = (
        "recipe",
        "weights",
        "caches",
        "activations",
        "in all",
        "fits",
        "builds",
        "prefill tok/s",
        "decode tok/s",
        "codes/s",
        "first sound",
        "real time",
        "solver",
    )
    title = f"{plan.model} on {plan.machine.title}: {size_text(plan.machine.usable)} usable, context {plan.context}"
    print_table(title, columns, (_row(row) for row in plan.recipes))
    mapped = next((row.memory.mapped for row in plan.recipes if row.memory is not None), 0)
    for row in plan.recipes:
        if row.problem:
            typer.echo(f"{row.recipe.name}: {row.problem}")
    typer.echo(f"Token tables of {size_text(mapped)} stay in mapped files. codes/s: real time needs 50.")
    chosen = next((row for row in plan.recipes if row.recipe.name == plan.best), None)
    if chosen is None:
        typer.echo("Nothing fits: take another target, a smaller model or a shorter --context.")
        return
    assert chosen.speed is not None
    in_time = f"speaks in real time with the solver {chosen.speed.solver}"
    speaks = in_time if chosen.speed.real_time else "does not speak in real time"
    typer.echo(f"Best: {plan.best}, which {speaks}. Make it: {chosen.recipe.command}")
    if chosen.recipe.quantized is not None and plan.machine.precision == "fp16":
        typer.echo("BUNDLE is of: omniport export CHECKPOINT BUNDLE --precision fp16 --token2wav fp16")


def _row(row: RecipePlan) -> tuple[str, ...]:
    if row.memory is None or row.speed is None:
        return (row.recipe.name, "-", "-", "-", "-", "no", *["-"] * 7)
    memory, speed = row.memory, row.speed
    return (
        row.recipe.name,
        size_text(sum(memory.weights.values())),
        size_text(memory.caches),
        size_text(memory.activations),
        size_text(memory.total),
        _word(row.fits),
        _word(row.builds),
        f"{speed.prefill:,.0f}",
        f"{speed.decode:.1f}",
        "-" if speed.codes is None else f"{speed.codes:.0f}",
        "-" if speed.first_audio is None else f"{speed.first_audio:.2f} s",
        "-" if speed.speech is None else f"{_word(speed.real_time)} ({speed.speech:.2f})",
        speed.solver or "-",
    )


def _print_all(plans: Sequence[TargetPlan]) -> None:
    columns = ("target", "usable", "fit", "best", "in all", "decode tok/s", "codes/s", "first sound", "real time")
    print_table(f"{plans[0].model}, context {plans[0].context}", columns, (_summary(plan) for plan in plans))


def _summary(plan: TargetPlan) -> tuple[str, ...]:
    working = " ".join(row.recipe.name for row in plan.recipes if row.works)
    head = (plan.machine.name, size_text(plan.machine.usable), working or "none")
    chosen = next((row for row in plan.recipes if row.recipe.name == plan.best), None)
    if chosen is None:
        return head
    cells = _row(chosen)
    return (*head, cells[0], cells[4], cells[8], cells[9], cells[10], cells[11])


def _word(value: bool) -> str:
    return "yes" if value else "no"
