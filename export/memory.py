"""Resident memory of this process, as Linux counts it."""

from __future__ import annotations

import re
from pathlib import Path

_STATUS = Path("/proc/self/status")


def resident(field: str = "VmRSS") -> int:
    """A size from /proc/self/status in bytes; 0 where there is no such file.

    Args:
        field: VmRSS, RssAnon (what cannot be dropped and read again), RssFile.
    """
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


class MemoryWatch:
    """The most resident memory seen above what there was at the start.

    Samples, because the kernel's own high-water mark cannot be reset without touching what others may read.
    """

    def __init__(self) -> None:
        self._start = resident()
        self._peak = self._start

    def look(self) -> None:
        """Take a sample."""
        self._peak = max(self._peak, resident())

    def peak(self) -> int:
        """Bytes above the start; a last sample is taken."""
        self.look()
        return self._peak - self._start
