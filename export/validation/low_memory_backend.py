"""A backend that keeps few graphs in memory at a time, so that a run needs no more than its largest part.

A reply uses all six graphs, which together are larger than any part of the reference. Encoders, decoders and speech
run one after the other, so only one of these teams is loaded at a time. The next one to run replaces it and its KV
caches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from weakref import WeakSet

from omniport.runtime.backends.base import Array, Backend, BackendWrapper, Graph, KvCache, Outputs, RunHandle
from omniport.runtime.bundle.parts import PARTS
from omniport.runtime.errors import BackendError
from omniport.runtime.system.host import collect_and_trim


class LowMemoryBackend(BackendWrapper):
    """A backend that keeps one team of graphs loaded.

    Good for replies whose sound is made when their codes are known (``window="whole"``): where decoders and speech
    alternate, a decoder that goes on after speech finds its cache gone.

    Args:
        make: opens the backend that graphs are loaded with; called again for each team.

    Raises:
        BackendError: from ``make``.
    """

    def __init__(self, make: Callable[[], Backend]) -> None:
        super().__init__(make())
        self._make = make
        self._team = ""
        self._known: set[str] = set()
        self._caches: WeakSet[_TeamCache] = WeakSet()
        self.lock = threading.RLock()

    def graph(self, name: str) -> Graph:
        """The graph of that name. Loaded now the first time, so that a broken one shows; after that when it runs.

        Raises:
            BackendError, BundleError: as the backend itself.
        """
        if name not in self._known:
            self.load(name)
            self._known.add(name)
        return _TeamGraph(self, name)

    def close(self) -> None:
        """Release every graph, and its memory."""
        for cache in self._caches:
            cache.held = None  # before the graph that it belongs to
        super().close()
        collect_and_trim()

    def load(self, name: str) -> Graph:
        """The graph itself, in place of another team's."""
        team = PARTS[name].team if name in PARTS else name
        with self.lock:
            if team != self._team:
                self.close()
                self.inner, self._team = self._make(), team
            return self.inner.graph(name)

    def keep(self, cache: _TeamCache) -> None:
        """Empty this cache when its team is replaced."""
        self._caches.add(cache)


class _TeamCache:
    """A KV cache, or the place of one that was given up."""

    def __init__(self, held: KvCache) -> None:
        self.held: KvCache | None = held
        self.capacity = held.capacity
        self.nbytes = held.nbytes


class _TeamGraph(Graph):
    """A graph that is loaded when it runs."""

    def __init__(self, backend: LowMemoryBackend, name: str) -> None:
        self._backend, self._name = backend, name

    def run(self, feeds: Mapping[str, Array], cache: KvCache | None = None, handle: RunHandle | None = None) -> Outputs:
        """Run the graph, loading it first if another team is.

        Raises:
            BackendError: the cache was filled before another team ran, and what it held is gone.
        """
        with self._backend.lock:
            graph = self._backend.load(self._name)
            if cache is None:
                return graph.run(feeds, None, handle)
            assert isinstance(cache, _TeamCache)
            if cache.held is None:
                if int(feeds["write_index"][0]) != 0:
                    raise BackendError(
                        f"the KV cache of {self._name!r} was given up when other graphs took its place in memory: "
                        "finish a reply's codes before its sound"
                    )
                cache.held = graph.new_cache(cache.capacity)
            return graph.run(feeds, cache.held, handle)

    def new_cache(self, capacity: int) -> KvCache:
        with self._backend.lock:
            cache = _TeamCache(self._backend.load(self._name).new_cache(capacity))
            self._backend.keep(cache)
        return cache

    def handle(self) -> RunHandle | None:
        return self._backend.load(self._name).handle()
