"""The page's files, as browsers get them: from here alone, and allowed to reach nothing but this server."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import PurePath

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..http.routing import Operation, routes
from ..service import Service

_INDEX = "index.html"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' blob:",  # pictures that the user has chosen
        "media-src blob:",  # speech that came with a chat
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "permissions-policy": "microphone=(self), camera=(self)",
    "cache-control": "no-cache",
}


def read_assets() -> dict[str, bytes]:
    """The files by their names."""
    folder = files(__package__) / "static"
    return {entry.name: entry.read_bytes() for entry in folder.iterdir() if PurePath(entry.name).suffix in _TYPES}


def page_routes(service: Service) -> Iterator[Route]:
    """``/`` and ``/page/NAME``; they hold nothing secret, and need no key."""
    assets = read_assets()

    async def send(request: Request, service: Service) -> Response:
        name = request.path_params.get("name", _INDEX)
        if name not in assets:
            raise HTTPException(404, "there is no such file")
        return Response(assets[name], headers=HEADERS, media_type=_TYPES[PurePath(name).suffix])

    for path in ("/", "/page/{name}"):
        yield from routes(service, Operation(method="GET", path=path, endpoint=send, prefixed=False))
