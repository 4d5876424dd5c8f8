"""The backend of one reply: its runs can be cancelled, share the cores' slots with those of others, and are timed.

So every stage stops within one operator of a graph where the backend can stop a run, and within one run elsewhere, and
no stage has to think of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import nullcontext
from weakref import WeakKeyDictionary

from ..bundle.parts import PARTS
from ..concurrency.cancel import CancelToken
from ..concurrency.schedule import RunSlots, Share, distance
from ..concurrency.timing import StageTimer
from ..errors import BackendError
from .base import Array, Backend, BackendWrapper, Graph, GraphWrapper, KvCache, Outputs, RunHandle

_SLOTS: WeakKeyDictionary[Backend, RunSlots] = WeakKeyDictionary()
_SLOTS_LOCK = threading.Lock()


def slots_of(backend: Backend) -> RunSlots | None:
    """The slots that all share who run graphs of this backend, however it is wrapped; None if it needs none."""
    room = backend.at_once()
    if room is None:
        return None
    while isinstance(backend, BackendWrapper):
        backend = backend.inner
    with _SLOTS_LOCK:
        slots = _SLOTS.get(backend)
        if slots is None or slots.count != room:
            slots = _SLOTS[backend] = RunSlots(room)
        return slots


class GuardedBackend(BackendWrapper):
    """A backend whose graphs refuse to run once the token is set, wait for a slot where they share cores, and count
    the time that runs take.

    Args:
        timer: of the stages that run here.

    Attributes:
        seconds: time inside graph runs, by graph.
        share: when they are needed.
    """

    def __init__(self, inner: Backend, token: CancelToken, timer: StageTimer) -> None:
        super().__init__(inner)
        self.seconds: dict[str, float] = {}
        self._token = token
        self.share = Share(token, timer, slots_of(inner))
        self._graphs: dict[str, _GuardedGraph] = {}

    def graph(self, name: str) -> Graph:
        self._token.check()
        if name not in self._graphs:
            share = self.share if self.shares_cores(name) else None
            self._graphs[name] = _GuardedGraph(name, self.inner.graph(name), self._token, share, self.seconds)
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
        self, name: str, inner: Graph, token: CancelToken, share: Share | None, seconds: dict[str, float]
    ) -> None:
        super().__init__(inner)
        self._name, self._token, self._share, self._seconds = name, token, share, seconds
        self._running: RunHandle | None = None
        token.subscribe(self._stop)

    def run(self, feeds: Mapping[str, Array], cache: KvCache | None = None, handle: RunHandle | None = None) -> Outputs:
        self._token.check()
        with nullcontext() if self._share is None else self._share.slot(self._name):
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
