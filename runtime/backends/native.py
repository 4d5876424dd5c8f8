"""Objects of native libraries that own threads: a process that forks leaves the threads behind."""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Any, TypeVar

T = TypeVar("T")
_kept: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def keep_in_forks(native: T) -> T:
    """Let no fork of this process destroy the object: its library would join threads that are not there."""
    _kept[id(native)] = native
    return native


def _keep() -> None:
    for native in _kept.values():
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(native))


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_keep)
