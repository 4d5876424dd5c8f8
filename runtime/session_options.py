"""Check the options that a session is opened with."""

from __future__ import annotations

import threading

from .errors import UsageError


def check_run_limit(run_limit: float | None) -> None:
    """Seconds that a run may take.

    Raises:
        UsageError: none, and not None.
    """
    if run_limit is not None and not 0 < run_limit <= threading.TIMEOUT_MAX:  # NaN is neither
        raise UsageError(f"run_limit is {run_limit!r}; seconds of more than 0 were expected, or None")


def context_size(asked: int | None, exported: int) -> int:
    """Capacity of the KV caches.

    Raises:
        UsageError: more than the bundle was exported or its engines were built for, or no number of tokens.
    """
    if asked is None:
        return exported
    if not isinstance(asked, int) or isinstance(asked, bool) or not 1 <= asked <= exported:
        raise UsageError(
            f"max_context is {asked!r}; 1 to {exported} tokens were expected, what the bundle was exported for or its "
            "engines were built for. Export or build with a larger --max-context for more"
        )
    return asked
