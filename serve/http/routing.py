"""From a path to its endpoint: what an endpoint gets, and how bodies and errors go in and out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
from omniport.runtime.errors import OmniportError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..service import Service
from .api_errors import ApiError, from_runtime, not_ready

Endpoint = Callable[[Request, Service], Awaitable[Response]]


def route(service: Service, method: str, path: str, endpoint: Endpoint, *, prefixed: bool = True) -> list[Route]:
    """The routes of an endpoint.

    Args:
        prefixed: also under /v1, as OpenAI's clients ask for it; those whose base URL lacks it ask without.
    """

    async def respond(request: Request) -> Response:
        try:
            return await endpoint(request, service)
        except OmniportError as error:
            told = from_runtime(error)
            if told is None:
                raise
            raise told from error

    vars(respond)["path"] = f"/v1{path}" if prefixed else path  # for the measurements
    return [Route(prefix + path, respond, methods=[method]) for prefix in (("/v1", "") if prefixed else ("",))]


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An answer as JSON."""
    return Response(msgspec.json.encode(value), status, headers, "application/json")


def require_ready(service: Service) -> None:
    """503 unless requests are answered now."""
    if service.state != "ready":
        raise not_ready(service.state)


def require_model(service: Service, name: str | None) -> None:
    """404 unless the server goes by that name, or by any."""
    if name not in (None, service.model) and not service.settings.any_model:
        raise ApiError(404, "model_not_found", f"there is no model {name!r}; this server has {service.model!r}")
