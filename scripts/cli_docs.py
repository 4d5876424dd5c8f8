"""docs/cli.md from the command line's own definitions: from the parameters and not from ``--help`` output.

So the page does not change with typer's version.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

from omniport.cli.main import app
from typer.models import ArgumentInfo, OptionInfo

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"

INTRO = """# Command line

Made by `make docs` from the code in `cli/`: do not edit by hand.

Results go to stdout, progress and log lines to stderr. `--json` prints JSON for machines; `--quiet` silences stderr.

| exit code | meaning |
|---|---|
| 0 | it worked |
| 1 | a check ran and did not hold |
| 2 | bad input or usage: one line says what to do, no traceback |
| 101 | a bug in omniport: the traceback is kept, and a line says how to report it |
| 130 | interrupted with Ctrl-C |
| 143 | terminated; as with Ctrl-C, half-written files are removed |
"""


def render() -> str:
    """The whole page."""
    parts = [INTRO]
    for info in app.registered_commands:
        assert info.name is not None
        assert info.callback is not None
        parts.append(_command(info.name, info.callback, info.epilog or ""))
    return "\n".join(parts)


def _command(name: str, function: Callable[..., Any], epilog: str) -> str:
    hints = typing.get_type_hints(function, include_extras=True)
    arguments, options = [], []
    for parameter in inspect.signature(function).parameters.values():
        kind, info = typing.get_args(hints[parameter.name])[:2]
        if isinstance(info, ArgumentInfo):
            needed = parameter.default is inspect.Parameter.empty
            arguments.append((parameter.name.upper(), needed, info.help or ""))
        elif isinstance(info, OptionInfo):
            options.append(_option(parameter, kind, info))
    usage = " ".join(["omniport", name, *(n if needed else f"[{n}]" for n, needed, _ in arguments), "[OPTIONS]"])
    lines = [f"## omniport {name}", "", inspect.cleandoc(function.__doc__ or ""), "", "```sh", usage, "```", ""]
    lines += ["| argument or option | default | meaning |", "|---|---|---|"]
    lines += [f"| `{n}` | {'required' if needed else ''} | {text} |" for n, needed, text in arguments]
    lines += [f"| `{option}` | {default} | {text} |" for option, default, text in options]
    lines += ["", "Example:", "", "```sh", epilog.removeprefix("Example: "), "```", ""]
    return "\n".join(lines)


def _option(parameter: inspect.Parameter, kind: Any, info: OptionInfo) -> tuple[str, str, str]:
    # in Annotated, typer keeps the first declared name in the field called default
    declared = [name for name in (info.default, *(info.param_decls or ())) if isinstance(name, str)]
    names = ", ".join(declared) or f"--{parameter.name.replace('_', '-')}"
    default = parameter.default
    if kind is bool and not declared:  # typer gives a flag without names its negative as well
        names += f" / --no-{parameter.name.replace('_', '-')}"
    elif kind is not bool:
        names += f" {info.metavar or _kind_text(kind)}"
    shown = default.value if isinstance(default, Enum) else default
    if default is inspect.Parameter.empty:
        text = "required"
    elif default in (None, "") or (kind is bool and declared):
        text = ""
    elif kind is bool:
        text = "on" if default else "off"
    else:
        text = f"`{shown}`"
    # a bar would end the table's cell
    return names.replace("|", "\\|"), text, info.help or ""


def _kind_text(kind: Any) -> str:
    inner = [part for part in typing.get_args(kind) if part is not type(None)]
    if inner:
        kind = inner[0]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(str(member.value) for member in kind)
    return {int: "N", float: "SECONDS", str: "TEXT", Path: "FILE"}[kind]
