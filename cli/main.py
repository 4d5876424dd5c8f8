"""Entry point of the command line: assembles the commands, and turns errors into messages and exit codes.

Exit codes: 0 ok, 1 a check failed, 2 bad input or usage, 101 a bug in omniport, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, NoReturn, TextIO

import typer

from .commands import (
    bench,
    build,
    calibrate,
    deploy,
    doctor,
    export,
    inspect,
    make_checkpoint,
    plan,
    quant_report,
    quantize,
    ranges,
    say,
    serve,
    start,
    targets,
    validate,
    voices,
)
from .commands import run as run_command
from .common import print_line, set_up_streams
from .talk import command as talk

EXIT_BUG = 101
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

HELP = "Port Qwen2.5-Omni to ONNX and stream text and speech from it on small machines."

# One plain style everywhere: the same help in a terminal, in a log and in docs/cli.md; tracebacks stay Python's own.
app = typer.Typer(
    name="omniport",
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: omniport doctor",
)

for _module in (
    make_checkpoint,
    export,
    ranges,
    calibrate,
    quantize,
    quant_report,
    validate,
    bench,
    build,
    targets,
    plan,
    deploy,
    start,
    inspect,
    voices,
    run_command,
    say,
    talk,
    serve,
    doctor,
):
    _kind = getattr(_module, "COMMAND", None)  # other than Typer's own
    app.command(_module.NAME, cls=_kind, epilog=f"Example: {_module.EXAMPLE}")(_module.command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"omniport {version('omniport')}")
        raise typer.Exit


@app.callback(help=HELP)
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options before the command."""


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Args:
        argv: arguments without the program name; the process's own by default.

    Raises:
        SystemExit: always, with one of the exit codes above.
    """
    try:
        _run(argv)
    except KeyboardInterrupt:  # while an error was told or handlers were put back: nothing is left to be undone
        sys.exit(EXIT_INTERRUPTED)


def _run(argv: Sequence[str] | None) -> NoReturn:
    # a polite kill unwinds the stack like Ctrl-C does, so that half-written files are removed
    set_up_streams()
    stop = _Stop()
    handlers = {signal.SIGTERM: stop.terminated}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        handlers[signal.SIGINT] = stop.interrupted
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        try:
            app(args=None if argv is None else list(argv), prog_name="omniport")
        finally:
            sys.stdout.flush()  # what is left of the output fails here, and not after the exit code is given
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:  # noqa: BLE001 - the one place where every failure becomes an exit code
        sys.exit(_report(error, stop.code))
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    sys.exit(0)


class _Stop:
    """What SIGINT and SIGTERM do, and the exit code of the one that came: ``code``.

    torch takes an exception from a handler, as every other that comes while it traces, for a reason to try in another
    way, and then fails with an error of its own.
    """

    def __init__(self) -> None:
        self.code: int | None = None

    def interrupted(self, *_: object) -> NoReturn:
        self.code = EXIT_INTERRUPTED
        raise KeyboardInterrupt

    def terminated(self, *_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not stop what the first has set going
        self.code = EXIT_TERMINATED
        sys.exit(EXIT_TERMINATED)


def _let_go(stream: TextIO) -> None:
    """Send a stream that cannot be written to nowhere: what it still holds would be tried again at exit."""
    try:
        stream.flush()
    except OSError:
        with suppress(OSError, ValueError):  # a test's stream has no number
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _report(error: Exception, stopped: int | None) -> int:
    """Tell the error; gives the exit code. ``stopped``: that of a signal that came before."""
    # imported here: --help and --version need none of the runtime
    from omniport.runtime.errors import OmniportError, UserError

    if isinstance(error, OmniportError):
        print_line(f"error: {error}", err=True)
        return error.exit_code
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        for stream in (sys.stdout, sys.stderr):
            _let_go(stream)
        with suppress(OSError):
            print_line(
                f"error: cannot write: {error.strerror}; free some space, or send the output elsewhere", err=True
            )
        return UserError.exit_code
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # from whatever looks at a path first
        print_line(f"error: {error.filename}: the name is too long; give a shorter path", err=True)
        return UserError.exit_code
    if stopped is not None:
        return stopped
    traceback.print_exception(error)
    sys.stderr.write(
        "\nThis is a bug in omniport. Please report it on the project's issue tracker with the traceback above, the "
        "command you ran and the output of: omniport doctor\n"
    )
    return EXIT_BUG
