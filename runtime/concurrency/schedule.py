"""Scheduling of graph runs on shared CPU cores, over all replies at once.

Two graphs that run at once on the same cores are slower than one after the other: the threads of each wait for one
another while the other graph has the core. So each run takes one of a few slots (``RunSlots``), which all replies and
live turns over one backend share. Each has a ``Share``, which knows when what it computes is needed.

None of it changes a result: each worker has its own random stream, and what it computes does not depend on when.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..bundle.parts import PARTS
from .cancel import CancelToken
from .timing import StageTimer

#: seconds after a question, or a piece of one, until which its first sound should be out
FIRST_SOUND = 0.5
#: seconds that a token of a reply without speech is read for: faster than people read
READING = 0.1
#: a free slot is kept for the next run of what has just run and is due sooner: for this part of its run, at most so
#: many seconds. A worker between two runs does not wait for a slot yet.
_KEPT, _KEPT_MOST = 0.5, 0.003
#: of shares and runs: of two that are equal the older goes first
_NUMBERS = itertools.count()


def distance(graph: str) -> int:
    """Parts of a reply between this one and the sound; more than all of them for another graph."""
    nearest = list(reversed(PARTS))
    return nearest.index(graph) if graph in PARTS else len(nearest)


class Share:
    """The graph runs of one reply and its turn, or of other work: when what they compute is needed.

    Args:
        token: when it is set, what waits for a slot stops with Cancelled.
        timer: told how long each slot was waited for, so that it does not count as work.
        slots: None where runs need none.

    Attributes:
        due: by the slots' clock: until something was made to hear or to read, ``FIRST_SOUND`` after the question came;
            from then on, when a listener who began with the first sound will have heard all of it.
        owed: seconds of a slot that it has to get before others, see ``RunSlots``; below 0 if it had too much.
    """

    def __init__(self, token: CancelToken, timer: StageTimer, slots: RunSlots | None = None) -> None:
        self.token, self.timer, self.number, self._slots = token, timer, next(_NUMBERS), slots
        self._clock = time.perf_counter if slots is None else slots.clock
        if slots is not None:
            token.subscribe(slots.wake)
        self.ask()

    def ask(self) -> None:
        """A question, or a piece of one, has come now."""
        self._begun, self.owed, self.due = False, 0.0, self._clock() + FIRST_SOUND

    def give(self, seconds: float) -> None:
        """So much more was made to hear, or to read."""
        now = self._clock()
        self.due = (max(self.due, now) if self._begun else now) + seconds
        self._begun, self.owed = True, 0.0

    @contextmanager
    def slot(self, graph: str) -> Iterator[None]:
        """Hold a slot for one run of that graph, where runs need one."""
        if self._slots is None:
            yield
            return
        with self._slots.take(graph, self):
            yield


class _Run:
    """One run that waits for a slot, or has it.

    Attributes:
        owed: it has its slot because its share was owed time.
    """

    def __init__(self, share: Share, distance: int) -> None:
        self.share, self.distance, self.number, self.owed = share, distance, next(_NUMBERS), False


class RunSlots:
    """A few graph runs at a time.

    Next is the share that is due first, and in it the run that is nearest to the sound. But a share that is late is
    never starved: of the time that n others run while it is late and waits, it is owed 1 / (2 (n + 1)), and whom time
    is owed goes before everybody else. So half of the time goes by need, and half is equal for all who are late.

    Args:
        count: runs at a time.
        clock: seconds.
    """

    def __init__(self, count: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.count, self.clock = count, clock
        self._changed = threading.Condition()
        self._waiting: list[_Run] = []
        self._running = 0
        self._last: Share | None = None  # of the run that has ended last
        self._kept_until = 0.0

    @contextmanager
    def take(self, graph: str, share: Share) -> Iterator[None]:
        """Hold a slot for one run of that graph."""
        run = _Run(share, distance(graph))
        self._enter(run)
        began = self.clock()
        try:
            yield
        finally:
            with self._changed:
                self._leave(run, self.clock() - began)

    def wake(self) -> None:
        """Let all who wait look again."""
        with self._changed:
            self._changed.notify_all()

    def _enter(self, run: _Run) -> None:
        share = run.share
        with self._changed:
            start = time.perf_counter()
            self._waiting.append(run)
            try:
                while not share.token.cancelled and (pause := self._pause(run)) != 0:
                    self._changed.wait(pause)
                run.owed = self._owed(share, self.clock()) > 0
            finally:
                self._waiting.remove(run)
                self._changed.notify_all()  # there may be a slot for the next
            share.timer.leave_out(time.perf_counter() - start)
            share.token.check()
            self._running += 1

    def _leave(self, run: _Run, seconds: float) -> None:
        """A run that took so long has ended."""
        now, share = self.clock(), run.share
        self._running -= 1
        self._last, self._kept_until = share, now + min(_KEPT_MOST, _KEPT * seconds)
        share.owed -= seconds if run.owed else 0.0
        late = {other.share for other in self._waiting if other.share.due <= now} - {share}
        for other in late:
            other.owed += seconds / (2 * (len(late) + 1))
        self._changed.notify_all()

    def _pause(self, run: _Run) -> float | None:
        """Seconds after which it may take a slot if nothing has changed; 0: now; None: not before a run has ended."""
        if self._running >= self.count:
            return None
        now, last = self.clock(), self._last
        if run is not min(self._waiting, key=lambda each: (*self._order(each.share, now), each.distance, each.number)):
            return _KEPT_MOST  # the first one is about to take the slot, or time has changed the order
        if last is None or last is run.share or self._order(run.share, now) < self._order(last, now):
            return 0.0
        return max(0.0, self._kept_until - now)

    def _owed(self, share: Share, now: float) -> float:
        return max(0.0, share.owed) if share.due <= now else 0.0

    def _order(self, share: Share, now: float) -> tuple[float, float, int]:
        return (-self._owed(share, now), share.due, share.number)
