"""What is open when the interpreter ends is closed first.

A script that ends in the middle of a reply, by an error or by its last line, leaves threads inside native code. Their
return into an interpreter that is gone ends the process by a signal, instead of with the script's own status.
"""

from __future__ import annotations

import atexit
from contextlib import suppress
from typing import Protocol
from weakref import WeakSet


class Closable(Protocol):
    """What has threads, and waits for them when it is closed; closing twice does nothing."""

    def close(self) -> None:
        """Stop and wait."""


_open: WeakSet[Closable] = WeakSet()


def close_at_exit(thing: Closable) -> None:
    """Close it when the interpreter ends, if it is still there."""
    _open.add(thing)


@atexit.register
def _close_all() -> None:
    for thing in tuple(_open):
        with suppress(Exception):  # the others are closed all the same
            thing.close()
