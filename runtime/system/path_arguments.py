"""Paths that callers give: of the wrong type they are refused where they come in, with their argument's name."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

from ..errors import UsageError

_P = ParamSpec("_P")
_R = TypeVar("_R")

_PATH = "str | os.PathLike[str]"


def paths_checked(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A function whose arguments that are annotated ``str | os.PathLike[str]`` are checked at every call.

    With ``| None`` they may be None; with ``Sequence[...]`` around it they are several.

    Raises:
        UsageError: by the call, of another type; the message names the argument.
    """
    signature = inspect.signature(function)  # annotations are strings, see PEP 563
    kinds = {name: str(item.annotation) for name, item in signature.parameters.items()}
    kinds = {name: kind for name, kind in kinds.items() if _PATH in kind}

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:  # the call below says it better
            given = {}
        for name, kind in kinds.items():
            if name in given:
                _check(name, given[name], kind)
        return function(*args, **kwargs)

    return checked


def _check(name: str, value: object, kind: str) -> None:
    if value is None and kind.endswith("| None"):
        return
    if kind.startswith("Sequence["):
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            raise UsageError(f"{name} is {_named(value)}; a list of paths was expected")
        for item in value:
            _check(name, item, _PATH)
    elif not _is_path(value):
        raise UsageError(f"{name} is {_named(value)}; a path was expected: a string or a pathlib.Path")


def _is_path(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, os.PathLike) and isinstance(os.fspath(value), str))


def _named(value: object) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"
