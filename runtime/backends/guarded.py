"""The backend of one reply: its runs can be cancelled, share the cores' slots, and are timed.

So every stage stops within one operator of a graph where the backend can stop a run, and within one run elsewhere, and
no stage has to think of it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

from ..bundle.parts import PARTS
from ..concurrency.cancel import CancelToken
from ..concurrency.schedule import RunSlots, distance
from ..concurrency.timing import StageTimer
from ..errors import BackendError
from .base import Array, Backend, BackendWrapper, Graph, GraphWrapper, KvCache, Outputs, RunHandle


class GuardedBackend(BackendWrapper):
    """A backend whose graphs refuse to run once the token is set, wait for a slot where they share cores, and count
    the time that runs take.

    Args:
        timer: of the stages that run here.

    Attributes:
        seconds: time inside graph runs, by graph.
    """

    def __init__(self, inner: Backend, token: CancelToken, timer: StageTimer) -> None:
        super().__init__(inner)
        self.seconds: dict[str, float] = {}
        self._token = token
        room = inner.at_once()
        self._slots = None if room is None else RunSlots(room, token, timer)
        self._graphs: dict[str, _GuardedGraph] = {}

    def graph(self, name: str) -> Graph:
        self._token.check()
        if name not in self._graphs:
            slots = self._slots if self.shares_cores(name) else None
            self._graphs[name] = _GuardedGraph(name, self.inner.graph(name), self._token, slots, self.seconds)
        return self._graphs[name]

    def delays_sound(self, graph: str) -> bool:
        """Whether a run of this graph keeps one that is nearer to the sound waiting: there is one slot for both."""
        nearer = [name for name in PARTS if distance(name) < distance(graph)]
        return self.at_once() == 1 and self.shares_cores(graph) and any(map(self.shares_cores, nearer))

    def close(self) -> None:
        """Nothing: the backend belongs to the session."""


class _GuardedGraph(GraphWrapper):
    """Run by one thread at a time, so its count needs no lock."""

    def __init__(
        self, name: str, inner: Graph, token: CancelToken, slots: RunSlots | None, seconds: dict[str, float]
    ) -> None:
        super().__init__(inner)
        self._name, self._token, self._slots, self._seconds = name, token, slots, seconds
        self._running: RunHandle | None = None
        token.subscribe(self._stop)

    def run(self, feeds: Mapping[str, Array], cache: KvCache | None = None, handle: RunHandle | None = None) -> Outputs:
        self._token.check()
        with self._slot():
            start = time.perf_counter()
            self._running = handle = handle or self.handle()
            try:
                self._token.check()  # set before there was a handle to stop the run with
                return self.inner.run(feeds, cache, handle)
            except BackendError:
                self._token.check()
                raise
            finally:
                self._running = None
                self._seconds[self._name] = self._seconds.get(self._name, 0.0) + time.perf_counter() - start

    def _stop(self) -> None:
        running = self._running
        if running is not None:
            running.stop()

    def _slot(self) -> AbstractContextManager[None]:
        return nullcontext() if self._slots is None else self._slots.take(self._name)
