"""Functions that others call take few arguments by position: what comes after the first six has a name at the call."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

MOST = 6

Function = tuple[str, Callable[..., Any], bool]
"""(name, what is called, whether its first parameter is the object)"""


def modules(package: str) -> Iterator[ModuleType]:
    """The package and every module in it."""
    root = importlib.import_module(package)
    yield root
    for found in pkgutil.walk_packages(root.__path__, f"{package}."):
        yield importlib.import_module(found.name)


def public(module: ModuleType) -> Iterator[Function]:
    """Functions, classes and their methods."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value) or inspect.isclass(value):
            yield name, value, False
        if inspect.isclass(value):
            for key, member in vars(value).items():
                function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
                if not key.startswith("_") and inspect.isfunction(function):
                    yield f"{name}.{key}", function, not isinstance(member, staticmethod)


def defined(package: str) -> list[Function]:
    """In any module of the package."""
    return [
        (f"{module.__name__}.{name}", function, bound)
        for module in modules(package)
        for name, function, bound in public(module)
    ]


def offered(package: str) -> list[Function]:
    """By the package itself, whatever module it comes from."""
    root = importlib.import_module(package)
    return [(name, value, False) for name in root.__all__ if callable(value := getattr(root, name))]


def positional(function: Callable[..., Any], bound: bool) -> int:
    """How many arguments it takes by position."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # a class of the interpreter's own
        return 0
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(by_position) - bound


@pytest.mark.parametrize(
    ("package", "listed"), [("omniport.runtime", defined), ("omniport.export", offered), ("omniport.calib", offered)]
)
def test_six_arguments_by_position_at_most(package: str, listed: Callable[[str], list[Function]]) -> None:
    counts = {name: positional(function, bound) for name, function, bound in listed(package)}
    assert counts
    assert not {name: count for name, count in counts.items() if count > MOST}


def test_the_count_sees_functions_classes_and_methods() -> None:
    @dataclass
    class Seven:
        a: int
        b: int
        c: int
        d: int
        e: int
        f: int
        g: int

        def method(self, a: int, b: int, *, c: int) -> None: ...

    module = ModuleType("sample")
    for value in (Seven, positional):
        value.__module__ = "sample"
        setattr(module, value.__name__, value)
    counts = {name: positional(function, bound) for name, function, bound in public(module)}
    assert counts == {"Seven": 7, "Seven.method": 2, "positional": 2}
    positional.__module__ = __name__
