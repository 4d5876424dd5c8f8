"""Run blocking native calls on a worker thread, so that Ctrl-C works.

A Python signal handler runs in the main thread, and what it raises is lost if that thread is inside a native library's
call back into Python: TensorRT catches it and goes on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")

#: seconds between two looks
_POLL = 0.05


class Cancelled(BaseException):
    """Raised by cancelled work. Callers never see it: the reason for cancelling is raised instead."""


class _Outcome(Generic[T]):
    def __init__(self) -> None:
        self.value: T | None = None
        self.error: BaseException | None = None
        self.finished = threading.Event()

    def wait_out(self) -> None:
        """Wait for the end, whatever signals come: native code uses memory that this process would free."""
        while not self.finished.is_set():
            with suppress(KeyboardInterrupt, SystemExit):
                self.finished.wait()


def run_interruptible(work: Callable[[threading.Event], T], look: Callable[[], None]) -> T:
    """Run ``work`` on a worker thread and return its result.

    Args:
        work: called with an event that is set when its result is no longer wanted.
        look: called by this thread every 50 ms meanwhile.

    Raises:
        whatever ``work`` raises; or, after it has ended, the KeyboardInterrupt or SystemExit that cancelled it.
    """
    outcome: _Outcome[T] = _Outcome()
    cancelled = threading.Event()

    def run() -> None:
        try:
            outcome.value = work(cancelled)
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            outcome.error = error
        finally:
            outcome.finished.set()

    try:
        threading.Thread(target=run, name="omniport-build", daemon=True).start()
        # not Thread.join(): interrupted by an exception, it can take a thread for ended that still runs
        while not outcome.finished.wait(_POLL):
            look()
    except BaseException:
        cancelled.set()
        outcome.wait_out()
        raise
    if outcome.error is not None:
        raise outcome.error
    assert outcome.value is not None
    return outcome.value
