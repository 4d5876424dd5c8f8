"""Prefetch the next item of an iterable on a background thread."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """Yield the same items while a background thread makes the next one. Its exceptions are raised in the item's place.

    Worth it where making and using them leave the interpreter: reading files, and torch's or numpy's work on large
    arrays. Two items are held at a time.
    """
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="omniport-read") as pool:
        pending = pool.submit(next, items, end)
        while (item := pending.result()) is not end:
            pending = pool.submit(next, items, end)
            yield item  # type: ignore[misc]
