"""CUDA calls that engines need: memory, copies, streams, captured graphs.

`Driver` is what the backend asks for; `cuda_driver.CudaDriver` gives it. Tests replace it with a stand-in that has its
own memory.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Driver(Protocol):
    """Memory, streams and captured graphs of one GPU. Addresses and handles are integers.

    What takes a stream is carried out in the stream's order and may not have begun when the call returns. Every method
    may be called from any thread, and raises BackendError when the driver refuses.
    """

    def capability(self) -> str:
        """Compute capability, ``8.9``."""

    def device_name(self) -> str:
        """The GPU's name, ``NVIDIA GeForce RTX 4090``."""

    def allocate(self, nbytes: int) -> int:
        """Memory on the device, aligned to 256 bytes, with anything in it."""

    def free(self, address: int) -> None:
        """Give device memory back, once nothing uses it. Never raises: it also runs when the process ends."""

    def allocate_host(self, nbytes: int) -> int:
        """Memory on the host that the device reads and writes directly."""

    def free_host(self, address: int) -> None:
        """As ``free``, for the host."""

    def to_device(self, device: int, host: int, nbytes: int, stream: int) -> None:
        """Copy from pinned memory, which has to stay as it is until then."""

    def to_host(self, host: int, device: int, nbytes: int, stream: int) -> None:
        """Copy to pinned memory."""

    def copy_rows(self, to: int, source: int, stream: int, *, to_pitch: int, pitch: int, width: int, rows: int) -> None:
        """Copy ``rows`` rows of ``width`` bytes on the device; they begin every ``pitch`` and ``to_pitch`` bytes."""

    def zero(self, device: int, nbytes: int, stream: int) -> None:
        """Fill with zeros."""

    def create_stream(self) -> int:
        """A stream that does not wait for others."""

    def destroy_stream(self, stream: int) -> None:
        """Never raises."""

    def synchronize(self, stream: int) -> None:
        """Wait until everything in the stream is done."""

    def capture(self, stream: int, body: Callable[[], None]) -> int:
        """A graph of what ``body`` puts into the stream, none of which is carried out."""

    def launch(self, graph: int, stream: int) -> None:
        """Carry out a captured graph."""

    def destroy_graph(self, graph: int) -> None:
        """Never raises."""


class DeviceBuffer:
    """Device memory that is given back with the object."""

    def __init__(self, driver: Driver, nbytes: int) -> None:
        self.nbytes = max(1, nbytes)
        self.address = driver.allocate(self.nbytes)
        self._finalizer = weakref.finalize(self, driver.free, self.address)
        self._finalizer.atexit = False  # the driver may be gone by then, and takes everything with it

    def release(self) -> None:
        """Give the memory back now."""
        self._finalizer()


class PinnedBuffer:
    """Pinned host memory that is given back with the object."""

    def __init__(self, driver: Driver, nbytes: int) -> None:
        self.nbytes = max(1, nbytes)
        self.address = driver.allocate_host(self.nbytes)
        self._finalizer = weakref.finalize(self, driver.free_host, self.address)
        self._finalizer.atexit = False

    def view(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array over the start of the memory; the buffer has to outlive it."""
        count = int(np.prod(shape, dtype=np.int64))
        memory = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(self.address)
        return np.frombuffer(memoryview(memory), dtype, count).reshape(shape)

    def release(self) -> None:
        """Give the memory back now."""
        self._finalizer()
