"""What a CUDA driver has to do, real or stood in for."""

from __future__ import annotations

import ctypes
import threading

import numpy as np
from numpy.typing import NDArray
from omniport.runtime.backends.tensorrt.cuda import DeviceBuffer, Driver, PinnedBuffer
from omniport.runtime.backends.tensorrt.cuda_driver import CudaDriver

F4 = np.dtype(np.float32)


class Cycle:
    """Garbage that only the collector finds."""

    def __init__(self, *held: object) -> None:
        self.me, self.held = self, held


def round_trip(driver: CudaDriver, seed: int, side: int = 32, rounds: int = 2) -> None:
    """Rows of a matrix, there, cut and back; by a graph as well."""
    whole, row, cut = 4 * side * side, 4 * side, side
    there, back = PinnedBuffer(driver, whole), PinnedBuffer(driver, whole // 4)
    first, second = DeviceBuffer(driver, whole), DeviceBuffer(driver, whole // 4)
    stream = driver.create_stream()

    def body() -> None:
        driver.zero(second.address, whole // 4, stream)
        driver.to_device(first.address, there.address, whole, stream)
        driver.copy_rows(second.address, first.address, stream, to_pitch=cut, pitch=row, width=cut, rows=side)
        driver.to_host(back.address, second.address, whole // 4, stream)

    rng = np.random.default_rng(seed)
    values, got = there.view((side, side), F4), back.view((side, side // 4), F4)
    graph = 0
    try:
        for _ in range(rounds):
            values[:] = rng.standard_normal((side, side))
            body()
            driver.synchronize(stream)
            assert np.array_equal(got, values[:, : side // 4])
        graph = driver.capture(stream, body)
        values[:] = 7
        driver.launch(graph, stream)
        driver.synchronize(stream)
        assert (got == 7).all()
    finally:
        if graph:
            driver.destroy_graph(graph)
        driver.destroy_stream(stream)
        for buffer in (there, back, first, second):
            buffer.release()


class Echo:
    """An execution context that can be captured: its output ``y`` is its input ``x``, float32."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._addresses: dict[str, int] = {}
        self._shape: tuple[int, ...] = ()

    def use_profile(self, index: int, stream: int) -> None:
        """There is one."""

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shape

    def set_address(self, name: str, address: int) -> None:
        self._addresses[name] = address

    def scratch_bytes(self) -> int:
        return 1024

    def set_scratch(self, address: int, nbytes: int) -> None:
        """None is used."""

    def capturable(self, stream: int) -> bool:
        return True

    def enqueue(self, stream: int) -> None:
        size = 4 * int(np.prod(self._shape))
        to, source = self._addresses["y"], self._addresses["x"]
        self._driver.copy_rows(to, source, stream, to_pitch=size, pitch=size, width=size, rows=1)


class MirrorDriver(CudaDriver):
    """The stand-ins of fake_device.py over a driver's own memory: they compute on the host, between two copies.

    New memory is full of ones bits: NaN, -1 and True. Nothing of the stand-ins can be captured.
    """

    def __init__(self, library: str | None, capability: str) -> None:
        super().__init__(library)
        self.memory: dict[int, NDArray[np.uint8]] = {}  # they name it; `view` needs none
        self._capability = capability
        self._filling = self.create_stream()
        self._thread = threading.local()

    def capability(self) -> str:
        """What the stand-ins' records say."""
        return self._capability

    def allocate(self, nbytes: int) -> int:
        address = super().allocate(nbytes)
        self._call("cuMemsetD8Async", address, 0xFF, nbytes, self._filling)
        self.synchronize(self._filling)
        return address

    def view(self, memory: object, address: int, nbytes: int) -> NDArray[np.uint8]:
        """A copy on the host for the next work that this thread puts into a stream."""
        buffer = PinnedBuffer(self, nbytes)
        self._thread.__dict__.setdefault("views", []).append((address, buffer, nbytes))
        return buffer.view((nbytes,), np.dtype(np.uint8))

    def put(self, stream: int, name: str, operation: object) -> None:
        """Carry work out, after what the stream holds already."""
        views = self._thread.__dict__.pop("views", [])
        held = [(address, buffer, nbytes) for address, buffer, nbytes in views if nbytes]
        for address, buffer, nbytes in held:
            self.to_host(buffer.address, address, nbytes, stream)
        self.synchronize(stream)
        before = [ctypes.string_at(buffer.address, nbytes) for _, buffer, nbytes in held]
        assert callable(operation)
        operation()
        for (address, buffer, nbytes), old in zip(held, before, strict=True):
            if ctypes.string_at(buffer.address, nbytes) != old:
                self.to_device(address, buffer.address, nbytes, stream)
        self.synchronize(stream)
