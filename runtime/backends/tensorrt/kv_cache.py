"""KV caches on the device: static, updated in place, or growing, copied by each call.

Decoding runs at a few lengths of ``kv_positions``, since captured CUDA graphs have fixed shapes, and new shapes make an
engine plan anew. The graph masks positions that no token has reached (``kv_positions <= write_index + arange(S)``), so
rows of the cache that hold nothing do no harm, if their position is large and they are finite.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ...bundle.graph_spec import DTYPES, GraphSpec
from ...errors import BundleError, OmniportError
from ..base import Array
from .cuda import DeviceBuffer, Driver
from .execution import Executor

#: fewest positions of a decoding step: a step reads the weights, and 256 rows of the cache are little beside them
_LEAST_BUCKET = 256
#: position of a row that holds no token: later than any, and no more than 32 bits hold
_UNUSED = (1 << 31) - 1


def positions_bucket(live: int, capacity: int) -> int:
    """The length that ``live`` positions are filled up to: less than a quarter or 256 more, never over ``capacity``."""
    step = max(_LEAST_BUCKET, (1 << max(0, live - 1).bit_length()) // 8)
    return min(capacity, -(-live // step) * step)


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
    def fill(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """Feeds with ``kv_positions`` of one of a few lengths, where the cache can be read so."""

    @abstractmethod
    def bind(self, executor: Executor, held: int, added: int, positions: int) -> None:
        """Let the executor's next run find ``held`` tokens here and add to them.

        Args:
            positions: length of ``kv_positions``, as `fill` left it.

        Raises:
            OmniportError: there are not as many, or there is no room.
        """

    @abstractmethod
    def grown(self, held: int, added: int) -> None:
        """Take note that the run has been carried out.

        Raises:
            BackendError: the driver refuses; it is as if the run had not been.
        """

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

    def fill(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """They go on past the live ones."""
        length = positions_bucket(len(feeds["kv_positions"]), self._capacity)
        return {**feeds, "kv_positions": np.arange(length, dtype=np.int64)}

    def bind(self, executor: Executor, held: int, added: int, positions: int) -> None:
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


class _Row(NamedTuple):
    """A row of every head, in a buffer whose heads have ``rows`` rows."""

    buffer: DeviceBuffer
    rows: int
    first: int


class GrowingTrtCache(TrtCache):
    """Two buffers a part: each call reads the cache in one, and writes it into the other, longer.

    To decode, the cache has rows to spare in the buffer that is read: the call's own row comes out behind them all, and
    is copied to where it belongs. So shapes and addresses stay as they are until the rows are used up.
    """

    def __init__(self, driver: Driver, stream: int, spec: GraphSpec, capacity: int) -> None:
        super().__init__(driver, stream, spec, capacity)
        self._home, self._other = self._buffers(), self._buffers()
        self._now = self._home  # where the cache is, that many rows a head of which the first hold tokens
        self._rows = self._length = 0

    def _held(self) -> list[DeviceBuffer]:
        return [*self._home.values(), *self._other.values()]

    @property
    def _next(self) -> dict[str, DeviceBuffer]:
        return self._other if self._now is self._home else self._home

    def fill(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """Those of a step: tokens that are held, rows to spare, the new token."""
        known = feeds["kv_positions"]
        if feeds["inputs_embeds"].shape[1] != 1 or len(known) > self._capacity:
            return feeds
        positions = np.full(positions_bucket(len(known), self._capacity), _UNUSED, np.int64)
        positions[: len(known) - 1], positions[-1] = known[:-1], known[-1]
        return {**feeds, "kv_positions": positions}

    def bind(self, executor: Executor, held: int, added: int, positions: int) -> None:
        self._require(held, added, self._length)
        rows = positions - added
        if added == 1 and (self._now is not self._home or self._rows != rows):
            # captured graphs read one side and write the other
            if self._now is self._home:
                self._move(held, held)
            self._move(held, rows)
        elif self._rows != rows:
            self._move(held, held)
        for name, output in self._pairs.items():
            executor.bind(name, self._now[name].address, self._shape(name, rows))
            executor.bind(output, self._next[name].address)

    def grown(self, held: int, added: int) -> None:
        if held + added > self._rows:  # it came out whole, without a gap
            self._now, self._rows = self._next, held + added
        else:
            for name in self._pairs:
                new = _Row(self._next[name], self._rows + 1, self._rows)
                self._copy(name, _Row(self._now[name], self._rows, held), new, 1)
            self._driver.synchronize(self._stream)  # the cache may be given back next
        self._length = held + added

    def _move(self, length: int, rows: int) -> None:
        """Put the first tokens on the other side, each head with ``rows`` rows; those to spare are zero: finite."""
        for name in self._pairs:
            target = self._next[name]
            if rows > length:
                self._driver.zero(target.address, self._bytes(name, rows), self._stream)
            if length:
                self._copy(name, _Row(target, rows, 0), _Row(self._now[name], self._rows, 0), length)
        self._now, self._rows, self._length = self._next, rows, length

    def _copy(self, name: str, to: _Row, source: _Row, count: int) -> None:
        """That many rows of each head."""
        heads, width, itemsize = self._geometry[name]
        row = width * itemsize
        self._driver.copy_rows(
            to.buffer.address + to.first * row,
            source.buffer.address + source.first * row,
            self._stream,
            to_pitch=to.rows * row,
            pitch=source.rows * row,
            width=count * row,
            rows=heads,
        )


def _geometry(spec: GraphSpec, name: str) -> tuple[int, int, int]:
    """Heads, width and bytes of a value."""
    tensor = spec.input(name)
    heads, width = tensor.shape[1], tensor.shape[3]
    if len(tensor.shape) != 4 or not isinstance(heads, int) or not isinstance(width, int):
        raise BundleError(f"input {name!r} has shape {tensor.shape}; [batch, heads, tokens, width] was expected")
    return heads, width, DTYPES[tensor.dtype]
