"""omniport make-checkpoint"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from omniport.export.synthetic.geometries import SIZES

from ..common import JsonFlag, QuietFlag, log_console, print_json, progress_bar, require_extra, size_text
from ..options import one_of

NAME = "make-checkpoint"
EXAMPLE = "omniport make-checkpoint tiny-omni --size tiny --seed 0"


def command(
    out: Annotated[Path, typer.Argument(help="Folder to make; it must not exist or be empty.")],
    size: Annotated[
        str,
        one_of(
            SIZES,
            help="tiny: under 10 M parameters. small: the 3B's layer widths, 4 layers a stack, about 1.4 B. "
            "3b, 7b: the geometry of the published models, 12 and 22 GB.",
        ),
    ] = "tiny",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random weights.")] = 0,
    outliers: Annotated[
        bool, typer.Option("--outliers", help="Plant large activation channels and K biases, as real checkpoints have.")
    ] = False,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Make a checkpoint with random weights.

    It has the exact Hugging Face layout of Qwen2.5-Omni and serves tests and benchmarks. Random weights speak
    noise: the checkpoint shows that everything runs, and how fast, not what the model can say.
    """
    require_extra("export", "torch", "safetensors", "tokenizers")
    from omniport.export.synthetic.make_checkpoint import make_checkpoint

    with progress_bar(quiet or json) as progress:

        def advance(_: str, done: int, total: int) -> None:  # the library names every tensor
            progress("writing weights", done, total)

        path = make_checkpoint(out, size, seed=seed, outliers=outliers, progress=advance)
    files = [file for file in path.rglob("*") if file.is_file()]
    total = sum(file.stat().st_size for file in files)
    if json:
        print_json(
            {
                "path": str(path),
                "size": size,
                "seed": seed,
                "outliers": outliers,
                "files": len(files),
                "bytes": total,
            }
        )
        return
    typer.echo(path)
    log_console(quiet).print(f"{len(files)} files, {size_text(total)}. Next: omniport export {path} bundle")
