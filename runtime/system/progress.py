"""Progress of long work: what library functions call, and a count that goes on over stages."""

from __future__ import annotations

from collections.abc import Callable

#: progress(stage, units done, units in all)
Progress = Callable[[str, int, int], None]
#: say(one line of text)
Say = Callable[[str], None]


class StageProgress:
    """Counts units of work over all stages; tells ``told`` at each stage's beginning and after each advance."""

    def __init__(self, told: Progress | None, total: int) -> None:
        self._told, self._total = told, total
        self._stage, self._done = "", 0

    def enter(self, stage: str) -> None:
        """Begin a stage."""
        self._stage = stage
        self.advance(0)

    def advance(self, units: int) -> None:
        """Count units that were done."""
        self._done += units
        if self._told is not None:
            self._told(self._stage, min(self._done, self._total), self._total)
