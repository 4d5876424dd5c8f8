"""omniport ranges"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..common import JsonFlag, QuietFlag, log_console, print_json, print_table, progress_bar, require_extra
from ..options import number
from .export import COMPARE_MODULES

if TYPE_CHECKING:
    from omniport.runtime.bundle.activation_ranges import Ranges

NAME = "ranges"
EXAMPLE = "omniport ranges bundle-fp32 ranges.json --data messages.jsonl"


def command(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, exported with --precision fp32.")],
    out: Annotated[
        Path | None,
        typer.Argument(help="File to write, or bundle to put ranges.json into; BUNDLE if left out."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help='JSON lines with "messages"; without it, built-in samples of each modality.'),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Text tokens of a reply at most.")] = 64,
    max_speech: Annotated[float, number("SECONDS", 0.1, help="Seconds of speech of a reply at most.")] = 4.0,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Measure activation ranges.

    FP32 graphs answer conversations in ONNX Runtime on the CPU; the largest magnitude of every value is kept.
    omniport export --precision fp16 --ranges FILE then leaves in FP32 what FP16 cannot hold.
    """
    require_extra("export", *COMPARE_MODULES)
    from omniport.export.evaluation.measure_ranges import measure_ranges, store_ranges
    from omniport.runtime.bundle.activation_ranges import encode_ranges
    from omniport.runtime.bundle.reader import MANIFEST_FILE
    from omniport.runtime.errors import UsageError
    from omniport.runtime.system.files import write_output

    target = bundle if out is None else out
    if target.is_dir() and not (target / MANIFEST_FILE).exists():
        raise UsageError(f"{target} is a folder without a bundle; name a file to write, or a bundle")
    if not target.is_dir() and not target.absolute().parent.is_dir():
        raise UsageError(f"{target.parent} is not a folder; make it first, or choose another place")
    with progress_bar(quiet or json) as progress:
        ranges = measure_ranges(
            bundle,
            data=data,
            max_new_tokens=max_new_tokens,
            max_codes=max(1, round(max_speech * 50)),
            progress=progress,
        )
    if target.is_dir():
        path = store_ranges(target, ranges)
    else:
        path = target
        write_output(path, encode_ranges(ranges))
    if json:
        print_json(_facts(ranges, path))
        return
    facts = _facts(ranges, path)
    rows = [
        (name, f["values"], f"{f['largest']:.4g}", f["at"], len(f["overflowing"]))
        for name, f in facts["graphs"].items()
    ]
    print_table(f"Ranges in {path}", ("graph", "values", "largest", "at", "too large for FP16"), rows)
    log_console(quiet).print(f"Next: omniport export CHECKPOINT OUT --precision fp16 --ranges {path}", markup=False)


def _facts(ranges: Ranges, path: Path) -> dict[str, Any]:
    """What ``--json`` prints."""
    from omniport.runtime.bundle.activation_ranges import FLOAT16_MAX, MARGIN, limit

    graphs = {}
    for name, values in ranges.graphs.items():
        at = max(values, key=lambda key: values[key])
        over = sorted(key for key, top in values.items() if top > limit())
        graphs[name] = {"values": len(values), "largest": values[at], "at": at, "overflowing": over}
    return {
        "path": str(path),
        "samples": list(ranges.samples),
        "float16_max": FLOAT16_MAX,
        "margin": MARGIN,
        "graphs": graphs,
    }
