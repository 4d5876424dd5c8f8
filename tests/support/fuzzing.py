"""Seeds of the fuzzers, and how many inputs each kind tried.

In the suite every kind runs a few fixed seeds. ``OMNIPORT_FUZZ_SEEDS=FIRST:COUNT`` runs others (``make fuzz``), each a
test of its own, so that a failure names the seed: ``OMNIPORT_FUZZ_SEEDS=N:1 pytest tests/fuzz -k KIND`` runs it again.
``OMNIPORT_FUZZ_LOG`` names a folder where the inputs are counted.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

#: how far the peak of memory may rise for one input
BYTES = 1 << 30
_ASKED = os.environ.get("OMNIPORT_FUZZ_SEEDS")
_LOG = os.environ.get("OMNIPORT_FUZZ_LOG")


def seeds(kind: str, few: int) -> list[int]:
    """Seeds to run: ``few`` of them in the suite."""
    first, count = map(int, _ASKED.split(":")) if _ASKED else (0, few)
    return list(range(first, first + count))


def note(kind: str, outcome: str = "tried") -> None:
    """Count one input of a kind."""
    if _LOG:
        with (Path(_LOG) / f"{kind}.{os.getpid()}").open("a") as file:
            file.write(outcome + "\n")


class Peak:
    """How far this process's memory rises from now on; not known, and 0, where there is no /proc."""

    def __init__(self) -> None:
        self._before = 0
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _status("VmRSS")

    def risen(self) -> int:
        """Bytes."""
        return max(0, _status("VmHWM") - self._before) if self._before else 0


def _status(field: str) -> int:
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) << 10
