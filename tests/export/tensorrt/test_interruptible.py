"""Native work on a thread of its own: results, errors, and signals that come while it runs."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from omniport.export.tensorrt.interruptible import Cancelled, run_interruptible
from support.signals import handled


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as in a terminal, whatever started the tests."""
    with handled(signal.SIGINT):
        yield


def interrupt_after(*delays: float) -> threading.Thread:
    """Send this process SIGINT, each so many seconds after the one before."""

    def send() -> None:
        for delay in delays:
            time.sleep(delay)
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_results_and_errors_come_back() -> None:
    looks: list[int] = []
    assert run_interruptible(lambda _: (time.sleep(0.2), 7)[1], lambda: looks.append(1)) == 7
    assert len(looks) >= 2
    with pytest.raises(ZeroDivisionError):
        run_interruptible(lambda _: 1 // 0, lambda: None)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_waits_for_the_work_to_end() -> None:
    ended: list[float] = []

    def work(cancelled: threading.Event) -> int:
        assert cancelled.wait(10)
        time.sleep(0.3)  # as a compiler that looks only now and then
        ended.append(time.perf_counter())
        raise Cancelled

    sender = interrupt_after(0.2)
    with pytest.raises(KeyboardInterrupt):
        run_interruptible(work, lambda: None)
    assert ended
    assert ended[0] <= time.perf_counter()
    sender.join()


@pytest.mark.usefixtures("interruptible")
def test_a_second_interrupt_does_not_leave_the_work_behind() -> None:
    ended: list[int] = []

    def work(cancelled: threading.Event) -> int:
        cancelled.wait(10)
        time.sleep(0.5)
        ended.append(1)
        return 0

    sender = interrupt_after(0.2, 0.1, 0.1)
    with pytest.raises(KeyboardInterrupt):
        run_interruptible(work, lambda: None)
    assert ended == [1]
    sender.join()


def test_what_looking_raises_cancels_too() -> None:
    cancelled_at: list[bool] = []

    def work(cancelled: threading.Event) -> int:
        cancelled_at.append(cancelled.wait(10))
        return 0

    def look() -> None:
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        run_interruptible(work, look)
    assert cancelled_at == [True]
