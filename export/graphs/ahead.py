"""Prefetch the next item of an iterable on a background thread."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The same items; a thread of its own makes the next one meanwhile. What it raises is raised in the item's place.

    Worth it where making and using them leave the interpreter: reading files, and torch's or numpy's work on large
    arrays. Two items are held at a time.
    """
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="omniport-read") as pool:
        pending = pool.submit(next, items, end)
        while (item := pending.result()) is not end:
            pending = pool.submit(next, items, end)
            yield item  # type: ignore[misc]
