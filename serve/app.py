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
from .http.chat_request import ChatRequest, beyond_the_record
from .http.openapi import openapi
from .http.request_scope import RequestScope
from .http.routing import EVENTS, JSON, Body, Operation, routes
from .media.sound_formats import FORMATS, media_type
from .page.assets import page_routes
from .realtime.client_secrets import SecretRequest, create_secret
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


_FORMATS = tuple(map(media_type, FORMATS))
_OPERATIONS = (
    Operation(method="GET", path="/health", endpoint=operations.health, prefixed=False),
    Operation(method="GET", path="/ready", endpoint=operations.ready, prefixed=False, fails=(503,)),
    Operation(method="GET", path="/version", endpoint=operations.get_version, prefixed=False),
    Operation(method="GET", path="/metrics", endpoint=operations.metrics, prefixed=False, answers=("text/plain",)),
    Operation(method="GET", path="/omniport/capacity", endpoint=operations.capacity),
    Operation(method="POST", path="/omniport/drain", endpoint=operations.drain, status=202),
    Operation(
        method="POST",
        path="/chat/completions",
        endpoint=chat.chat,
        body=Body(record=ChatRequest, more=beyond_the_record(), nulls=True),
        answers=(JSON, EVENTS),
        fails=(404, 503),
    ),
    Operation(
        method="POST",
        path="/audio/speech",
        endpoint=speech_route.speak,
        body=Body(record=speech_route.SpeechRequest, nulls=True),
        answers=(*_FORMATS, EVENTS),
        fails=(404, 503),
    ),
    Operation(method="GET", path="/audio/voices", endpoint=speech_route.list_voices),
    *(
        Operation(
            method="POST",
            path=path,
            endpoint=endpoint,
            body=transcription.FORM,
            answers=(JSON, "text/plain", EVENTS),
            fails=(404, 503),
        )
        for path, endpoint in (
            ("/audio/transcriptions", transcription.transcribe),
            ("/audio/translations", transcription.translate),
        )
    ),
    Operation(method="GET", path="/models", endpoint=model_list.list_models),
    Operation(method="GET", path="/models/{model:path}", endpoint=model_list.get_model, fails=(404,)),
    Operation(method="POST", path="/realtime/client_secrets", endpoint=create_secret, body=Body(record=SecretRequest)),
)


def _routes(service: Service) -> Iterable[BaseRoute]:
    yield from page_routes(service)
    for operation in (*_OPERATIONS, openapi(service, _OPERATIONS)):
        yield from routes(service, operation)

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
