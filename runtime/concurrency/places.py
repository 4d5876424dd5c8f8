"""Places for replies: so many are made at once, so many wait for it in their order, the others are refused at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ..errors import Busy, UsageError
from .cancel import CancelToken

#: of a reply in the average of the seconds that one holds its place
_WEIGHT = 0.2


class Places:
    """Places for the replies of a session and its forks.

    Args:
        count: replies that are made at once; None: any number.
        waiting: that wait at most.
        clock: seconds.

    Raises:
        UsageError: no such numbers.
    """

    def __init__(
        self, count: int | None = None, waiting: int = 0, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        for name, value, least in (("max_replies", count, 1), ("max_waiting", waiting, 0)):
            known = isinstance(value, int) and not isinstance(value, bool) and value >= least
            if not known and not (value is None and least):
                raise UsageError(f"{name} is {value!r}; a whole number of at least {least} was expected")
        self._count, self._most, self._clock = count, waiting, clock
        self._changed = threading.Condition()
        self._entered: set[Place] = set()  # those that wait or are made, and those that nobody has asked for events yet
        self._waiting: list[Place] = []
        self._running: dict[Place, float] = {}
        self._seconds = 1.0  # that a reply holds its place, on average over the last ones

    def enter(self, place: Place) -> None:
        """See ``Place.enter``."""
        with self._changed:
            if self._count is not None and len(self._entered - {place}) >= self._count + self._most:
                before = len(self._entered) - self._count + 1
                raise Busy(self._count, self._most, max(0.1, self._seconds * before / self._count))
            self._entered.add(place)

    def wait(self, place: Place, token: CancelToken) -> float:
        """See ``Place.wait``."""
        token.subscribe(self._wake)
        with self._changed:
            start = self._clock()
            self._waiting.append(place)
            try:
                free = self._is_next(place)
                self._changed.wait_for(lambda: token.cancelled or self._is_next(place))
                token.check()
                self._running[place] = self._clock()
            finally:
                self._waiting.remove(place)
                self._changed.notify_all()  # there may be a place for the next
            return 0.0 if free else self._clock() - start

    def leave(self, place: Place) -> None:
        """See ``Place.leave``."""
        with self._changed:
            self._entered.discard(place)
            began = self._running.pop(place, None)
            if began is not None:
                self._seconds += _WEIGHT * (self._clock() - began - self._seconds)
            self._changed.notify_all()

    def _is_next(self, place: Place) -> bool:
        return self._count is None or (len(self._running) < self._count and place is self._waiting[0])

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


class Place:
    """The place of one reply."""

    def __init__(self, places: Places, token: CancelToken) -> None:
        self._places, self._token = places, token

    def enter(self) -> None:
        """Ask for it. Asking twice does nothing.

        Raises:
            Busy: as many wait as may.
        """
        self._places.enter(self)

    def wait(self) -> float:
        """Wait for it; gives the seconds. Those that have entered and do not wait hold nobody back."""
        return self._places.wait(self, self._token)

    def leave(self) -> None:
        """Give it back. Without one nothing happens."""
        self._places.leave(self)
