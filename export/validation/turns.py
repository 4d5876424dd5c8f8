"""Graphs that take turns in memory, so that a run needs no more than its largest part.

A reply goes through all six graphs, which together are larger than any part of the reference. Encoders, decoders and
speech are used one after the other, so only one of these teams is loaded; the next one to run replaces it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from omniport.runtime.backends.base import Array, Backend, Graph, KvCache

from .memory import give_back

__all__ = ["TurnsBackend"]

#: graphs that are used together; thinker and talker alternate within a reply
_TEAMS = {
    "audio_encoder": "encoders",
    "vision_encoder": "encoders",
    "thinker": "decoders",
    "talker": "decoders",
    "dit": "speech",
    "bigvgan": "speech",
}


class TurnsBackend:
    """A backend that keeps one team of graphs loaded.

    Args:
        make: opens the backend that graphs are loaded with; called again for each turn.

    Raises:
        BackendError: from ``make``.
    """

    def __init__(self, make: Callable[[], Backend]) -> None:
        self._make = make
        self._backend = make()
        self.name = self._backend.name
        self._team = ""
        self._known: set[str] = set()
        self._makers: WeakKeyDictionary[KvCache, Graph] = WeakKeyDictionary()
        self._lock = threading.RLock()

    def graph(self, name: str) -> Graph:
        """The graph of that name. Loaded now the first time, so that a broken one shows; after that when it runs.

        Raises:
            BackendError, BundleError: as the backend itself.
        """
        if name not in self._known:
            self._load(name)
            self._known.add(name)
        return _Turn(self, name)

    def run(self, name: str, feeds: Mapping[str, Array], cache: KvCache | None) -> dict[str, NDArray[np.float32]]:
        """Run a graph. One with a cache runs where the cache was made: that graph lives as long as its cache."""
        graph = self._load(name) if cache is None else self._makers[cache]
        return graph.run(feeds, cache)

    def new_cache(self, name: str, capacity: int) -> KvCache:
        """A cache of a graph, see ``Graph.new_cache``."""
        graph = self._load(name)
        cache = graph.new_cache(capacity)
        self._makers[cache] = graph
        return cache

    def close(self) -> None:
        """Release every graph, and its memory."""
        self._backend.close()
        give_back()

    def _load(self, name: str) -> Graph:
        team = _TEAMS.get(name, name)
        with self._lock:
            if team != self._team and self._team:
                self._backend.close()
                give_back()
                self._backend = self._make()
            self._team = team
            return self._backend.graph(name)


class _Turn:
    """A graph that is loaded when it runs."""

    def __init__(self, backend: TurnsBackend, name: str) -> None:
        self._backend, self._name = backend, name

    def run(self, feeds: Mapping[str, Array], cache: KvCache | None = None) -> dict[str, NDArray[np.float32]]:
        return self._backend.run(self._name, feeds, cache)

    def new_cache(self, capacity: int) -> KvCache:
        return self._backend.new_cache(self._name, capacity)
