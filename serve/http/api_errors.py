"""Errors as OpenAI's clients read them: a status, and ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
import math
import re
from typing import Any

import msgspec
from omniport.runtime.errors import (
    Busy,
    MediaError,
    OmniportError,
    PromptError,
    PromptTooLong,
    UnknownVoice,
    UsageError,
)
from starlette.responses import Response

_LOG = logging.getLogger(__name__)

#: how messages of the runtime name what they are about
_PATH = re.compile(r"(?:messages|tools|stop\b)(?:\[\d+\])?(?:\.\w+|\[\d+\])*")
_CODES: tuple[tuple[type[OmniportError], str], ...] = (
    (PromptTooLong, "context_length_exceeded"),
    (UnknownVoice, "voice_not_found"),
    (PromptError, "invalid_value"),
    (MediaError, "invalid_value"),
    (UsageError, "invalid_value"),
)


class ErrorDetails(msgspec.Struct, frozen=True):
    """What went wrong; the fields are those of ``ApiError``."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of an answer that is an error."""

    error: ErrorDetails


class ApiError(Exception):
    """An error that a client is told.

    Args:
        status: of HTTP.
        code: for programs. message: for people. param: path of the field that is wrong.
        kind: OpenAI's ``type``.
        retry_after: seconds after which it may go better.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        kind: str = "invalid_request_error",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.kind = status, code, param, kind
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        details = ErrorDetails(message=str(self), type=self.kind, param=self.param, code=self.code)
        body: dict[str, Any] = msgspec.to_builtins(ErrorBody(error=details))
        return body

    def response(self) -> Response:
        """The whole answer, which tells clients whether and when to try again."""
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(math.ceil(self.retry_after))
            headers["retry-after-ms"] = str(round(self.retry_after * 1000))
        elif self.status < 500:
            headers["x-should-retry"] = "false"
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return Response(msgspec.json.encode(self.body()), self.status, headers, "application/json")


def invalid(message: str, param: str | None = None) -> ApiError:
    """400: a value that cannot be."""
    return ApiError(400, "invalid_value", message, param=param)


def unsupported(param: str, message: str) -> ApiError:
    """400: a parameter that this server does not have, or only at its default."""
    return ApiError(400, "unsupported_parameter", message, param=param)


def busy(retry_after: float) -> ApiError:
    """429: as many replies wait as may."""
    return ApiError(
        429,
        "session_limit_reached",
        "no session is free: all are in use and the queue is full. Try again later",
        kind="rate_limit_error",
        retry_after=retry_after,
    )


def not_ready(state: str) -> ApiError:
    """503: the server is loading or draining."""
    return ApiError(503, "not_ready", f"the server is {state}; try again", kind="server_error", retry_after=2.0)


def internal(request_id: str) -> ApiError:
    """500, without what went wrong, which stands in the server's log."""
    message = f"internal error; the server's log tells more of request {request_id}"
    return ApiError(500, "internal_error", message, kind="server_error")


def from_runtime(error: OmniportError, param: str | None = None) -> ApiError | None:
    """What a client is told of an error of the runtime; None where it is no fault of the client's.

    Args:
        param: path of the field, if the caller knows it better than the message.
    """
    if isinstance(error, Busy):
        return busy(error.seconds)
    for kind, code in _CODES:
        if isinstance(error, kind):
            if param is None and (found := _PATH.match(str(error))):
                param = found[0]
            return ApiError(400, code, str(error), param=param)
    return None


def told_late(error: Exception) -> ApiError:
    """What a client is told of a reply that fails while it is sent."""
    if isinstance(error, ApiError):
        return error
    told = from_runtime(error) if isinstance(error, OmniportError) else None
    if told is None:
        _LOG.error("a reply failed while it was sent", exc_info=error)
        told = ApiError(500, "internal_error", "internal error; the server's log tells more", kind="server_error")
    return told
