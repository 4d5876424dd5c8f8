"""The memory of this process: its peak, and giving back what was freed."""

from __future__ import annotations

import ctypes
import gc
import re
import resource
import sys
from pathlib import Path


def give_back() -> None:
    """Collect garbage and return freed memory to the system.

    glibc keeps freed blocks below 32 MiB for later. A part's weights leave hundreds of MiB of them, which the next
    part, of other shapes, cannot use: without this the peak grows from part to part.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:  # musl has none
        trim(0)


def peak_memory() -> int:
    """Largest resident set of this process so far, in bytes."""
    try:
        # ru_maxrss would remember the process that started this one
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:  # not Linux
        found = None
    if found is not None:
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
