"""The server as an ASGI application."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.types import Scope
from starlette.websockets import WebSocket

from .http import chat, model_list, operations, speech_route, transcription
from .http.access import Access
from .http.api_errors import ApiError
from .http.request_scope import RequestScope
from .http.routing import route
from .page.assets import page_routes
from .realtime.client_secrets import create_secret
from .realtime.connection import realtime
from .service import Service

_EXPOSED = ("x-request-id", "x-omniport-voice", "retry-after", "retry-after-ms", "x-should-retry")


def make_app(service: Service) -> Starlette:
    """The application over a service, which its caller starts and closes."""
    settings, measured = service.settings, service.measurements

    def counted(scope: Scope, status: int) -> None:
        measured.request(getattr(scope.get("endpoint"), "path", "other"), status)

    layers = [Middleware(RequestScope, limits=settings.limits, counted=counted)]
    if settings.origins:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=_EXPOSED,
            )
        )
    layers.append(Middleware(Access, settings=settings))
    handlers = {ApiError: _told, HTTPException: _http_error}
    return Starlette(routes=list(_routes(service)), middleware=layers, exception_handlers=handlers)


def _routes(service: Service) -> Iterable[BaseRoute]:
    yield from page_routes(service)
    yield from route(service, "GET", "/health", operations.health, prefixed=False)
    yield from route(service, "GET", "/ready", operations.ready, prefixed=False)
    yield from route(service, "GET", "/version", operations.get_version, prefixed=False)
    yield from route(service, "GET", "/metrics", operations.metrics, prefixed=False)
    yield from route(service, "GET", "/omniport/capacity", operations.capacity)
    yield from route(service, "POST", "/omniport/drain", operations.drain)
    yield from route(service, "POST", "/chat/completions", chat.chat)
    yield from route(service, "POST", "/audio/speech", speech_route.speak)
    yield from route(service, "GET", "/audio/voices", speech_route.list_voices)
    yield from route(service, "POST", "/audio/transcriptions", transcription.transcribe)
    yield from route(service, "POST", "/audio/translations", transcription.translate)
    yield from route(service, "GET", "/models", model_list.list_models)
    yield from route(service, "GET", "/models/{model:path}", model_list.get_model)

    yield from route(service, "POST", "/realtime/client_secrets", create_secret)

    async def converse(websocket: WebSocket) -> None:
        await realtime(websocket, service)

    for path in ("/v1/realtime", "/realtime"):
        yield WebSocketRoute(path, converse)


async def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses: unknown paths, and methods that a path does not have."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    message = f"{request.method} {request.url.path}: {error.detail}"
    response = ApiError(error.status_code, code, message).response()
    response.headers.update(error.headers or {})
    return response
