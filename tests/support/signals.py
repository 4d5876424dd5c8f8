"""Signals that come in the middle of a call, and never end the process of the tests."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def handled(number: int, handler: Any = signal.default_int_handler) -> Iterator[None]:
    """This handler, and what was there before at the end: a shell's background job hands down SIGINT as ignored."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


class SignalAt:
    """In the block, the first call of ``owner.name`` raises a signal; ``sent`` says whether.

    Only the main thread's calls count, as its handlers are the ones that run: another thread that removes a file could
    raise the signal when its handler is gone, and would end the process. For the same reason nothing is raised where
    nobody handles it.

    Args:
        after: raise it when the call is done, not before.
    """

    def __init__(self, number: int, owner: Any, name: str, *, after: bool = False) -> None:
        self.sent = False
        self._number, self._owner, self._name, self._after = number, owner, name, after

    def __enter__(self) -> SignalAt:
        call = getattr(self._owner, self._name)

        def interrupted(*arguments: Any, **options: Any) -> Any:
            if self._after:
                result = call(*arguments, **options)
                self._raise()
                return result
            self._raise()
            return call(*arguments, **options)

        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(self._owner, self._name, interrupted)
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def _raise(self) -> None:
        here = threading.current_thread() is threading.main_thread()
        if here and not self.sent and callable(signal.getsignal(self._number)):
            self.sent = True
            signal.raise_signal(self._number)
