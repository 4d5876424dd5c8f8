"""Paths of the wrong type are refused by every public function, before anything is done."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import omniport.calib
import omniport.export
import omniport.runtime
import pytest
from omniport.export.checkpoint.checkpoint import Checkpoint
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import UsageError
from omniport.runtime.system.path_arguments import paths_checked


class InBytes:
    """A path that is bytes."""

    def __fspath__(self) -> bytes:
        return b"folder"


WRONG = {"None": None, "int": 3, "bytes": b"folder", "list": ["folder"], "in bytes": InBytes(), "type": Path}


def _functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    yield "Bundle.open", Bundle.open
    yield "Checkpoint.open", Checkpoint.open
    for package in (omniport.runtime, omniport.export, omniport.calib):
        for name in package.__all__:
            value = getattr(package, name)
            if inspect.isfunction(value):
                yield name, value
            elif inspect.isclass(value):
                yield from ((f"{name}.{key}", m) for key, m in inspect.getmembers(value, inspect.ismethod))


CASES = {
    f"{name}, {argument}": (function, argument, str(parameter.annotation).endswith("None"))
    for name, function in _functions()
    for argument, parameter in inspect.signature(function).parameters.items()
    if "PathLike" in str(parameter.annotation)
}


@pytest.mark.parametrize(("function", "argument", "optional"), CASES.values(), ids=CASES.keys())
def test_paths_of_the_wrong_type(function: Callable[..., Any], argument: str, optional: bool) -> None:
    required = {
        name: "nowhere" if name != "bundles" else ["nowhere"]
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    }
    for name, value in WRONG.items():
        if not (optional and value is None) and (argument, name) != ("bundles", "list"):
            with pytest.raises(UsageError, match=rf"^{argument} is (None|of type \w+); a (path|list of paths) was"):
                function(**{**required, argument: value})


def test_every_way_in_is_among_them() -> None:
    some = {"OmniSession.open, path", "export_checkpoint, out", "deploy_plan, model", "Calibration.load, path"}
    assert some <= CASES.keys()
    assert len(CASES) >= 22


@paths_checked
def _sample(path: str | os.PathLike[str], *more: int, other: str | os.PathLike[str] | None = None) -> Any:
    """Documented."""
    return path, more, other


def test_what_is_right_passes_unchanged(tmp_path: Path) -> None:
    assert _sample("a", 1, other=tmp_path) == ("a", (1,), tmp_path)
    assert _sample(tmp_path) == (tmp_path, (), None)
    assert _sample.__doc__ == "Documented."
    with pytest.raises(TypeError, match=r"_sample\(\) missing 1 required positional argument: 'path'"):
        _sample()  # type: ignore[call-arg]
