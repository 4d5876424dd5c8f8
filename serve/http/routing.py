"""From a path to its endpoint: what an endpoint gets, and how bodies and errors go in and out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from omniport.runtime.errors import OmniportError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..service import Service
from .api_errors import ApiError, from_runtime, not_ready

Endpoint = Callable[[Request, Service], Awaitable[Response]]
JSON, EVENTS = "application/json", "text/event-stream"


@dataclass(frozen=True, kw_only=True)
class Body:
    """What is read of a request.

    Attributes:
        record: that it is decoded into. media_type: of the body.
        more: JSON Schema of fields that are read apart from the record. needed: those of them that must be there.
        nulls: a field that is null counts as left out.
    """

    record: type[msgspec.Struct]
    media_type: str = JSON
    more: Mapping[str, Any] = field(default_factory=dict)
    needed: tuple[str, ...] = ()
    nulls: bool = False


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One method of one path.

    Attributes:
        prefixed: also under /v1, as OpenAI's clients ask for it; those whose base URL lacks it ask without.
        body: what is read; None without one.
        status, answers: of a success: its status, its media types.
        fails: statuses of errors, beside those that every operation has.
    """

    method: str
    path: str
    endpoint: Endpoint
    prefixed: bool = True
    body: Body | None = None
    status: int = 200
    answers: tuple[str, ...] = (JSON,)
    fails: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The path that it is known by."""
        return f"/v1{self.path}" if self.prefixed else self.path


def routes(service: Service, operation: Operation) -> list[Route]:
    """The routes of an operation."""

    async def respond(request: Request) -> Response:
        try:
            return await operation.endpoint(request, service)
        except OmniportError as error:
            told = from_runtime(error)
            if told is None:
                raise
            raise told from error

    vars(respond)["path"] = operation.name  # for the measurements
    paths = (operation.name, operation.path) if operation.prefixed else (operation.path,)
    return [Route(path, respond, methods=[operation.method]) for path in paths]


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An answer as JSON."""
    return Response(msgspec.json.encode(value), status, headers, JSON)


def require_ready(service: Service) -> None:
    """503 unless requests are answered now."""
    if service.state != "ready":
        raise not_ready(service.state)


def require_model(service: Service, name: str | None) -> None:
    """404 unless the server goes by that name, or by any."""
    if name not in (None, service.model) and not service.settings.any_model:
        raise ApiError(404, "model_not_found", f"there is no model {name!r}; this server has {service.model!r}")
