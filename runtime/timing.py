"""Seconds spent in each stage of a reply."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["StageTimer"]


class StageTimer:
    """Adds up wall time by stage: ``with timer("dit"): ...``, from any thread."""

    def __init__(self) -> None:
        self.busy: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the time of a block towards ``stage``, also if it raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.busy[stage] = self.busy.get(stage, 0.0) + time.perf_counter() - start
