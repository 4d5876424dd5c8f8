"""A backend that keeps few graphs in memory at a time, so that a run needs no more than its largest part.

A reply goes through all six graphs, which together are larger than any part of the reference. Encoders, decoders and
speech are used one after the other, so only one of these teams is loaded; the next one to run replaces it, and with it
the KV caches that belong to it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray
from omniport.runtime.backends.base import Array, Backend, Graph, KvCache
from omniport.runtime.bundle.parts import PARTS
from omniport.runtime.errors import BackendError
from omniport.runtime.system.host import collect_and_trim


class TurnsBackend:
    """A backend that keeps one team of graphs loaded.

    Good for replies whose sound is made when their codes are known (``window="whole"``): where decoders and speech
    alternate, a decoder that goes on after speech finds its cache gone.

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
        self._caches: WeakSet[_TurnCache] = WeakSet()
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

    def run(self, name: str, feeds: Mapping[str, Array], cache: _TurnCache | None) -> dict[str, NDArray[np.float32]]:
        """Run a graph, loading it first if another team is.

        Raises:
            BackendError: the cache was filled before another team ran, and what it held is gone.
        """
        with self._lock:
            graph = self._load(name)
            if cache is not None and cache.held is None:
                if int(feeds["write_index"][0]) != 0:
                    raise BackendError(
                        f"the KV cache of {name!r} was given up when other graphs took its place in memory: finish a "
                        "reply's codes before its sound"
                    )
                cache.held = graph.new_cache(cache.capacity)
            return graph.run(feeds, None if cache is None else cache.held)

    def new_cache(self, name: str, capacity: int) -> KvCache:
        """A cache of a graph, see ``Graph.new_cache``."""
        with self._lock:
            cache = _TurnCache(self._load(name).new_cache(capacity))
            self._caches.add(cache)
        return cache

    def close(self) -> None:
        """Release every graph, and its memory."""
        for cache in self._caches:
            cache.held = None  # before the graph that it belongs to
        self._backend.close()
        collect_and_trim()

    def _load(self, name: str) -> Graph:
        team = PARTS[name].team if name in PARTS else name
        with self._lock:
            if team != self._team:
                self.close()
                self._backend, self._team = self._make(), team
            return self._backend.graph(name)


class _TurnCache:
    """A KV cache, or the place of one that was given up."""

    def __init__(self, held: KvCache) -> None:
        self.held: KvCache | None = held
        self.capacity = held.capacity
        self.nbytes = held.nbytes


class _Turn:
    """A graph that is loaded when it runs."""

    def __init__(self, backend: TurnsBackend, name: str) -> None:
        self._backend, self._name = backend, name

    def run(self, feeds: Mapping[str, Array], cache: KvCache | None = None) -> dict[str, NDArray[np.float32]]:
        assert cache is None or isinstance(cache, _TurnCache)
        return self._backend.run(self._name, feeds, cache)

    def new_cache(self, capacity: int) -> KvCache:
        return self._backend.new_cache(self._name, capacity)
