"""NVIDIA's driver itself, ``libcuda.so.1`` or ``nvcuda.dll``, called through ctypes.

The driver's own library is on every machine that has a GPU, in whatever release, and its calls keep their meaning from
release to release: nothing has to be installed that fits it. ctypes gives the GIL up for the length of a call. TensorRT
uses the primary context of the first GPU, so the same is used here, and streams and addresses are the same on both
sides.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

from ...errors import BackendError
from ...system.host import load_cuda

_INT, _UINT, _SIZE, _POINTER, _ADDRESS = (
    ctypes.c_int,
    ctypes.c_uint,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_uint64,
)


class _Side(ctypes.Structure):
    """Half of CUDA_MEMCPY2D: from where, or to where."""

    _fields_ = (
        ("x", _SIZE),
        ("y", _SIZE),
        ("kind", _UINT),
        ("host", _POINTER),
        ("device", _ADDRESS),
        ("array", _POINTER),
        ("pitch", _SIZE),
    )


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = (("source", _Side), ("to", _Side), ("width", _SIZE), ("rows", _SIZE))


#: the driver's calls that are used, with their arguments; all give a CUresult
CALLS: dict[str, tuple[Any, ...]] = {
    "cuInit": (_UINT,),
    "cuGetErrorName": (_INT, _POINTER),
    "cuGetErrorString": (_INT, _POINTER),
    "cuDeviceGetCount": (_POINTER,),
    "cuDeviceGet": (_POINTER, _INT),
    "cuDeviceGetName": (ctypes.c_char_p, _INT, _INT),
    "cuDeviceGetAttribute": (_POINTER, _INT, _INT),
    "cuDevicePrimaryCtxRetain": (_POINTER, _INT),
    "cuCtxSetCurrent": (_POINTER,),
    "cuMemGetInfo_v2": (_POINTER, _POINTER),
    "cuMemAlloc_v2": (_POINTER, _SIZE),
    "cuMemFree_v2": (_ADDRESS,),
    "cuMemAllocHost_v2": (_POINTER, _SIZE),
    "cuMemFreeHost": (_POINTER,),
    "cuMemcpyHtoDAsync_v2": (_ADDRESS, _POINTER, _SIZE, _POINTER),
    "cuMemcpyDtoHAsync_v2": (_POINTER, _ADDRESS, _SIZE, _POINTER),
    "cuMemcpy2DAsync_v2": (_POINTER, _POINTER),
    "cuMemsetD8Async": (_ADDRESS, ctypes.c_ubyte, _SIZE, _POINTER),
    "cuStreamCreate": (_POINTER, _UINT),
    "cuStreamDestroy_v2": (_POINTER,),
    "cuStreamSynchronize": (_POINTER,),
    "cuStreamBeginCapture_v2": (_POINTER, _INT),
    "cuStreamEndCapture": (_POINTER, _POINTER),
    "cuGraphInstantiateWithFlags": (_POINTER, _POINTER, ctypes.c_ulonglong),
    "cuGraphLaunch": (_POINTER, _POINTER),
    "cuGraphDestroy": (_POINTER,),
    "cuGraphExecDestroy": (_POINTER,),
}

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
_ON_DEVICE = 2  # CU_MEMORYTYPE_DEVICE
_OUT_OF_MEMORY = 2
#: no GPU, or a driver that does not go with it or with the container
_NOT_READY = frozenset({34, 100, 101, 802, 803, 804})
#: after these the context is lost with all its memory, and a process has no other: every further call fails alike
_FATAL = frozenset({4, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721})

#: what the thread would have given back while it captured a stream; the driver forbids it meanwhile
_thread = threading.local()


class CudaDriver:
    """The process' first GPU (``CUDA_VISIBLE_DEVICES`` chooses it).

    Args:
        library: path of the driver's library; the system's by default.

    Raises:
        BackendError: there is no driver or no GPU, or the driver is too old.
    """

    def __init__(self, library: str | None = None) -> None:
        self._functions = _functions(load_cuda(library))
        self._check("cuInit", 0)
        if not self._value("cuDeviceGetCount", _INT()):
            raise BackendError("the CUDA driver sees no GPU: check CUDA_VISIBLE_DEVICES")
        self._device = self._value("cuDeviceGet", _INT(), 0)
        self._context = self._value("cuDevicePrimaryCtxRetain", _POINTER(), self._device)  # TensorRT holds it as well

    def capability(self) -> str:
        major, minor = (
            self._value("cuDeviceGetAttribute", _INT(), number, self._device) for number in (_MAJOR, _MINOR)
        )
        return f"{major}.{minor}"

    def device_name(self) -> str:
        name = ctypes.create_string_buffer(256)
        self._check("cuDeviceGetName", name, len(name), self._device)
        return name.value.decode(errors="replace")

    def allocate(self, nbytes: int) -> int:
        return self._allocate("cuMemAlloc_v2", _ADDRESS(), nbytes)

    def free(self, address: int) -> None:
        self._give_back("cuMemFree_v2", address)

    def allocate_host(self, nbytes: int) -> int:
        return self._allocate("cuMemAllocHost_v2", _POINTER(), nbytes)

    def free_host(self, address: int) -> None:
        self._give_back("cuMemFreeHost", address)

    def to_device(self, device: int, host: int, nbytes: int, stream: int) -> None:
        self._call("cuMemcpyHtoDAsync_v2", device, host, nbytes, stream)

    def to_host(self, host: int, device: int, nbytes: int, stream: int) -> None:
        self._call("cuMemcpyDtoHAsync_v2", host, device, nbytes, stream)

    def copy_rows(self, to: int, source: int, stream: int, *, to_pitch: int, pitch: int, width: int, rows: int) -> None:
        copy = _Copy2D(
            source=_Side(kind=_ON_DEVICE, device=source, pitch=pitch),
            to=_Side(kind=_ON_DEVICE, device=to, pitch=to_pitch),
            width=width,
            rows=rows,
        )
        self._call("cuMemcpy2DAsync_v2", ctypes.byref(copy), stream)

    def zero(self, device: int, nbytes: int, stream: int) -> None:
        self._call("cuMemsetD8Async", device, 0, nbytes, stream)

    def create_stream(self) -> int:
        self._enter()
        return self._value("cuStreamCreate", _POINTER(), _NON_BLOCKING)

    def destroy_stream(self, stream: int) -> None:
        self._give_back("cuStreamDestroy_v2", stream)

    def synchronize(self, stream: int) -> None:
        self._call("cuStreamSynchronize", stream)

    def capture(self, stream: int, body: Callable[[], None]) -> int:
        """Other threads may go on allocating memory meanwhile; what this one gives back waits for the end."""
        waiting: list[tuple[Callable[[str, int], None], str, int]] = []
        _thread.waiting = waiting
        try:
            graph = self._capture(stream, body)
            try:
                return self._value("cuGraphInstantiateWithFlags", _POINTER(), graph, 0)
            finally:
                self._functions["cuGraphDestroy"](graph)
        finally:
            _thread.waiting = None
            for give_back, name, handle in waiting:
                give_back(name, handle)

    def launch(self, graph: int, stream: int) -> None:
        self._call("cuGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        self._give_back("cuGraphExecDestroy", graph)

    def _capture(self, stream: int, body: Callable[[], None]) -> int:
        """The graph as it was captured, not yet one that can be launched."""
        self._call("cuStreamBeginCapture_v2", stream, _THREAD_LOCAL)
        try:
            body()
            self._enter()
        except BaseException:
            graph = _POINTER()  # the stream has to leave capture mode in any case
            self._functions["cuStreamEndCapture"](stream, ctypes.byref(graph))
            if graph.value:
                self._functions["cuGraphDestroy"](graph)
            raise
        graph = _POINTER()
        self._check("cuStreamEndCapture", stream, ctypes.byref(graph))
        return graph.value or 0

    def _enter(self) -> None:
        """Make the context the thread's own. Always: another library may have set one since."""
        self._check("cuCtxSetCurrent", self._context)

    def _call(self, name: str, *arguments: Any) -> None:
        self._enter()
        self._check(name, *arguments)

    def _value(self, name: str, out: Any, *arguments: Any) -> int:
        """One call that gives a value through its first argument."""
        self._check(name, ctypes.byref(out), *arguments)
        return int(out.value or 0)

    def _allocate(self, name: str, out: Any, nbytes: int) -> int:
        self._enter()
        status = self._functions[name](ctypes.byref(out), nbytes)
        if status == _OUT_OF_MEMORY:
            raise BackendError(
                f"the GPU has no room for {nbytes:,} bytes more ({self._room()}): open the session with a smaller "
                "max_context, close other programs, or export in a smaller --precision"
            )
        if status:
            raise self._error(name, status)
        return int(out.value)

    def _room(self) -> str:
        free, total = _SIZE(), _SIZE()
        if self._functions["cuMemGetInfo_v2"](ctypes.byref(free), ctypes.byref(total)):
            return "the driver does not say how many are free"
        return f"{free.value:,} of {total.value:,} are free"

    def _give_back(self, name: str, handle: int) -> None:
        waiting = getattr(_thread, "waiting", None)
        if waiting is not None:  # the garbage collector runs on whichever thread it likes, one that captures too
            waiting.append((self._give_back, name, handle))
        else:
            self._functions["cuCtxSetCurrent"](self._context)
            self._functions[name](handle)

    def _check(self, name: str, *arguments: Any) -> None:
        if status := self._functions[name](*arguments):
            raise self._error(name, status)

    def _error(self, name: str, status: int) -> BackendError:
        message = f"{name} of the CUDA driver failed: {self._text('cuGetErrorName', status) or f'error {status}'}"
        if text := self._text("cuGetErrorString", status):
            message += f" ({text})"
        if status in _FATAL:
            return BackendError(
                f"{message}. The GPU's work and memory in this process are lost, and no session can be opened in it "
                "again: restart the process"
            )
        if status in _NOT_READY:
            return BackendError(f"{message}. Update the NVIDIA driver; 'omniport doctor' says what is here")
        if status == _OUT_OF_MEMORY:
            return BackendError(
                f"{message}. {self._room()[0].upper()}{self._room()[1:]}: close other programs, or open the session "
                "with a smaller max_context"
            )
        return BackendError(f"{message}. 'omniport doctor' says what is here; open the session again")

    def _text(self, name: str, status: int) -> str:
        text = ctypes.c_char_p()
        self._functions[name](status, ctypes.byref(text))
        return (text.value or b"").decode(errors="replace")


def _functions(library: Any) -> dict[str, Callable[..., int]]:
    found: dict[str, Callable[..., int]] = {}
    for name, arguments in CALLS.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise BackendError(f"the NVIDIA driver is too old: it has no {name}. Update the driver") from error
        function.argtypes, function.restype = arguments, _INT
        found[name] = function
    return found
