"""Every number of a JSON value, one after the other: for tests that each of them has a range."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any


def numbers(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where numbers stand: the keys and indices that lead there."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from numbers(inner, (*where, key))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield where


def changed(value: Any, where: tuple[Any, ...], number: Any) -> Any:
    """A copy with another number there."""
    value = copy.deepcopy(value)
    inner = value
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = number
    return value
