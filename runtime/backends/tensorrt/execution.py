"""An engine's execution context, with the buffers of its inputs and outputs.

What crosses goes through pinned host memory, so that copies and the engine are one sequence in one stream, which can be
captured into a CUDA graph and carried out by a single launch. Memory is kept from call to call and only ever grows.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...bundle.bfloat16 import from_bfloat16, to_bfloat16
from ..base import Array
from .cuda import DeviceBuffer, Driver, PinnedBuffer
from .runtime_api import ExecutionContext

#: specs' names of dtypes -> what holds them on the host; numpy has no bfloat16
_HELD: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int8": np.dtype(np.int8),
    "bool": np.dtype(np.bool_),
}


class Scratch:
    """Memory for what contexts compute in between. It grows; whoever holds an earlier buffer keeps that one alive."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._buffer: DeviceBuffer | None = None

    def at_least(self, nbytes: int) -> DeviceBuffer:
        """A buffer of that size or more."""
        if self._buffer is None or self._buffer.nbytes < nbytes:
            self._buffer = None  # first, so that the two are not there at once
            self._buffer = DeviceBuffer(self._driver, nbytes)
        return self._buffer

    def release(self) -> None:
        """Hold none any more."""
        self._buffer = None


class _Transfer:
    """A tensor that crosses: its memory on both sides, and the host's as an array in the tensor's shape."""

    def __init__(self, driver: Driver, dtype: str) -> None:
        self._driver, self._dtype = driver, dtype
        self._host: PinnedBuffer | None = None
        self._device: DeviceBuffer | None = None
        self.array: NDArray[Any] = np.zeros(0, _HELD[dtype])

    def reshape(self, shape: tuple[int, ...]) -> None:
        """Take this shape from now on. What was in the array is lost."""
        held = _HELD[self._dtype]
        nbytes = int(np.prod(shape, dtype=np.int64)) * held.itemsize
        if self._host is None or self._host.nbytes < nbytes:
            grown = 1 << max(0, nbytes - 1).bit_length()
            self.release()  # first, so that old and new are not there at once
            self._host, self._device = PinnedBuffer(self._driver, grown), DeviceBuffer(self._driver, grown)
        self.array = self._host.view(shape, held)

    def release(self) -> None:
        """Give the memory back; reshape() takes some again."""
        self.array = np.zeros(0, _HELD[self._dtype])  # none that looks at memory which is gone
        self._host = self._device = None

    @property
    def device(self) -> int:
        """Address on the device."""
        assert self._device is not None, "reshape() comes first"
        return self._device.address

    @property
    def host(self) -> int:
        """Address on the host."""
        assert self._host is not None, "reshape() comes first"
        return self._host.address

    def write(self, values: Array) -> None:
        """Fill the array, in the tensor's dtype."""
        np.copyto(self.array, to_bfloat16(values) if self._dtype == "bfloat16" else values, casting="same_kind")

    def read(self) -> NDArray[np.float32]:
        """A float32 copy of the array."""
        if self._dtype == "bfloat16":
            return from_bfloat16(self.array)
        return np.array(self.array, np.float32)


class Executor:
    """Runs an engine: values in, the engine, values out.

    Args:
        stream: where all of it is put.
        inputs, outputs: dtype of each tensor that crosses.
        scratch: shared with executors that never run at once.

    An executor is used by one thread at a time.
    """

    def __init__(
        self,
        driver: Driver,
        stream: int,
        context: ExecutionContext,
        inputs: Mapping[str, str],
        outputs: Mapping[str, str],
        scratch: Scratch,
    ) -> None:
        self._driver, self._stream, self._context = driver, stream, context
        self._inputs = {name: _Transfer(driver, dtype) for name, dtype in inputs.items()}
        self._outputs = {name: _Transfer(driver, dtype) for name, dtype in outputs.items()}
        self._scratch = scratch
        self._buffer: DeviceBuffer | None = None  # held: a captured graph uses it also once the scratch has grown
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._stale = True
        self._graph: int | None = None
        self._finalizer: weakref.finalize[[int], Executor] | None = None

    @property
    def captured(self) -> bool:
        """Whether the executor launches a CUDA graph. Its shapes and addresses stay as they are from then on."""
        return self._graph is not None

    def bind(self, name: str, address: int, shape: tuple[int, ...] | None = None) -> None:
        """Set where a tensor lies that stays on the device; and its shape, if it is an input."""
        if shape is not None:
            self._set_shape(name, shape)
        self._set_address(name, address)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, NDArray[np.float32]]:
        """One run; arrays belong to the caller.

        Raises:
            BackendError: the driver or the engine refuses.
        """
        self.prepare(feeds)
        self.execute(captured=self.captured)
        return {name: transfer.read() for name, transfer in self._outputs.items()}

    def prepare(self, feeds: Mapping[str, Array]) -> None:
        """Take the values of the next run; everything bound has to be bound by then."""
        for name, values in feeds.items():
            transfer = self._inputs[name]
            if self._shapes.get(name) != values.shape:
                self._shapes.pop(name, None)  # of what fails below, nothing is taken for done by the next run
                transfer.reshape(values.shape)
                self._set_address(name, transfer.device)
                self._set_shape(name, values.shape)
            transfer.write(values)
        if self._stale:
            for name, transfer in self._outputs.items():
                transfer.reshape(self._context.shape(name))
                self._set_address(name, transfer.device)
            needed = self._context.scratch_bytes()
            self._buffer = None
            self._buffer = self._scratch.at_least(needed)
            self._context.set_scratch(self._buffer.address, self._buffer.nbytes)
            self._stale = False

    def execute(self, captured: bool) -> None:
        """Carry out one run with the values that were taken, and wait for it."""
        if captured:
            assert self._graph is not None, "capture() comes first"
            self._driver.launch(self._graph, self._stream)
        else:
            self._enqueue()
        self._driver.synchronize(self._stream)

    def capture(self) -> None:
        """Make the CUDA graph of what ``execute`` does. It has to have run before: a first run may allocate.

        Raises:
            BackendError: it cannot be captured.
        """
        self._graph = self._driver.capture(self._stream, self._enqueue)
        self._finalizer = weakref.finalize(self, self._driver.destroy_graph, self._graph)
        self._finalizer.atexit = False

    def capturable(self) -> bool:
        """Whether the engine says that it can be captured."""
        return self._context.capturable(self._stream)

    def release(self) -> None:
        """Give everything back: context, memory, graph. It cannot run any more."""
        if self._finalizer is not None:
            self._finalizer()
        for transfer in (*self._inputs.values(), *self._outputs.values()):
            transfer.release()
        del self._context
        self._buffer = None

    def _enqueue(self) -> None:
        driver, stream = self._driver, self._stream
        for transfer in self._inputs.values():
            driver.to_device(transfer.device, transfer.host, transfer.array.nbytes, stream)
        self._context.enqueue(stream)
        for transfer in self._outputs.values():
            driver.to_host(transfer.host, transfer.device, transfer.array.nbytes, stream)

    def _set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if self._shapes.get(name) != shape:
            assert self._graph is None, "a captured executor keeps its shapes"
            self._stale = True
            self._context.set_shape(name, shape)
            self._shapes[name] = shape

    def _set_address(self, name: str, address: int) -> None:
        if self._addresses.get(name) != address:
            assert self._graph is None, "a captured executor keeps its addresses"
            self._context.set_address(name, address)
            self._addresses[name] = address
