"""Write a file of weights front to back on a background thread, hashing it on the way.

Reading and converting the next weights goes on meanwhile, and no byte is read back for its checksum, by when it would
have left the page cache. At most three pieces are in memory: one being written, one waiting and one being made.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..system.page_cache import WriteBehind
from .manifest import FileRecord

#: file offsets of weights, so that runtimes can map them
ALIGNMENT = 4096

Array = NDArray[Any]


class DataFile:
    """A new file. ``end`` is its length once everything that was appended is written.

    Used as a context: leaving it waits until everything is written, or gives up what is not when the block failed.

    Raises:
        OSError: from ``append``, ``finish`` or the end of the block, if writing failed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.end = 0
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by _stop
        self._digest = hashlib.sha256()
        self._written = 0
        self._behind = WriteBehind(self._file.fileno())
        self._pieces: queue.Queue[memoryview | None] = queue.Queue(maxsize=1)
        self._failure: OSError | None = None
        self._thread = threading.Thread(target=self._write, name="omniport-write", daemon=True)
        self._thread.start()

    def __enter__(self) -> DataFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._stop()
        if kind is None:
            self._raise()

    def align(self) -> int:
        """Fill up with zeros to the next offset at which a weight may begin, and return it."""
        gap = -self.end % ALIGNMENT
        if gap:
            self.append(np.zeros(gap, np.uint8))
        return self.end

    def append(self, array: Array) -> None:
        """Write the bytes of an array, which is not to be changed afterwards."""
        self._raise()
        view = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        self._pieces.put(view)
        self.end += len(view)

    def finish(self) -> FileRecord:
        """Wait until everything is written; size and sha256 of the file."""
        self._stop()
        self._raise()
        return FileRecord(size=self.end, sha256=self._digest.hexdigest())

    def _stop(self) -> None:
        if self._thread.is_alive():
            self._pieces.put(None)
            self._thread.join()
        self._file.close()

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _write(self) -> None:
        while (piece := self._pieces.get()) is not None:
            if self._failure is None:
                try:
                    self._put(piece)
                except OSError as error:  # raised where the caller sees it; what comes is still taken, and dropped
                    self._failure = error

    def _put(self, piece: memoryview) -> None:
        for first in range(0, len(piece), WriteBehind.STEP):
            part = piece[first : first + WriteBehind.STEP]
            self._digest.update(part)
            while part:
                count = self._file.write(part)
                part, self._written = part[count:], self._written + count
            self._behind.wrote(self._written)
