"""omniport start"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..common import JsonFlag, QuietFlag, as_json, log_console, print_json, print_table, progress_bar

if TYPE_CHECKING:
    from omniport.calib.deployment.on_device import StartReport

NAME = "start"
EXAMPLE = "omniport start bundle"


def command(
    bundle: Annotated[Path, typer.Argument(help="Folder that omniport deploy wrote, on the device it is for.")],
    check_only: Annotated[
        bool, typer.Option("--check-only", help="Build and check, and do not talk; --json prints what was measured.")
    ] = False,
    text_only: Annotated[bool, typer.Option("--text-only", help="Show replies and do not speak them.")] = False,
    input_wav: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Hear this recording, in real time, in place of a microphone.")
    ] = None,
    output_wav: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what would have been played into this file.")
    ] = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Start a deployed bundle on its device: build what is missing, check, then talk.

    The check is a short spoken reply, shown beside what was planned. omniport talk has more options.
    """
    from omniport.calib.deployment.on_device import prepare

    with progress_bar(quiet or json) as progress:
        report = prepare(bundle, progress)
    if json and check_only:
        print_json(as_json(report))
    elif not json:
        _print(report, bundle, quiet)
    if not check_only:
        from ..talk.command import command as talk

        talk(bundle, text_only=text_only, input_wav=input_wav, output_wav=output_wav, json=json, quiet=quiet)


def _print(report: StartReport, bundle: Path, quiet: bool) -> None:
    for name in report.built:
        log_console(quiet).print(f"built {name}", markup=False)
    title = f"{bundle} on {report.reply.backend}"
    print_table(title, ("what", "planned", "measured"), report.compared)
