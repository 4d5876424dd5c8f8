"""The Backend protocol: what the runtime asks of anything that runs graphs.

Arrays at this border are numpy; a KV cache is an opaque handle owned by the backend, so that a GPU backend keeps it
on the device. All float inputs and outputs other than the cache are float32 whatever the graph's precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class KvCache(Protocol):
    """Cache of one decoder, owned by one conversation. It may hold more than a call's ``write_index``: what lies
    beyond is overwritten."""

    @property
    def capacity(self) -> int:
        """Tokens the cache holds."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated now."""


class Graph(Protocol):
    """One loaded graph."""

    def run(self, feeds: Mapping[str, Array], cache: KvCache | None = None) -> dict[str, NDArray[np.float32]]:
        """Run once.

        Args:
            feeds: every input except the cache's ``past_*``, C-contiguous, dtypes as in the GraphSpec.
            cache: for decoders: read and updated in place.

        Returns:
            every output except the cache's ``present_*``. Arrays belong to the caller.
        """

    def new_cache(self, capacity: int) -> KvCache:
        """Allocate a cache for ``capacity`` tokens (decoders only; BackendError otherwise)."""


class RunHandle(Protocol):
    """One run that can be stopped."""

    def stop(self) -> None:
        """Have it end with a BackendError soon: at its next operator. Called from another thread, at any time."""


@runtime_checkable
class StoppableGraph(Protocol):
    """A graph whose runs can be stopped. A cache that such a run had keeps the tokens that it held before."""

    def handle(self) -> RunHandle:
        """Of one run that is yet to begin."""

    def run(
        self, feeds: Mapping[str, Array], cache: KvCache | None = None, handle: RunHandle | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """As ``Graph.run``."""


class Backend(Protocol):
    """Loads graphs of one bundle."""

    name: str

    def graph(self, name: str) -> Graph:
        """The graph of that name, loaded on first use and kept."""

    def close(self) -> None:
        """Release every graph."""


@runtime_checkable
class BoundedBackend(Protocol):
    """A backend whose KV caches may hold fewer tokens than the bundle was exported for."""

    def max_context(self) -> int | None:
        """Most tokens; None for as many as the bundle's."""


@runtime_checkable
class SharedCores(Protocol):
    """A backend that may run its graphs on the same cores, those of the CPU."""

    def at_once(self) -> int | None:
        """Runs that the cores have room for, at least 1; more than those are in each other's way. None: any number."""


def runs_at_once(backend: Backend) -> int | None:
    """Runs that a backend has room for; None, any number, where it does not say."""
    return backend.at_once() if isinstance(backend, SharedCores) else None


def most_context(backend: Backend, exported: int) -> int:
    """Tokens that KV caches can hold: those that the bundle was exported for, or fewer."""
    bound = backend.max_context() if isinstance(backend, BoundedBackend) else None
    return exported if bound is None else min(bound, exported)
