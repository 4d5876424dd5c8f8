"""Shared by the commands: flags, consoles, progress bars, tables, checks for optional packages."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from omniport.runtime.system.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of text.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress and no log lines on stderr.")]


#: table width where stdout is a pipe or a file: no row is folded for a terminal that is not there
PIPE_WIDTH = 160


def log_console(quiet: bool = False) -> Console:
    """Console for progress and log lines: stderr, or nothing at all when ``quiet``."""
    from rich.console import Console

    return Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)


def as_json(value: Any) -> Any:
    """Records and paths as plain JSON values."""
    import msgspec

    return msgspec.to_builtins(value, enc_hook=os.fspath)


def print_json(value: Any) -> None:
    """One JSON document on one line of stdout, flushed so that a reader at a pipe sees it at once."""
    sys.stdout.write(json.dumps(as_json(value), ensure_ascii=False) + "\n")
    sys.stdout.flush()


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on stdout. Columns whose cells are all numbers or sizes are the caller's business: everything is text."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        # Text, not str: names like [C,50,H] are data, not markup
        table.add_row(*(Text(str(cell)) for cell in row))
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False).print(table)


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Progress]:
    """Show the library's ``progress(stage, done, total)`` on stderr.

    A terminal gets one bar, whatever the units; a log file gets one line per stage.
    """
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = log_console(quiet)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    current: list[str] = []
    with Bar(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=None)

        def update(stage: str, done: int, total: int) -> None:
            if not console.is_terminal and [stage] != current:
                console.print(stage, markup=False)
            current[:] = [stage]
            bar.update(task, description=stage, completed=done, total=total)

        yield update


def require_extra(extra: str, *modules: str) -> None:
    """Check that optional packages are installed, without importing them.

    Raises:
        ExportError: naming the pip extra that brings what is missing.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        from omniport.runtime.errors import ExportError

        raise ExportError(
            f"this command needs {', '.join(missing)}, not installed here: pip install 'omniport[{extra}]'"
        )


def require_folder(*paths: Path | None) -> None:
    """Find out now, and not after minutes of work, that a file cannot be written. None and ``-`` (stdout) are fine.

    Raises:
        UsageError: a path is a folder, or lies in one that is not there.
    """
    for path in paths:
        if path is not None and str(path) != "-" and (path.is_dir() or not path.absolute().parent.is_dir()):
            from omniport.runtime.errors import UsageError

            raise UsageError(f"cannot write {path}: it is a folder, or there is no folder {path.parent}; name a file")


def size_text(size: int) -> str:
    """Bytes as people read them: ``1.2 GB`` (powers of ten)."""
    from rich.filesize import decimal

    return decimal(size)
