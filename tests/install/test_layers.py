"""Imports go one way: cli -> calib -> export -> runtime, cli -> serve -> runtime, and no modules import each other in a
circle.

Counted is every import that stands in the text: at the top, in functions and under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable

import pytest

from scripts.structure import Graph, circles, import_graph, imports

#: each may import itself and what follows it
LAYERS = ("cli", "calib", "export", "serve", "runtime")


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
    assert circles(import_graph()) == []


def test_imports_go_one_way() -> None:
    assert upward(import_graph()) == []


def test_only_the_command_line_imports_the_server() -> None:
    importers = {name for name, others in import_graph().items() if any(o.partition(".")[0] == "serve" for o in others)}
    assert {name.partition(".")[0] for name in importers} <= {"serve", "cli"}


def test_every_import_is_of_a_module_that_exists() -> None:
    graph = import_graph()
    unknown = [f"{name} imports {other}" for name, others in graph.items() for other in others - graph.keys()]
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
    assert "export.planning.picture" in graph["cli.commands.plan"], "in a function"


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
