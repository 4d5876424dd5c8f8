"""One bar over stages whose own progress begins again with every part."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from omniport.runtime.system.progress import Progress

#: steps of the whole
STEPS = 1000


class WholeProgress:
    """Tells of stages as shares of a whole; the bar never goes back.

    Args:
        told: the caller's progress; None is told nothing.
        shares: stage -> how much of the whole it is, in the order in which they come.
        parts: names that a stage does one after the other.
    """

    def __init__(self, told: Progress | None, shares: Mapping[str, float], parts: Sequence[str]) -> None:
        self._told, self._shares, self._parts = told, shares, parts
        self._whole = sum(shares.values())
        self._done = 0.0

    def stage(self, name: str, by_part: bool) -> Progress:
        """The progress of a stage.

        Args:
            by_part: it counts anew for each part, which its text names.
        """
        names = list(self._shares)
        before = sum(self._shares[each] for each in names[: names.index(name)])

        def tell(text: str, done: int, total: int) -> None:
            share = min(1.0, done / total) if total > 0 else 0.0
            if by_part:
                words = re.findall(r"\w+", text)
                part = next((i for i, each in enumerate(self._parts) if each in words), None)
                share = 0.0 if part is None else (part + share) / len(self._parts)
            self._done = max(self._done, (before + share * self._shares[name]) / self._whole)
            if self._told is not None:
                self._told(f"{name}: {text}", int(self._done * STEPS), STEPS)

        return tell
