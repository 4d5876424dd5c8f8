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
def dropped_from_stderr(lines: re.Pattern[bytes]) -> Iterator[None]:
    """Hold the process's stderr back; at the end, its lines are written but for those that match.

    Other threads' lines come late; those that match are lost, too. Without a stderr, nothing happens.

    Args:
        lines: matched at the start of a line.
    """
    with _LOCK:
        try:
            real = os.dup(_STDERR)
        except OSError:
            real = -1
        if real < 0:
            yield
            return
        with tempfile.TemporaryFile() as held:
            os.dup2(held.fileno(), _STDERR)
            try:
                yield
            finally:
                os.dup2(real, _STDERR)
                held.seek(0)
                rest = b"".join(line for line in held if not lines.match(line))
                with suppress(OSError):  # a closed pipe
                    while rest:
                        rest = rest[os.write(real, rest) :]
                os.close(real)
