"""The log of a server that must not tell what people said: neither its lines nor the errors in it."""

from __future__ import annotations

import asyncio
import copy
import logging
import threading
import traceback
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

from omniport.runtime.errors import BackendError, BuildError, BundleError

_LOG = logging.getLogger(__name__)
#: errors whose messages are about the bundle and the machine
_HARMLESS = (BackendError, BuildError, BundleError)
_Info = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class WithoutContent(logging.Formatter):
    """Of errors the classes and the places in the code, but not the messages, which may hold a prompt or a reply."""

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging.Formatter``."""
        record = copy.copy(record)
        record.exc_text = None  # what another handler has made of the error
        return super().format(record)

    def formatException(self, ei: _Info) -> str:
        """See ``logging.Formatter``."""
        return "" if ei[1] is None else "\n".join(_lines(ei[1]))


def _lines(error: BaseException) -> Iterator[str]:
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None:
        yield from _lines(cause)
    for frame in traceback.extract_tb(error.__traceback__):
        yield f"  {frame.filename}:{frame.lineno} in {frame.name}"
    message = f": {error}" if isinstance(error, _HARMLESS) else ""
    yield f"{type(error).__module__}.{type(error).__qualname__}{message}"


def set_up(*, quiet: bool, content: bool) -> None:
    """Write the log to stderr.

    Args:
        quiet: only what went wrong. content: of errors the messages as well, whatever they hold.
    """
    kind = logging.Formatter if content else WithoutContent
    handler = logging.StreamHandler()
    handler.setFormatter(kind("%(message)s" if quiet else "%(asctime)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.WARNING if quiet else logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # it would name WebSockets with their query
    threading.excepthook = lambda failed: _LOG.error(
        "a thread failed", exc_info=(failed.exc_type, failed.exc_value or failed.exc_type(), failed.exc_traceback)
    )


def log_failure(loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
    """For ``loop.set_exception_handler``: asyncio's own would show the objects around an error."""
    _LOG.error("%s", context["message"], exc_info=context.get("exception"))
