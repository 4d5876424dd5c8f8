"""A backend whose runs end in time, and whose outputs are what the graph's spec says.

What comes out of a graph sizes buffers and indexes tables, so a file that gives other shapes than bundle.json promises
must not get past the run that gave them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..bundle.graph_spec import GraphSpec, TensorSpec
from ..errors import BackendError
from .base import Array, Backend, BackendWrapper, Graph, GraphWrapper, KvCache, Outputs, RunHandle

#: numpy has no bfloat16: what stands for it is the backend's business
_COMPARED = {"float32", "float16", "int64", "int32", "int8", "bool"}


class CheckedBackend(BackendWrapper):
    """Another backend, of which every run is checked.

    Args:
        graphs: specs of the bundle's graphs.
        run_limit: seconds that one run may take; None for any time. A run that can be stopped is, at its next
            operator; another is refused when it has ended.
    """

    def __init__(self, inner: Backend, graphs: Mapping[str, GraphSpec], run_limit: float | None = None) -> None:
        super().__init__(inner)
        self._specs, self._limit = graphs, run_limit

    def graph(self, name: str) -> Graph:
        inner, spec = self.inner.graph(name), self._specs.get(name)
        return inner if spec is None else _CheckedGraph(inner, spec, self._limit)

    def close(self) -> None:
        """Nothing: the backend belongs to the session."""


@dataclass(frozen=True)
class _Size:
    """A dimension: ``factor`` times the one that has this name; a plain number without."""

    factor: int
    name: str

    @classmethod
    def of(cls, tensor: TensorSpec) -> tuple[_Size, ...]:
        def size(dim: int | str) -> _Size:
            if isinstance(dim, int):
                return cls(dim, "")
            factor, _, name = dim.rpartition("*")
            return cls(int(factor or 1), name)

        return tuple(map(size, tensor.shape))


class _CheckedGraph(GraphWrapper):
    def __init__(self, inner: Graph, spec: GraphSpec, limit: float | None) -> None:
        super().__init__(inner)
        self._name, self._limit = spec.name, limit
        self._inputs = {tensor.name: _Size.of(tensor) for tensor in spec.inputs}
        self._outputs = {tensor.name: (tensor.dtype, _Size.of(tensor)) for tensor in spec.outputs}

    def run(self, feeds: Mapping[str, Array], cache: KvCache | None = None, handle: RunHandle | None = None) -> Outputs:
        outputs = self._within_limit(feeds, cache, handle)
        for problem in self._problems(feeds, outputs):
            raise BackendError(
                f"graph {self._name!r} gives {problem}: its file is not what bundle.json describes. Export it again"
            )
        return outputs

    def _within_limit(self, feeds: Mapping[str, Array], cache: KvCache | None, handle: RunHandle | None) -> Outputs:
        if self._limit is None:
            return self.inner.run(feeds, cache, handle)
        handle = handle or self.inner.handle()
        timer = None if handle is None else threading.Timer(self._limit, handle.stop)
        started = time.perf_counter()
        if timer is not None:
            timer.daemon = True
            timer.start()
        try:
            outputs = self.inner.run(feeds, cache, handle)
        except BackendError as error:
            self._check_time(started, error)
            raise
        finally:
            if timer is not None:
                timer.cancel()
                timer.join()
        self._check_time(started, None)
        return outputs

    def _check_time(self, started: float, cause: BackendError | None) -> None:
        limit = self._limit
        if limit is not None and time.perf_counter() - started >= limit:
            raise BackendError(
                f"a run of graph {self._name!r} took longer than run_limit, {limit:g} s: give a shorter input, or a "
                "higher limit"
            ) from cause

    def _problems(self, feeds: Mapping[str, Array], outputs: Outputs) -> Iterator[str]:
        known: dict[str, int] = {}
        for name, array in feeds.items():
            for size, found in zip(self._inputs.get(name, ()), array.shape, strict=False):
                if size.name and found % size.factor == 0:
                    known[size.name] = found // size.factor
        for name, array in outputs.items():
            if name not in self._outputs:
                continue
            dtype, sizes = self._outputs[name]
            if dtype in _COMPARED and array.dtype.name != dtype:
                yield f"{name!r} as {array.dtype.name}, not {dtype}"
            wanted = [size.factor * known.get(size.name, -1) if size.name else size.factor for size in sizes]
            if len(wanted) != array.ndim or any(w >= 0 and w != f for w, f in zip(wanted, array.shape, strict=True)):
                shape = ", ".join("?" if w < 0 else str(w) for w in wanted)
                yield f"{name!r} of shape {list(array.shape)}, not [{shape}]"
