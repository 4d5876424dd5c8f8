"""Keep a thread's signal stack as it is while a library is loaded that sets its own."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Stack(ctypes.Structure):
    """stack_t of Linux."""

    _fields_ = (("base", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """The alternate signal stack of this thread is the same after the block.

    OpenVINO's CPU plugin (2026.4) gives the thread that loads it one of its own, and frees that when the plugin
    goes, in whichever thread that is. If it is another, the first thread's next signal (Ctrl-C, SIGTERM) finds no
    memory there and ends the process: Python's handlers run on that stack.
    """
    if sys.platform != "linux":
        yield
        return
    call, before = ctypes.CDLL(None).sigaltstack, _Stack()
    known = call(None, ctypes.byref(before)) == 0
    try:
        yield
    finally:
        if known:
            call(ctypes.byref(before), None)
