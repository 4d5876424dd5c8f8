"""Keep weights that are read or written once out of the system's page cache.

Weights go through a program once. Left in the page cache, twice the model's size pushes out what other programs use
there, and finding room for it costs more processor time than the disk takes: docs/results/real-sizes.md has a copy that
is released beside one that is not. Where a system cannot be told (Windows, macOS), or a file system takes no
advice, nothing is done.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def expect(fd: int, first: int, count: int) -> None:
    """Have the system fetch these bytes of a file while what is read first is worked on."""
    if sys.platform != "win32" and hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(fd, first, count, os.POSIX_FADV_WILLNEED)


def forget(fd: int, first: int, count: int) -> None:
    """These bytes of a file are not soon used again: what is on the disk of them is dropped, the rest is on its way."""
    if sys.platform != "win32" and hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(fd, first, count, os.POSIX_FADV_DONTNEED)


class WriteBehind:
    """Keeps the disk busy while a file grows, and no more than some steps of it in the page cache.

    Left alone, the system writes nothing for seconds, and then holds up whoever writes.
    """

    #: bytes between two orders to write
    STEP = 32 << 20
    #: steps that have had the time of as many others to reach the disk when they are asked for once more
    BEHIND = 2

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._ordered = 0

    def wrote(self, end: int) -> None:
        """The file is complete up to ``end`` now."""
        if end - self._ordered >= self.STEP:
            first = max(0, self._ordered - self.BEHIND * self.STEP)
            forget(self._fd, first, end - first)
            self._ordered = end
