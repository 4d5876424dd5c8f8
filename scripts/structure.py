"""Count the structure of the code at any revision: sizes, imports, part names, parameters, words.

Usage: python scripts/structure.py [REVISION ...]     # the working tree if none is named
       python scripts/structure.py --page             # docs/results/structure.md: the working tree beside 59a8a1c

An import counts wherever it stands: at the top, in a function, under TYPE_CHECKING. A chain counts its modules, a
circle as one. Parameters are all but self and cls. Literals are files with the name between double quotes.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
BEFORE = "59a8a1c"
PRODUCT = ("cli", "calib", "export", "serve", "runtime")
GROUPS = {"product": PRODUCT, "scripts and benchmarks": ("scripts", "benchmarks"), "tests": ("tests",)}
PARTS = ("audio_encoder", "vision_encoder", "thinker", "talker", "dit", "bigvgan")
LONG = 60

Graph = Mapping[str, set[str]]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def count(root: Path) -> dict[str, Any]:
    """Every figure of a checkout, by name."""
    files = {path: path.read_text(encoding="utf-8") for path in _sources(root, PRODUCT)}
    graph = import_graph(root)
    functions = [found for path, text in files.items() for found in _functions(path.relative_to(root), ast.parse(text))]
    parameters = sorted(len(_parameters(function)) for _, function, _ in functions)
    public = [(name, function) for name, function, shown in functions if shown and not name.startswith("cli/")]
    figures: dict[str, Any] = {}
    for group, folders in GROUPS.items():
        lines = [path.read_text(encoding="utf-8").count("\n") for path in _sources(root, folders)]
        figures |= {f"{group}: files": len(lines), f"{group}: lines": sum(lines)}
    modules = Counter(path.parent.relative_to(root).as_posix() for path in files)
    names = Counter(path.name for path in files if path.name != "__init__.py")
    return figures | {
        "lines of the longest product file": max(text.count("\n") for text in files.values()),
        "most modules in one folder": _most(modules),
        "module names used more than once": sum(number > 1 for number in names.values()),
        "files that share such a name": sum(number for number in names.values() if number > 1),
        "longest chain of imports": _chain(graph),
        "circles of imports": len(circles(graph)),
        **{f"files with the literal {part}": sum(f'"{part}"' in text for text in files.values()) for part in PARTS},
        "parameters, 90th percentile": parameters[int(0.9 * len(parameters))],
        "most parameters outside cli": _most({n: len(_parameters(f)) for n, f in public}),
        "most positional parameters outside cli, public": _most({n: len(_positional(f)) for n, f in public}),
        "lines of the longest function": _most({name: _length(f) for name, f, _ in functions}),
        f"functions over {LONG} lines": sum(_length(function) > LONG for _, function, _ in functions),
        "words of README.md": len((root / "README.md").read_text(encoding="utf-8").split()),
        "words of docs": sum(len(path.read_text(encoding="utf-8").split()) for path in (root / "docs").rglob("*.md")),
    }


def _sources(root: Path, folders: Sequence[str]) -> list[Path]:
    return [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]


def _most(counted: Mapping[str, int]) -> str:
    name = max(counted, key=lambda name: counted[name])
    return f"{counted[name]} ({name})"


# --- functions -------------------------------------------------------------------------------------------------------


def _functions(path: Path, tree: ast.AST, within: str = "", shown: bool = True) -> Iterator[tuple[str, Function, bool]]:
    """(file:name, function, whether it and all that it stands in is public)."""
    for node in ast.iter_child_nodes(tree):
        name, public = within, shown
        if isinstance(node, ast.ClassDef | Function):
            name, public = f"{within}.{node.name}".strip("."), shown and not node.name.startswith("_")
        if isinstance(node, Function):
            yield f"{path.as_posix()}:{name}", node, public
            public = False
        yield from _functions(path, node, name, public)


def _positional(function: Function) -> list[str]:
    names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def _parameters(function: Function) -> list[str]:
    arguments = function.args
    rest = [a.arg for a in (arguments.vararg, *arguments.kwonlyargs, arguments.kwarg) if a is not None]
    return [*_positional(function), *rest]


def _length(function: Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


# --- imports ---------------------------------------------------------------------------------------------------------


def import_graph(root: Path = ROOT) -> Graph:
    """Module -> the product modules that it names in an import."""
    files = {_module(path.relative_to(root)): path for path in _sources(root, PRODUCT)}
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found = imports(ast.parse(path.read_text(encoding="utf-8")), package)
        named = ((f"{module}.{thing}".strip("."), module) for module, thing in found)
        graph[name] = {full if full in files else module for full, module in named} - {name}
    return graph


def _module(path: Path) -> str:
    """``runtime.speech.ode`` of runtime/speech/ode.py; a package's name of its ``__init__.py``."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.AST, package: str) -> Iterator[tuple[str, str]]:
    """(module, name imported from it or nothing) of every import of omniport's in a module of this package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("omniport."):
                    yield alias.name.removeprefix("omniport."), ""
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").partition(".")[0] == "omniport"):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parts, *(node.module or "").removeprefix("omniport").strip(".").split(".")]).strip(".")
            for alias in node.names:
                yield module, alias.name


def circles(graph: Graph) -> list[list[str]]:
    """Groups of two and more that reach each other."""
    return [group for group in _components(graph) if len(group) > 1]


def _components(graph: Graph) -> list[list[str]]:
    """Tarjan's strongly connected components: each comes after those that it reaches."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            found.append(sorted(stack[at:]))
            del stack[at:]

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def _chain(graph: Graph) -> int:
    """Modules on the longest way along imports; a circle counts as one."""
    longest: dict[str, int] = {}
    for group in _components(graph):
        reached = {other for node in group for other in graph.get(node, ())} - set(group)
        longest |= dict.fromkeys(group, 1 + max((longest[other] for other in reached), default=0))
    return max(longest.values(), default=0)


# --- the command -----------------------------------------------------------------------------------------------------


def at_revision(revision: str) -> dict[str, Any]:
    """The figures of a commit."""
    packed = subprocess.run(["git", "-C", str(ROOT), "archive", revision], stdout=subprocess.PIPE, check=True).stdout
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
        return count(Path(folder))


def table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures side by side, in Markdown."""
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in next(iter(columns.values())):
        cells = [str(figures[name]) for figures in columns.values()]
        lines.append(f"| {name} | {' | '.join(f'{int(c):,}' if c.isdigit() else c for c in cells)} |")
    return "\n".join(lines) + "\n"


def page(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """docs/results/structure.md."""
    head = (
        "# The structure, counted\n\n"
        "Made by `python scripts/structure.py --page` from structure.json: do not edit by hand. An import counts\n"
        "wherever it stands: at the top, in a function, under TYPE_CHECKING. A chain counts its modules, a circle as\n"
        "one. Parameters are all but `self` and `cls`. *Literal*: the name between double quotes.\n\n"
    )
    return head + table(columns)


def main() -> None:
    """Count and print, or write the page."""
    parser = argparse.ArgumentParser(description="Count the structure of the code.")
    parser.add_argument("revisions", nargs="*", help="git revisions; the working tree by default")
    parser.add_argument("--page", action="store_true", help=f"write the page: the working tree beside {BEFORE}")
    options = parser.parse_args()
    if options.page:
        columns = {f"before ({BEFORE})": at_revision(BEFORE), "after": count(ROOT)}
        (RESULTS / "structure.json").write_text(json.dumps(columns, indent=1) + "\n", encoding="utf-8")
        (RESULTS / "structure.md").write_text(page(columns), encoding="utf-8")
        return
    columns = {revision: at_revision(revision) for revision in options.revisions} or {"working tree": count(ROOT)}
    sys.stdout.write(table(columns))


if __name__ == "__main__":
    main()
