"""KV caches on the device: static, updated in place, or growing, copied by each call."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ...bundle.graph_spec import DTYPES, GraphSpec
from ...errors import BundleError, OmniportError
from .cuda import DeviceBuffer, Driver
from .execution import Executor


class TrtCache(ABC):
    """KV cache of one conversation, [1, Hkv, tokens, D] for each key and value of each layer."""

    def __init__(self, driver: Driver, stream: int, spec: GraphSpec, capacity: int) -> None:
        self._driver, self._stream = driver, stream
        self._pairs = spec.cache
        self._geometry = {name: _geometry(spec, name) for name in self._pairs}
        self._capacity = capacity
        #: executors with a CUDA graph over this cache, by number of positions
        self.executors: dict[int, Executor] = {}

    @property
    def capacity(self) -> int:
        """Tokens the cache holds."""
        return self._capacity

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(buffer.nbytes for buffer in self._held())

    def release(self) -> None:
        """Give its memory back, and its executors theirs. It cannot be used any more."""
        for executor in self.executors.values():
            executor.release()
        self.executors.clear()
        for buffer in self._held():
            buffer.release()

    @abstractmethod
    def _held(self) -> list[DeviceBuffer]:
        """Everything allocated."""

    @abstractmethod
    def bind(self, executor: Executor, held: int, added: int) -> None:
        """Let the executor's next run find ``held`` tokens here and add to them.

        Raises:
            OmniportError: there are not as many, or there is no room.
        """

    @abstractmethod
    def grown(self, held: int, added: int) -> None:
        """Take note that the run has been carried out."""

    def _require(self, held: int, added: int, most: int) -> None:
        if held > most or held + added > self._capacity:
            raise OmniportError(
                f"a call at index {held} adds {added} tokens to a KV cache of {self._capacity}; indices 0 to "
                f"{min(most, self._capacity - added)} were expected"
            )

    def _buffers(self) -> dict[str, DeviceBuffer]:
        """A buffer for each part."""
        return {name: DeviceBuffer(self._driver, self._bytes(name, self._capacity)) for name in self._pairs}

    def _bytes(self, name: str, tokens: int) -> int:
        heads, width, itemsize = self._geometry[name]
        return heads * tokens * width * itemsize

    def _shape(self, name: str, tokens: int) -> tuple[int, ...]:
        heads, width, _ = self._geometry[name]
        return (1, heads, tokens, width)


class StaticTrtCache(TrtCache):
    """One buffer a part, bound as the input and as the output: the engine writes the new rows where they belong."""

    def __init__(self, driver: Driver, stream: int, spec: GraphSpec, capacity: int) -> None:
        super().__init__(driver, stream, spec, capacity)
        self._parts = self._buffers()

    def _held(self) -> list[DeviceBuffer]:
        return list(self._parts.values())

    def bind(self, executor: Executor, held: int, added: int) -> None:
        self._require(held, added, self._capacity)
        if not held:
            # Rows behind the live ones are masked, but they are read: NaN times a weight of zero would still be NaN.
            for buffer in self._parts.values():
                self._driver.zero(buffer.address, buffer.nbytes, self._stream)
        for name, output in self._pairs.items():
            address = self._parts[name].address
            executor.bind(name, address, self._shape(name, self._capacity))
            executor.bind(output, address)

    def grown(self, held: int, added: int) -> None:
        """Nothing to note: it holds what was written."""


class GrowingTrtCache(TrtCache):
    """Two buffers a part, the cache in one of them: each call writes it into the other, longer."""

    def __init__(self, driver: Driver, stream: int, spec: GraphSpec, capacity: int) -> None:
        super().__init__(driver, stream, spec, capacity)
        self._now, self._next = self._buffers(), self._buffers()
        self._length = 0

    def _held(self) -> list[DeviceBuffer]:
        return [*self._now.values(), *self._next.values()]

    def bind(self, executor: Executor, held: int, added: int) -> None:
        self._require(held, added, self._length)
        if held < self._length:
            self._cut(held)
        for name, output in self._pairs.items():
            executor.bind(name, self._now[name].address, self._shape(name, held))
            executor.bind(output, self._next[name].address)

    def grown(self, held: int, added: int) -> None:
        self._now, self._next = self._next, self._now
        self._length = held + added

    def _cut(self, length: int) -> None:
        """Keep the first tokens: heads lie one behind the other, so each has to move."""
        for name in self._pairs if length else ():
            heads, width, itemsize = self._geometry[name]
            row = width * itemsize
            self._driver.copy_rows(
                self._next[name].address,
                self._now[name].address,
                self._stream,
                to_pitch=length * row,
                pitch=self._length * row,
                width=length * row,
                rows=heads,
            )
        self._now, self._next = self._next, self._now
        self._length = length


def _geometry(spec: GraphSpec, name: str) -> tuple[int, int, int]:
    """Heads, width and bytes of a value."""
    tensor = spec.input(name)
    heads, width = tensor.shape[1], tensor.shape[3]
    if len(tensor.shape) != 4 or not isinstance(heads, int) or not isinstance(width, int):
        raise BundleError(f"input {name!r} has shape {tensor.shape}; [batch, heads, tokens, width] was expected")
    return heads, width, DTYPES[tensor.dtype]
