"""Measure the seconds spent in each stage of a reply."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Pace:
    """How fast speech was made of late: the quickest runs of the latest reply, in seconds.

    Attributes:
        evaluation: of the DiT, for a code. frame: of the vocoder, for a mel frame.
    """

    evaluation: float = math.inf
    frame: float = math.inf


class StageTimer:
    """Adds up wall time by stage: ``with timer("dit"): ...``, from any thread, without what was waited for a slot."""

    def __init__(self) -> None:
        self.busy: dict[str, float] = {}
        self._lock = threading.Lock()
        self._thread = threading.local()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the time of a block towards ``stage``, also if it raises."""
        start, before = time.perf_counter(), self.left_out
        try:
            yield
        finally:
            seconds = time.perf_counter() - start - (self.left_out - before)
            with self._lock:
                self.busy[stage] = self.busy.get(stage, 0.0) + seconds

    @property
    def left_out(self) -> float:
        """Seconds that the calling thread has waited for slots so far."""
        seconds: float = getattr(self._thread, "left_out", 0.0)
        return seconds

    def leave_out(self, seconds: float) -> None:
        """The calling thread has waited: these seconds count towards no stage."""
        self._thread.left_out = self.left_out + seconds
