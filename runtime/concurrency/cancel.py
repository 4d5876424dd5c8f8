"""Cancellation of a reply: a token that every graph run checks, and that wakes waiting threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Array, Backend, Graph, KvCache, RunHandle, StoppableGraph, runs_at_once
from ..errors import BackendError
from .schedule import Turns
from .timing import StageTimer


class Cancelled(Exception):
    """Unwinds a worker or a push whose turn was cancelled. It never reaches the user."""


class CancelToken:
    """Set once, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wakers: list[Callable[[], None]] = []
        self.cancelled = False

    def cancel(self) -> None:
        """Ask everything that looks at the token to stop. Asking twice does nothing."""
        with self._lock:
            self.cancelled = True
            wakers, self._wakers = self._wakers, []
        for wake in wakers:
            wake()

    def check(self) -> None:
        """Raise Cancelled if asked to stop."""
        if self.cancelled:
            raise Cancelled

    def subscribe(self, wake: Callable[[], None]) -> None:
        """Call ``wake`` when the token is set, at once if it is."""
        with self._lock:
            if not self.cancelled:
                self._wakers.append(wake)
                return
        wake()


class GuardedBackend:
    """A backend whose graphs refuse to run once the token is set, take turns where they share cores, and count the
    time that runs take.

    So every stage stops within one operator of a graph where the backend can stop a run, and within one run elsewhere,
    and no stage has to think of it.

    Args:
        timer: of the stages that run here.

    Attributes:
        seconds: time inside graph runs, by graph.
    """

    def __init__(self, inner: Backend, token: CancelToken, timer: StageTimer) -> None:
        self.name = inner.name
        self.seconds: dict[str, float] = {}
        self._inner = inner
        self._token = token
        self._room = runs_at_once(inner)
        self._turns = None if self._room is None else Turns(self._room, token, timer)
        self._graphs: dict[str, _GuardedGraph] = {}

    def graph(self, name: str) -> Graph:
        """As ``Backend.graph``."""
        self._token.check()
        if name not in self._graphs:
            self._graphs[name] = _GuardedGraph(name, self._inner.graph(name), self._token, self._turns, self.seconds)
        return self._graphs[name]

    def at_once(self) -> int | None:
        """As the backend's own."""
        return self._room

    def close(self) -> None:
        """Nothing: the backend belongs to the session."""


class _GuardedGraph:
    def __init__(
        self, name: str, inner: Graph, token: CancelToken, turns: Turns | None, seconds: dict[str, float]
    ) -> None:
        self._name = name
        self._inner = inner
        self._stoppable = inner if isinstance(inner, StoppableGraph) else None
        self._handle: RunHandle | None = None
        self._token = token
        self._turns = turns
        self._seconds = seconds
        token.subscribe(self._stop)

    def run(self, feeds: Mapping[str, Array], cache: KvCache | None = None) -> dict[str, NDArray[np.float32]]:
        """As ``Graph.run``. Each graph is run by one thread at a time, so its count needs no lock."""
        self._token.check()
        with self._turn():
            start = time.perf_counter()
            try:
                return self._run(feeds, cache)
            finally:
                self._seconds[self._name] = self._seconds.get(self._name, 0.0) + time.perf_counter() - start

    def _run(self, feeds: Mapping[str, Array], cache: KvCache | None) -> dict[str, NDArray[np.float32]]:
        if self._stoppable is None:
            return self._inner.run(feeds, cache)
        self._handle = handle = self._stoppable.handle()
        self._token.check()  # set before there was a handle to stop the run with
        try:
            return self._stoppable.run(feeds, cache, handle)
        except BackendError:
            self._token.check()
            raise
        finally:
            self._handle = None

    def _stop(self) -> None:
        handle = self._handle
        if handle is not None:
            handle.stop()

    def new_cache(self, capacity: int) -> KvCache:
        """As ``Graph.new_cache``."""
        return self._inner.new_cache(capacity)

    def _turn(self) -> AbstractContextManager[None]:
        return nullcontext() if self._turns is None else self._turns.take(self._name)
