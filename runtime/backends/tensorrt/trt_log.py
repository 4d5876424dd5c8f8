"""The process's one TensorRT logger, with a listener for each user.

TensorRT keeps the first logger that a process gives it for good. So there is one for each package, whether it builds or
runs, and it hands every message to whoever listens.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import Any

_KEPT = ("INTERNAL_ERROR", "ERROR", "WARNING")
#: messages that a listener holds at most: nobody reads those of a session that runs well
_MOST = 1000


class Messages:
    """What TensorRT said to one listener since it last asked: (severity, text), warnings and errors."""

    def __init__(self) -> None:
        self._held: deque[tuple[str, str]] = deque(maxlen=_MOST)
        self._lock = threading.Lock()

    def add(self, severity: str, text: str) -> None:
        """Called by the logger, from any thread."""
        with self._lock:
            self._held.append((severity, text))

    def take(self) -> list[tuple[str, str]]:
        """All of them; they are gone then."""
        with self._lock:
            taken = list(self._held)
            self._held.clear()
        return taken

    def reason(self) -> str:
        """The errors in one line, for a message; all is taken."""
        errors = [" ".join(text.split()) for severity, text in self.take() if severity != "WARNING"]
        return "; ".join(errors)[:800] or "it gives no reason"


_loggers: dict[str, Any] = {}
_lock = threading.Lock()


def listen(builder: str, module: Any) -> tuple[Any, Messages]:
    """The process's logger of a package, and a listener of one's own.

    Args:
        builder: ``tensorrt`` or ``tensorrt-rtx``.
        module: its Python module.
    """
    with _lock:
        if builder not in _loggers:
            _loggers[builder] = _make_logger(module)
        logger = _loggers[builder]
    messages = Messages()
    logger.listeners.add(messages)
    return logger, messages


def _make_logger(module: Any) -> Any:
    class Caught(module.ILogger):  # type: ignore[misc]  # a base class known at run time only
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.listeners: weakref.WeakSet[Messages] = weakref.WeakSet()

        def log(self, severity: Any, message: str) -> None:
            if severity.name in _KEPT:
                for messages in tuple(self.listeners):
                    messages.add(severity.name, message)

    return Caught()
