"""CUDA calls that engines need: memory, copies, streams, captured graphs.

`Driver` is what the backend asks for; `CudaDriver` gives it through cuda-bindings' runtime API, which needs no toolkit,
and which is imported when first used. Tests replace it with a stand-in that has its own memory.
"""

from __future__ import annotations

import ctypes
import importlib
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...errors import BackendError


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


class CudaDriver:
    """The process' first GPU (``CUDA_VISIBLE_DEVICES`` chooses it) through cuda-bindings.

    Raises:
        BackendError: cuda-bindings is missing, there is no GPU, or its driver is too old for cuda-bindings.
    """

    def __init__(self) -> None:
        self._api = _import_runtime()
        if not self._call("cudaGetDeviceCount"):
            raise BackendError("the CUDA driver sees no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES")

    def capability(self) -> str:
        kind = self._api.cudaDeviceAttr
        major = self._call("cudaDeviceGetAttribute", kind.cudaDevAttrComputeCapabilityMajor, 0)
        minor = self._call("cudaDeviceGetAttribute", kind.cudaDevAttrComputeCapabilityMinor, 0)
        return f"{major}.{minor}"

    def device_name(self) -> str:
        return bytes(self._call("cudaGetDeviceProperties", 0).name).rstrip(b"\0").decode(errors="replace")

    def allocate(self, nbytes: int) -> int:
        return int(self._call("cudaMalloc", nbytes))

    def free(self, address: int) -> None:
        self._api.cudaFree(address)

    def allocate_host(self, nbytes: int) -> int:
        return int(self._call("cudaMallocHost", nbytes))

    def free_host(self, address: int) -> None:
        self._api.cudaFreeHost(address)

    def to_device(self, device: int, host: int, nbytes: int, stream: int) -> None:
        self._call("cudaMemcpyAsync", device, host, nbytes, self._api.cudaMemcpyKind.cudaMemcpyHostToDevice, stream)

    def to_host(self, host: int, device: int, nbytes: int, stream: int) -> None:
        self._call("cudaMemcpyAsync", host, device, nbytes, self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost, stream)

    def copy_rows(self, to: int, source: int, stream: int, *, to_pitch: int, pitch: int, width: int, rows: int) -> None:
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpy2DAsync", to, to_pitch, source, pitch, width, rows, kind, stream)

    def zero(self, device: int, nbytes: int, stream: int) -> None:
        self._call("cudaMemsetAsync", device, 0, nbytes, stream)

    def create_stream(self) -> int:
        return int(self._call("cudaStreamCreateWithFlags", self._api.cudaStreamNonBlocking))

    def destroy_stream(self, stream: int) -> None:
        self._api.cudaStreamDestroy(stream)

    def synchronize(self, stream: int) -> None:
        self._call("cudaStreamSynchronize", stream)

    def capture(self, stream: int, body: Callable[[], None]) -> int:
        """Other threads may go on allocating memory meanwhile."""
        self._call("cudaStreamBeginCapture", stream, self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            body()
        except BaseException:
            _, graph = self._api.cudaStreamEndCapture(stream)  # the stream has to leave capture mode in any case
            if graph is not None:
                self._api.cudaGraphDestroy(graph)
            raise
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return int(self._call("cudaGraphInstantiate", graph, 0))
        finally:
            self._api.cudaGraphDestroy(graph)

    def launch(self, graph: int, stream: int) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        self._api.cudaGraphExecDestroy(graph)

    def _call(self, name: str, *arguments: Any) -> Any:
        """One call; gives what it returns besides its status."""
        status, *values = getattr(self._api, name)(*arguments)
        if status != self._api.cudaError_t.cudaSuccess:
            raise BackendError(self._explain(name, status, arguments))
        return values[0] if values else None

    def _explain(self, name: str, status: Any, arguments: tuple[Any, ...]) -> str:
        error = self._api.cudaError_t
        text = self._api.cudaGetErrorString(status)[1].decode()
        self._api.cudaGetLastError()  # an error that is not fatal must not be met again by the next call
        message = f"{name} of the CUDA runtime failed: {error(status).name} ({text})"
        if status == error.cudaErrorMemoryAllocation:
            _, free, total = self._api.cudaMemGetInfo()
            return (
                f"the GPU has no room for {arguments[0]:,} bytes more ({free:,} of {total:,} are free): open the "
                "session with a smaller max_context, close other programs, or export in a smaller --precision"
            )
        if status in (error.cudaErrorInsufficientDriver, error.cudaErrorNoDevice):
            return (
                f"{message}. The NVIDIA driver is missing or older than cuda-bindings: update the driver, or pip "
                "install 'cuda-bindings' of the CUDA release that nvidia-smi shows; 'omniport doctor' says what is here"
            )
        return f"{message}. Check nvidia-smi and open the session again"


def _import_runtime() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise BackendError(
            f"cuda-bindings is not installed ({error}): pip install 'omniport[trt]' or 'omniport[rtx]'"
        ) from error
