"""Imports go one way: cli -> calib -> export -> runtime, and no modules import each other in a circle.

Counted is every import that stands in the text: at the top, in functions and under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest
from support.paths import REPOSITORY

#: each may import itself and what follows it
LAYERS = ("cli", "calib", "export", "runtime")

#: to be broken: what guards a backend belongs beside the backends
KNOWN = [["runtime.concurrency.cancel", "runtime.concurrency.schedule"]]

Graph = Mapping[str, set[str]]


def module_name(path: Path) -> str:
    """``runtime.speech.ode`` of runtime/speech/ode.py; a package's name of its ``__init__.py``."""
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def sources() -> dict[str, Path]:
    """Product modules by name."""
    return {module_name(path): path for layer in LAYERS for path in sorted((REPOSITORY / layer).rglob("*.py"))}


def imports(tree: ast.AST, package: str) -> Iterator[tuple[str, str]]:
    """(module, name imported from it or nothing) of every import of omniport's, wherever it stands."""
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


def import_graph() -> Graph:
    """Module -> the product modules that it names in an import."""
    files = sources()
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        graph[name] = set()
        for module, imported in imports(ast.parse(path.read_text()), package):
            found = f"{module}.{imported}".strip(".")
            graph[name].add(found if found in files else module)
        graph[name] -= {name}
    return graph


def circles(graph: Graph) -> list[list[str]]:
    """Groups of two and more that reach each other (Tarjan's strongly connected components)."""
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
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def upward(graph: Graph, layers: Iterable[str] = LAYERS) -> list[str]:
    """Imports of a layer from one above it."""
    order = list(layers)
    return [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in sorted(others)
        if order.index(other.partition(".")[0]) < order.index(name.partition(".")[0])
    ]


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert [circle for circle in circles(import_graph()) if circle not in KNOWN] == []


def test_imports_go_one_way() -> None:
    assert upward(import_graph()) == []


def test_every_import_is_of_a_module_that_exists() -> None:
    files = sources()
    unknown = [f"{name} imports {other}" for name, others in import_graph().items() for other in others - files.keys()]
    assert unknown == []


def test_the_walk_sees_imports_wherever_they_stand() -> None:
    text = (
        "import omniport.export.devices.detect\ndef f():\n    from .catalog import TARGETS\n    from .. import exporter"
    )
    assert set(imports(ast.parse(text), "export.devices")) == {
        ("export.devices.detect", ""),
        ("export.devices.catalog", "TARGETS"),
        ("export", "exporter"),
    }
    graph = import_graph()
    assert "runtime.session" in graph["runtime"], "under TYPE_CHECKING"
    assert "runtime.session" in graph["runtime.live.dialogue"]
    assert "export.exporter" in graph["cli.commands.export"], "in a function"


@pytest.mark.parametrize(
    ("graph", "found"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}, [["a", "b", "c"]]),
        ({"a": {"b", "c"}, "b": {"c"}, "c": set()}, []),
    ],
)
def test_circles_are_found(graph: Graph, found: list[list[str]]) -> None:
    assert circles(graph) == found


def test_an_import_from_a_layer_above_is_found() -> None:
    assert upward({"runtime.a": {"export.b"}, "cli.c": {"runtime.a"}}) == ["runtime.a imports export.b"]
