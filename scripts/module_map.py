"""The map of packages in docs/design.md and of all modules in docs/modules.md, from the first lines of docstrings."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DESIGN = ROOT / "docs" / "design.md"
MODULES = ROOT / "docs" / "modules.md"
#: in the order in which imports lead
FOLDERS = ("runtime", "serve", "export", "calib", "cli")

_START, _END = "<!-- packages: made by make docs -->\n", "<!-- end of packages -->\n"
_INTRO = """# Modules

Made by `make docs` from the first line of every module: do not edit by hand. [design.md](design.md) says how they work
together.
"""


def packages() -> dict[str, list[Path]]:
    """Folder -> its modules, packages before what they hold."""
    found: dict[str, list[Path]] = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py"), key=lambda path: (path.parent.parts, path.name)):
            found.setdefault(path.parent.relative_to(ROOT).as_posix(), []).append(path)
    return found


def opening(path: Path) -> str:
    """First sentence of a module's docstring, without its full stop; empty if there is none."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(docstring.partition("\n\n")[0].split()).replace("``", "`")
    return re.split(r"(?<=[.])\s", paragraph)[0].rstrip(".")


def purpose(modules: list[Path]) -> str:
    """What a package is for: its own docstring, or that of the only module of a namespace package."""
    own = [path for path in modules if path.name == "__init__.py"]
    return opening((own or modules)[0])


def render_design(page: str) -> str:
    """docs/design.md with its table of packages made anew.

    Raises:
        ValueError: the page has no place for the table.
    """
    head, start, rest = page.partition(_START)
    _, end, tail = rest.partition(_END)
    if not (start and end):
        raise ValueError(f"{DESIGN.name} has no place for the table: {_START!r} and {_END!r} were expected")
    rows = [f"| `{folder}/` | {purpose(modules)} |" for folder, modules in packages().items()]
    return head + start + "\n".join(["| package | holds |", "|---|---|", *rows]) + "\n" + end + tail


def render_modules() -> str:
    """docs/modules.md."""
    parts = [_INTRO]
    for folder, modules in packages().items():
        lines = [f"- `{path.name}`: {opening(path)}" for path in modules if path.name != "__init__.py"]
        parts.append("\n".join([f"## {folder}", "", purpose(modules) + ".", "", *lines]).rstrip() + "\n")
    return "\n".join(parts)
