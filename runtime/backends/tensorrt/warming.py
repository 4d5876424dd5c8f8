"""Decoding lengths are met before a reply needs them: TensorRT-RTX compiles kernels at the first step of each.

A thread takes one step of every length, with a stream, contexts and a KV cache of its own, so that nothing of a
conversation is touched. The kernels are the engine's, whichever context compiled them. The memory is given back at the
end; where there is none for it, replies compile for themselves.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from ...bundle.graph_spec import DimRange, GraphSpec
from ...errors import BackendError
from ..base import Array
from .cuda import Driver
from .execution import Executor, Scratch
from .kv_cache import StaticTrtCache
from .runtime_api import LoadedEngine


class Warming:
    """Begins at once.

    Args:
        lengths: of ``kv_positions``, in the order in which they are wanted.
        capacity: tokens of the KV cache that the engine was built for.
    """

    def __init__(
        self, loaded: LoadedEngine, spec: GraphSpec, driver: Driver, lengths: Sequence[int], capacity: int
    ) -> None:
        self._loaded, self._spec, self._driver = loaded, spec, driver
        self._lengths, self._capacity = lengths, capacity
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="omniport-warming", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take no further step, and wait until the memory is given back."""
        self._stopped.set()
        self.wait()

    def wait(self) -> None:
        """Wait until every length was met."""
        self._thread.join()

    def _run(self) -> None:
        with suppress(BackendError):  # whatever fails here fails in a reply as well, which can say so
            stream = self._driver.create_stream()
            try:
                self._take_steps(stream)
            finally:
                self._driver.destroy_stream(stream)

    def _take_steps(self, stream: int) -> None:
        spec, driver = self._spec, self._driver
        inputs = {t.name: t.dtype for t in spec.inputs if t.name not in spec.cache}
        outputs = {t.name: t.dtype for t in spec.outputs if t.name not in spec.cache.values()}
        cache, scratch = StaticTrtCache(driver, stream, spec, self._capacity), Scratch(driver)
        try:
            for length in self._lengths:
                if self._stopped.is_set():
                    return
                executor = Executor(driver, stream, self._loaded.context(fixed=True), inputs, outputs, scratch)
                cache.bind(executor, 0, 1, length)
                executor.run(step_feeds(spec, length))
        finally:
            with suppress(BackendError):
                driver.synchronize(stream)  # a step that failed half-way may still use the memory
            cache.release()


def step_feeds(spec: GraphSpec, length: int) -> dict[str, Array]:
    """Values of a decoder's step over ``length`` positions; what they are does not matter."""
    one = DimRange(1, 1, 1)
    dims = {**spec.dims, "new_tokens": one, "live": DimRange(length, length, length)}
    feeds: dict[str, Array] = {}
    for tensor in spec.inputs:
        if tensor.name not in spec.cache:
            dtype = "float32" if tensor.dtype in ("float16", "bfloat16") else tensor.dtype
            feeds[tensor.name] = np.zeros(tensor.sized(dims, "min"), dtype)
    feeds["kv_positions"] = np.arange(length, dtype=np.int64)
    return feeds
