"""A bounded queue between two workers of a reply, with back-pressure; cancelling wakes both ends."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

from .cancel import CancelToken

T = TypeVar("T")


class Channel(Generic[T]):
    """Items in order, from one or more senders to one receiver, who iterates over them.

    Args:
        capacity: items that wait at most; None for no bound.
        token: when it is set, sending and receiving raise Cancelled.
        senders: how many of them call ``close`` before the channel ends.

    Attributes:
        waited: seconds that the receiver waited for items.
    """

    def __init__(self, capacity: int | None, token: CancelToken, senders: int = 1) -> None:
        self.waited = 0.0
        self._capacity = capacity
        self._token = token
        self._senders = senders
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        token.subscribe(self._wake)

    def send(self, item: T) -> float:
        """Append an item, once there is room; gives the seconds that it waited for that."""
        with self._changed:
            start = time.perf_counter()
            self._changed.wait_for(lambda: self._token.cancelled or not self._full())
            waited = time.perf_counter() - start
            self._token.check()
            self._items.append(item)
            self._changed.notify_all()
            return waited

    def close(self) -> None:
        """One sender is done. The only one may say so again."""
        with self._changed:
            self._senders -= 1
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        with self._changed:
            start = time.perf_counter()
            self._changed.wait_for(lambda: self._token.cancelled or self._items or self._senders < 1)
            self.waited += time.perf_counter() - start
            self._token.check()
            if not self._items:
                raise StopIteration
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def _full(self) -> bool:
        return self._capacity is not None and len(self._items) >= self._capacity

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
