"""The real `CudaDriver` over a stand-in for the driver's library, compiled from stub_cuda.c."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from omniport.runtime.backends.tensorrt.cuda_driver import CALLS, CudaDriver

SOURCE = Path(__file__).with_suffix(".c")
OUT_OF_MEMORY, LAUNCH_OUT_OF_RESOURCES, ILLEGAL_ADDRESS = 2, 701, 700
_BYTES, _STREAMS, _GRAPHS = range(3)
_HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def compiled(folder: Path) -> Path:
    """The library, for `Stub` to copy. Skips the test where nothing can compile it."""
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None or os.name != "posix":
        pytest.skip("no C compiler is here (cc, gcc, clang): the stand-in for the CUDA driver cannot be made")
    out = folder / "stub_cuda.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", out, SOURCE, "-lpthread"], check=True)
    return out


class Stub:
    """A library of one's own: what another test did to one is not seen here.

    Attributes:
        path: for `CudaDriver`.
    """

    def __init__(self, library: Path, folder: Path) -> None:
        self.path = str(shutil.copy(library, folder / "libcuda.so.1"))
        self._library = ctypes.CDLL(self.path)
        self._library.stub_fault.restype = ctypes.c_char_p
        self._library.stub_calls.restype = self._library.stub_left.restype = ctypes.c_long
        self._library.stub_holds.argtypes = (ctypes.c_uint64, ctypes.c_size_t)
        self._library.stub_room.argtypes = (ctypes.c_long,)
        self._library.stub_fail.argtypes = (ctypes.c_char_p, ctypes.c_long, ctypes.c_int)

    def fail(self, name: str, call: int, status: int) -> None:
        """Let a function fail once: in its first call from now, the second, ..."""
        self._library.stub_fail(name.encode(), call, status)

    def forgive(self) -> None:
        """No call fails any more."""
        for name in CALLS:
            self._library.stub_fail(name.encode(), 0, 0)

    def calls(self, name: str) -> int:
        """How often a function was called so far."""
        return int(self._library.stub_calls(name.encode()))

    def devices(self, count: int) -> None:
        """How many GPUs there are."""
        self._library.stub_devices(count)

    def room(self, nbytes: int) -> None:
        """Bytes that can be allocated from now on."""
        self._library.stub_room(nbytes)

    def holds(self, address: int, nbytes: int) -> bool:
        """Whether all of it lies in one block."""
        return bool(self._library.stub_holds(address, nbytes))

    @property
    def fault(self) -> str:
        """What the caller did that no driver would report; empty if nothing."""
        return str(self._library.stub_fault().decode())

    @property
    def left(self) -> tuple[int, int, int]:
        """Bytes, streams and graphs that were not given back."""
        return tuple(int(self._library.stub_left(what)) for what in (_BYTES, _STREAMS, _GRAPHS))  # type: ignore[return-value]


class StubDriver(CudaDriver):
    """`CudaDriver` over a stub; stand-ins for engines compute in its memory, in the order of its streams.

    Attributes:
        problems: what such a stand-in raised.
        done: names of the stand-ins' work that was carried out.
    """

    def __init__(self, stub: Stub) -> None:
        super().__init__(stub.path)
        self.stub = stub
        self.problems: list[BaseException] = []
        self.done: list[str] = []
        self.memory: dict[int, NDArray[np.uint8]] = {}
        self._operations: dict[int, tuple[str, Callable[[], object]]] = {}
        self._keys = itertools.count(1)
        self._callback = _HOST_FUNCTION(self._carry_out)
        function = ctypes.CDLL(stub.path).cuLaunchHostFunc
        function.argtypes = (ctypes.c_void_p, _HOST_FUNCTION, ctypes.c_void_p)
        self._functions["cuLaunchHostFunc"] = function

    def put(self, stream: int, name: str, operation: Callable[[], object]) -> None:
        """Add work to a stream, or to what is captured of it."""
        key = next(self._keys)
        self._operations[key] = (name, operation)
        self._call("cuLaunchHostFunc", stream, self._callback, key)

    def view(self, memory: Mapping[int, NDArray[np.uint8]], address: int, nbytes: int) -> NDArray[np.uint8]:
        """That many bytes, which have to lie in one block."""
        assert self.stub.holds(address, nbytes), f"{nbytes} bytes at {address:#x} are not allocated"
        held: Any = (ctypes.c_uint8 * nbytes).from_address(address)
        return np.frombuffer(memoryview(held), np.uint8)

    def _carry_out(self, key: int) -> None:
        name, operation = self._operations[key]
        try:
            operation()
            self.done.append(name)
        except BaseException as error:  # noqa: BLE001 - must not fly through C; the test looks at it
            self.problems.append(error)
