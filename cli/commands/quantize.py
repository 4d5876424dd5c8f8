"""omniport quantize"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from omniport.runtime.bundle.recipes import RECIPES

from ..common import (
    JsonFlag,
    QuietFlag,
    as_json,
    log_console,
    print_json,
    print_table,
    progress_bar,
    require_extra,
    require_folder,
    size_text,
)
from ..options import number, one_of
from .export import COMPARE_MODULES

if TYPE_CHECKING:
    from omniport.calib import Goal, GoalReport, QuantizeReport

NAME = "quantize"
EXAMPLE = "omniport quantize bundle bundle-int8 --recipe int8 --calib model.calib"

#: what quantizing imports
QUANTIZE_MODULES = ("onnx", "onnx_ir", "ml_dtypes", "safetensors")


def command(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, as written by omniport export; it is only read.")],
    out: Annotated[Path, typer.Argument(help="Bundle folder to write.")],
    recipe: Annotated[
        str,
        one_of(
            RECIPES,
            help="int8: INT8 times INT8. w8: INT8 weights. int4: INT4 weights of thinker and talker. fp8: for SM89 and "
            "later. edge-8gb, edge-16gb: for boards of that memory. See docs/quantize.md.",
        ),
    ],
    calib: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Calibration of the bundle's checkpoint, as written by omniport calibrate. int8, fp8 and the edge "
            "recipes need one; w8 and int4 lose less with one if a model has outliers.",
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="REGEX", help="Leave weights whose GRAPH/WEIGHT name holds this as they are; repeatable."),
    ] = None,
    graph_recipe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GRAPH=RECIPE", help="Give one graph another recipe, or none, or the precision it has; repeatable."
        ),
    ] = None,
    target_sqnr: Annotated[
        float | None,
        number("DB", help="Keep as few parts of thinker and talker as give their logits this SQNR."),
    ] = None,
    max_kl: Annotated[
        float | None,
        number("NATS", help="As --target-sqnr, by the divergence of the choice of the next token."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="JSONL", help="Conversations that a target is measured on; built-in ones without it."),
    ] = None,
    curve: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what a target cost, point by point, as JSON.")
    ] = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Quantize a bundle.

    Writes one more standard bundle, which runs, validates and builds like the one it was made from. With a target,
    parts of thinker and talker are measured one by one and the worst stay as they are.
    """
    chosen = graph_choices(graph_recipe or [])
    goal = _goal(target_sqnr, max_kl, data, curve)
    require_extra("export", *QUANTIZE_MODULES)
    from omniport import calib as library

    options: dict[str, Any] = {"keep": keep or (), "graph_recipes": chosen}
    options["calibration"] = None if calib is None else library.Calibration.load(calib)
    found: GoalReport | None = None
    with progress_bar(quiet or json) as progress:
        if goal is None:
            report = library.quantize(bundle, out, recipe, progress=progress, **options)
        else:
            require_extra("export", *COMPARE_MODULES)
            found = library.quantize_to_goal(bundle, out, recipe, goal, data=data, progress=progress, **options)
            report = found.written
    if found is not None and curve is not None:
        _write_curve(curve, found)
    if json:
        print_json(as_json(report) | ({} if found is None else {"search": found.as_json()}))
        return
    _print(report)
    if found is not None:
        _print_search(found)
    log_console(quiet).print(f"Next: omniport run {report.path} --text 'Hello' --speak reply.wav", markup=False)


def _print(report: QuantizeReport) -> None:
    rows = (
        (
            row.name,
            row.precision,
            ", ".join(f"{count} {name}" for name, count in sorted(row.weights.items())) or "-",
            size_text(row.bytes_before),
            size_text(row.bytes_after),
            f"{row.bytes_after / row.bytes_before:.2f}",
        )
        for row in report.graphs
    )
    columns = ("graph", "precision", "weights", "before", "after", "ratio")
    print_table(f"Quantized to {report.path} ({report.recipe})", columns, rows)


def _goal(sqnr: float | None, kl: float | None, data: Path | None, curve: Path | None) -> Goal | None:
    """The goal asked for; None without one.

    Raises:
        UsageError: two goals, or options that go with one.
    """
    from omniport.runtime.errors import UsageError

    if sqnr is None and kl is None:
        if data is not None or curve is not None:
            raise UsageError("--data and --curve go with --target-sqnr or --max-kl: nothing is measured without")
        return None
    require_folder(curve)
    from omniport.calib import Goal

    return Goal(sqnr, kl)


def _write_curve(path: Path, found: GoalReport) -> None:
    import json

    from omniport.runtime.system.files import write_output

    write_output(path, json.dumps(found.as_json(), indent=1).encode() + b"\n")


def _print_search(found: GoalReport) -> None:
    rows = []
    for name, result in found.searches.items():
        loss = found.reached[name]
        kept = ", ".join(result.kept) or "-"
        shown = (f"{loss.sqnr_db:.1f}", f"{loss.kl:.3g}", f"{loss.agreement:.0%}")
        rows.append((name, f"{len(result.kept)} of {len(result.damages)}", *shown, kept))
    columns = ("decoder", "parts kept", "SQNR dB", "KL", "same choice", "kept")
    print_table(f"Target: {found.goal}", columns, rows)


def graph_choices(texts: list[str]) -> dict[str, str]:
    """``GRAPH=RECIPE`` arguments as a mapping.

    Raises:
        UsageError: not of that form, no such graph, or a graph named twice.
    """
    from omniport.runtime.bundle.parts import PARTS
    from omniport.runtime.errors import UsageError

    chosen: dict[str, str] = {}
    for text in texts:
        graph, equals, wanted = text.partition("=")
        if not equals or not wanted or graph not in PARTS or graph in chosen:
            raise UsageError(
                f"--graph-recipe {text!r}: GRAPH=RECIPE was expected, each graph once; graphs: {', '.join(PARTS)}"
            )
        chosen[graph] = wanted
    return chosen
