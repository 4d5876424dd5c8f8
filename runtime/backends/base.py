"""The contract of a backend: what the runtime asks of anything that runs graphs, and bases for what wraps another.

Arrays at this border are numpy; a KV cache is an opaque handle owned by the backend, so that a GPU backend keeps it
on the device. All float inputs and outputs other than the cache are float32 whatever the graph's precision.

Whatever stands between the runtime and a backend derives from `BackendWrapper` and `GraphWrapper`, which forward the
whole contract, so that no wrapper loses a part of it.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendError

if TYPE_CHECKING:
    from ..bundle.reader import Bundle

Array = NDArray[Any]
Outputs = dict[str, NDArray[np.float32]]


class KvCache(Protocol):
    """Cache of one decoder, owned by one conversation. It may hold more than a call's ``write_index``: what lies
    beyond is overwritten."""

    @property
    def capacity(self) -> int:
        """Tokens the cache holds."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated now."""


class RunHandle(ABC):
    """One run that can be stopped."""

    @abstractmethod
    def stop(self) -> None:
        """Abort the run at its next operator, or where that is not possible at its end; it then raises BackendError.

        Called from any thread, at any time.
        """


class Graph(ABC):
    """One loaded graph."""

    @abstractmethod
    def run(self, feeds: Mapping[str, Array], cache: KvCache | None = None, handle: RunHandle | None = None) -> Outputs:
        """Run once.

        Args:
            feeds: every input except the cache's ``past_*``, C-contiguous, dtypes as in the GraphSpec.
            cache: for decoders: read and updated in place.
            handle: a new one of this graph's, to stop the run with. The cache then keeps the tokens that it held.

        Returns:
            every output except the cache's ``present_*``. Arrays belong to the caller.
        """

    def new_cache(self, capacity: int) -> KvCache:
        """Allocate a cache for ``capacity`` tokens.

        Raises:
            BackendError: the graph is not a decoder.
        """
        raise BackendError("this graph keeps no KV cache: only thinker and talker do")

    def handle(self) -> RunHandle | None:
        """A handle of one run that is yet to begin; None where runs cannot be stopped."""
        return None


class Backend(ABC):
    """Loads graphs of one bundle.

    Attributes:
        host_nodes: (operator, name) of nodes that a GPU has no kernel for, by loaded graph.
    """

    name: str
    host_nodes: Mapping[str, tuple[tuple[str, str], ...]] = MappingProxyType({})

    @abstractmethod
    def graph(self, name: str) -> Graph:
        """The graph of that name, loaded on first use and kept."""

    @abstractmethod
    def close(self) -> None:
        """Release every graph."""

    def at_once(self) -> int | None:
        """Runs that the CPU's cores have room for, at least 1; more are in each other's way. None: any number."""
        return None

    def shares_cores(self, graph: str) -> bool:
        """Whether runs of this graph count towards ``at_once``."""
        return self.at_once() is not None

    def max_context(self) -> int | None:
        """Most tokens that a KV cache holds; None for as many as the bundle was exported for."""
        return None


G = TypeVar("G", bound=Graph)


class LoadingBackend(Backend, Generic[G]):
    """Loads each graph when it is first asked for, and keeps it until it is closed. Any thread may ask."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._graphs: dict[str, G] = {}
        self._lock = threading.Lock()
        self._closed = False

    def graph(self, name: str) -> G:
        """The graph of that name, loaded on first use and kept.

        Raises:
            BackendError: the backend is closed, or cannot load the graph. BundleError: the graph cannot be trusted.
        """
        with self._lock:  # workers ask for their graphs at once
            if self._closed:
                raise BackendError(f"the {self.name} backend is closed; open the session again")
            if name not in self._graphs:
                self._graphs[name] = self._load(name)
            return self._graphs[name]

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for graph in self._graphs.values():
                self._unload(graph)
            self._graphs.clear()

    @abstractmethod
    def _load(self, name: str) -> G:
        """Load a graph; as ``graph``."""

    def _unload(self, graph: G) -> None:
        """Free what a graph does not free by itself when nobody holds it any more."""


class BackendWrapper(Backend):
    """Another backend, but for what a subclass changes."""

    def __init__(self, inner: Backend) -> None:
        self.name = inner.name
        self.inner = inner
        self.host_nodes = inner.host_nodes

    def graph(self, name: str) -> Graph:
        return self.inner.graph(name)

    def close(self) -> None:
        self.inner.close()

    def at_once(self) -> int | None:
        return self.inner.at_once()

    def shares_cores(self, graph: str) -> bool:
        return self.inner.shares_cores(graph)

    def max_context(self) -> int | None:
        return self.inner.max_context()


class GraphWrapper(Graph):
    """Another graph, but for what a subclass changes."""

    def __init__(self, inner: Graph) -> None:
        self.inner = inner

    def run(self, feeds: Mapping[str, Array], cache: KvCache | None = None, handle: RunHandle | None = None) -> Outputs:
        return self.inner.run(feeds, cache, handle)

    def new_cache(self, capacity: int) -> KvCache:
        return self.inner.new_cache(capacity)

    def handle(self) -> RunHandle | None:
        return self.inner.handle()


NO_GPU = "no NVIDIA GPU that the CUDA driver can use"


@dataclass(frozen=True)
class Loader:
    """How a kind of backend is opened. Each module that the registry names has one, ``LOADER``.

    Attributes:
        open: backend of a name for a bundle, with CPU threads of one operator (the physical cores if None). Raises
            BackendError where it cannot run it.
        problems: what keeps the name from running on this machine, each with its remedy; given versions of installed
            packages by their import name (None: not installed), and whether there is an NVIDIA GPU.
        open_in: as ``open``, with a dtype in which graphs of float32 values are computed; None where there is no
            choice.
    """

    open: Callable[[str, Bundle, int | None], Backend]
    problems: Callable[[str, Mapping[str, str | None], bool], list[str]]
    open_in: Callable[[str, Bundle, int | None, str], Backend] | None = None
