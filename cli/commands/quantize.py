"""omniport quantize"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..common import (
    JsonFlag,
    QuietFlag,
    log_console,
    print_json,
    print_table,
    progress_bar,
    require_extra,
    size_text,
)
from ..options import one_of
from .export import EXPORT_MODULES

if TYPE_CHECKING:
    from omniport.calib.calibration_file import Calibration
    from omniport.calib.goal_quantizer import GoalReport
    from omniport.calib.quantizer import QuantizeReport
    from omniport.calib.search import Goal

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
            ("int8", "w8", "int4", "fp8", "edge-8gb", "edge-16gb", "int8-plain"),
            help="int8: INT8 times INT8. w8: INT8 weights. int4: INT4 weights of thinker and talker. fp8: for SM89 and "
            "later. edge-8gb, edge-16gb: for boards of that memory. See docs/quantize.md.",
        ),
    ],
    calib: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Calibration of the bundle's checkpoint, as written by omniport calibrate. int8, fp8 and the edge "
            "recipes need one; w8 and int4 lose less with one.",
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
        typer.Option(metavar="DB", help="Keep as few parts of thinker and talker as give their logits this SQNR."),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(metavar="NATS", help="As --target-sqnr, by the divergence of the choice of the next token."),
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
    calibration = _calibration(calib)
    with progress_bar(quiet or json) as progress:
        if goal is None:
            from omniport.calib.quantizer import quantize

            found, report = (
                None,
                quantize(
                    bundle,
                    out,
                    recipe,
                    keep=keep or (),
                    graph_recipes=chosen,
                    calibration=calibration,
                    progress=progress,
                ),
            )
        else:
            require_extra("export", *EXPORT_MODULES)
            from omniport.calib.goal_quantizer import quantize_to_goal

            found = quantize_to_goal(
                bundle,
                out,
                recipe,
                goal,
                keep=keep or (),
                graph_recipes=chosen,
                calibration=calibration,
                data=data,
                progress=progress,
            )
            report = found.written
    if found is not None and curve is not None:
        _write_curve(curve, found)
    if json:
        print_json(report_dict(report) | ({} if found is None else {"search": curve_dict(found)}))
        return
    _print(report)
    if found is not None:
        _print_search(found)
    log_console(quiet).print(f"Next: omniport run {report.path} --text 'Hello' --speak reply.wav", markup=False)


def _calibration(path: Path | None) -> Calibration | None:
    from omniport.calib.calibration_file import Calibration

    return None if path is None else Calibration.load(path)


def _print(report: QuantizeReport) -> None:
    rows = (
        (
            row.name,
            row.precision,
            ", ".join(f"{count} {name}" for name, count in sorted(row.schemes.items())) or "-",
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
    if curve is not None and not curve.absolute().parent.is_dir():
        raise UsageError(f"--curve {curve}: there is no folder {curve.parent}")
    from omniport.calib.search import Goal

    return Goal(sqnr, kl)


def curve_dict(found: GoalReport) -> dict[str, Any]:
    """The trade-off as plain JSON values."""
    from omniport.calib.goal_quantizer import curve_json

    return curve_json(found)


def _write_curve(path: Path, found: GoalReport) -> None:
    import json

    from omniport.export.validation.summary import write_file

    write_file(path, json.dumps(curve_dict(found), indent=1).encode() + b"\n")


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


def report_dict(report: QuantizeReport) -> dict[str, Any]:
    """The report as plain JSON values."""
    return {
        "path": str(report.path),
        "recipe": report.recipe,
        "seconds": round(report.seconds, 3),
        "graphs": [
            {
                "name": row.name,
                "precision": row.precision,
                "weights": dict(row.schemes),
                "bytes_before": row.bytes_before,
                "bytes_after": row.bytes_after,
                "seconds": round(row.seconds, 3),
            }
            for row in report.graphs
        ],
    }
