"""Shared by the commands: flags, consoles, progress bars, tables, checks for optional packages."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
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


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text as a terminal may have it: control characters of files, names and replies are spelled, but for tab and line
    feed. Whatever the program prints goes through here; only what it draws itself (colours, bars) does not.
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def print_line(line: object, err: bool = False) -> None:
    """One line on stdout or stderr; the lines after a line feed are indented, so that none can pass for another."""
    typer.echo(printable(str(line)).replace("\n", "\n  "), err=err)


def print_text(text: str) -> None:
    """A piece of a reply on stdout, at once."""
    sys.stdout.write(printable(text))
    sys.stdout.flush()


def log_console(quiet: bool = False) -> Console:
    """Console for progress and log lines: stderr, or nothing at all when ``quiet``."""
    from rich.console import Console

    class PrintableConsole(Console):
        def print(self, *objects: Any, **options: Any) -> None:
            super().print(*(printable(o) if isinstance(o, str) else o for o in objects), **options)

    return PrintableConsole(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)


def set_up_streams() -> None:
    """Let no character end a reply: what the stream's encoding does not hold is spelled (``\\u4f60``).

    Streams that the caller closed take everything, and say nothing: else the first file that is opened gets their
    number, and whatever a library prints.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  for as long as the process
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def as_json(value: Any) -> Any:
    """Records and paths as plain JSON values."""
    import msgspec

    return msgspec.to_builtins(value, enc_hook=os.fspath)


def print_json(value: Any) -> None:
    """One JSON document on one line of stdout, flushed so that a reader at a pipe sees it at once."""
    print_json_text(json.dumps(as_json(value), ensure_ascii=False) + "\n")


def print_json_text(document: str) -> None:
    """JSON on stdout: characters that its encoding lacks are escaped as JSON escapes them."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
    risky = _CONTROL if unicode else re.compile(r"[^\x00-\x7e]")  # the document's own characters are all ASCII
    sys.stdout.write(risky.sub(lambda found: json.dumps(found[0])[1:-1], document))
    sys.stdout.flush()


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on stdout. Columns whose cells are all numbers or sizes are the caller's business: everything is text."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=printable(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        # Text, not str: names like [C,50,H] are data, not markup
        table.add_row(*(Text(printable(str(cell))) for cell in row))
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
            bar.update(task, description=printable(stage), completed=done, total=total)

        yield update


def require_extra(extra: str, *modules: str) -> None:
    """Check that optional packages are installed, without importing them.

    Raises:
        ExportError: naming the pip extra that brings what is missing.
    """
    missing = [name for name in modules if not _is_there(name)]
    if missing:
        from omniport.runtime.backends.onnxruntime.packages import wanted_extra
        from omniport.runtime.errors import ExportError

        if "onnxruntime" in missing:  # no extra brings it along: a machine with a GPU wants another package
            extra = wanted_extra() if missing == ["onnxruntime"] else f"{extra},{wanted_extra()}"
        raise ExportError(
            f"this command needs {', '.join(missing)}, not installed here: pip install 'omniport[{extra}]'"
        )


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it is in
        return False


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
