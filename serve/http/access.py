"""Who may call: keys, the names that this server goes by, and the web pages that may use it."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ..settings import Settings, is_loopback
from ..signed_keys import session_of
from .api_errors import ApiError

#: what a load balancer asks, which has no key
OPEN = frozenset({"/health", "/ready"})
#: the web page's files, which are no secret: the page asks for the key
_PAGE, _PAGE_FILES = "/", "/page/"
#: what a WebSocket's subprotocol that is a key begins with
_PROTOCOL_KEY = "openai-insecure-api-key."


class Access:
    """Refuses requests that may not be made."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._keys = [_digest(key) for key in settings.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            try:
                self._check(scope)
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._keys and not self._settings.no_auth and not is_loopback(_name(host)):
            # a page elsewhere may have let its own name point here
            raise _forbidden("host_not_allowed", f"this server is not called {host!r}: use 127.0.0.1 or localhost")
        if origin is not None and _place(origin) != host and origin not in self._settings.origins:
            raise _forbidden("origin_not_allowed", f"pages of {origin} may not call this server; see --cors-origin")
        if self._keys and _needs_key(scope["path"]) and not self._opens(given_key(scope), scope):
            raise ApiError(
                401,
                "invalid_api_key",
                "the API key is missing or wrong: send Authorization: Bearer KEY",
                kind="authentication_error",
            )

    def _opens(self, key: str, scope: Scope) -> bool:
        """A key that was signed for a browser opens a WebSocket, and nothing else."""
        signed = scope["type"] == "websocket" and session_of(key, self._settings) is not None
        return signed or self._known(key)

    def _known(self, key: str) -> bool:
        """Every key is compared, each in constant time."""
        given = _digest(key)
        return bool(sum([hmac.compare_digest(given, known) for known in self._keys]))


def _needs_key(path: str) -> bool:
    return path not in OPEN and path != _PAGE and not path.startswith(_PAGE_FILES)


def given_key(scope: Scope) -> str:
    """The first that is there: OpenAI's header, Azure's, another, a browser's, whose WebSockets send no header."""
    headers = Headers(scope=scope)
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    in_protocol = (
        name[len(_PROTOCOL_KEY) :] for name in scope.get("subprotocols", ()) if name.startswith(_PROTOCOL_KEY)
    )
    return headers.get("api-key") or headers.get("x-api-key") or next(in_protocol, "")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _name(host: str) -> str:
    """Of a Host header, without the port; empty if it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _place(origin: str) -> str | None:
    """Host and port of an origin; None if it has none."""
    try:
        return urlsplit(origin).netloc or None
    except ValueError:
        return None


def _forbidden(code: str, message: str) -> ApiError:
    return ApiError(403, code, message)


def read_keys(text: str) -> Sequence[str]:
    """Keys, one a line or between commas; empty lines and those that begin with # are none."""
    lines = (line.strip() for line in text.replace(",", "\n").splitlines())
    return [line for line in lines if line and not line.startswith("#")]
