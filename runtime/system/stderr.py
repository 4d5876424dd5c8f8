"""What C libraries write to stderr while they decode: it belongs to nobody, and spoils a terminal and a log."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_STDERR = 2
_LOCK = threading.Lock()


@contextmanager
def dropped_from_stderr(lines: re.Pattern[bytes]) -> Iterator[list[bytes]]:
    """Hold the process's stderr back; at the end, its lines are written but for those that match.

    Other threads' lines come late; those that match are lost, too. Without a stderr, nothing happens. Gives a list that
    holds the lines that matched when the block has ended.

    Args:
        lines: matched at the start of a line.
    """
    with _LOCK:
        try:
            real = os.dup(_STDERR)
        except OSError:
            real = -1
        dropped: list[bytes] = []
        if real < 0:
            yield dropped
            return
        with tempfile.TemporaryFile() as held:
            os.dup2(held.fileno(), _STDERR)
            try:
                yield dropped
            finally:
                os.dup2(real, _STDERR)
                held.seek(0)
                kept: list[bytes] = []
                for line in held:
                    (dropped if lines.match(line) else kept).append(line)
                rest = b"".join(kept)
                with suppress(OSError):  # a closed pipe
                    while rest:
                        rest = rest[os.write(real, rest) :]
                os.close(real)
