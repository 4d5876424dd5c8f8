"""omniport quantize"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import JsonFlag, QuietFlag, log_console, print_json, print_table, progress_bar, require_extra, size_text

if TYPE_CHECKING:
    from omniport.calib.quantize import QuantizeReport

__all__ = ["EXAMPLE", "NAME", "RecipeName", "command", "graph_choices", "report_dict"]

NAME = "quantize"
EXAMPLE = "omniport quantize bundle bundle-int8 --recipe int8 --calib model.calib"

#: what quantizing imports
QUANTIZE_MODULES = ("onnx", "onnx_ir", "ml_dtypes", "safetensors")


class RecipeName(str, Enum):
    """A recipe of omniport.calib.recipe."""

    int8 = "int8"
    w8 = "w8"
    int4 = "int4"
    fp8 = "fp8"
    edge_8gb = "edge-8gb"
    edge_16gb = "edge-16gb"
    int8_plain = "int8-plain"


def command(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, as written by omniport export; it is only read.")],
    out: Annotated[Path, typer.Argument(help="Bundle folder to write.")],
    recipe: Annotated[
        RecipeName,
        typer.Option(
            help="int8: INT8 times INT8. w8: INT8 weights. int4: INT4 weights of thinker and talker. fp8: for SM89 and "
            "later. edge-8gb, edge-16gb: for boards of that memory. See docs/quantize.md."
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
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Quantize a bundle.

    Writes one more standard bundle, which runs, validates and builds like the one it was made from.
    """
    chosen = graph_choices(graph_recipe or [])
    require_extra("export", *QUANTIZE_MODULES)
    from omniport.calib.calibration import Calibration
    from omniport.calib.quantize import quantize_bundle

    calibration = None if calib is None else Calibration.load(calib)
    with progress_bar(quiet or json) as progress:
        report = quantize_bundle(
            bundle,
            out,
            recipe.value,
            keep=keep or (),
            graph_recipes=chosen,
            calibration=calibration,
            progress=progress,
        )
    if json:
        print_json(report_dict(report))
        return
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
    log_console(quiet).print(f"Next: omniport run {report.path} --text 'Hello' --speak reply.wav", markup=False)


def graph_choices(texts: list[str]) -> dict[str, str]:
    """``GRAPH=RECIPE`` arguments as a mapping.

    Raises:
        UsageError: not of that form, no such graph, or a graph named twice.
    """
    from omniport.runtime.errors import UsageError
    from omniport.runtime.graphs import GRAPH_NAMES

    chosen: dict[str, str] = {}
    for text in texts:
        graph, equals, wanted = text.partition("=")
        if not equals or not wanted or graph not in GRAPH_NAMES or graph in chosen:
            raise UsageError(
                f"--graph-recipe {text!r}: GRAPH=RECIPE was expected, each graph once; graphs: {', '.join(GRAPH_NAMES)}"
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
