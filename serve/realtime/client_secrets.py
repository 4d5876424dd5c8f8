"""POST /v1/realtime/client_secrets: a key for a browser, which lasts for minutes and opens one kind of session."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from ..http.answering import read_json
from ..http.api_errors import invalid
from ..http.routing import json_response
from ..service import Service
from ..signed_keys import sign
from .item_list import new_id
from .session_settings import Asked, TurnDetection, initial
from .voice_activity import can_detect
from .wire.client_events import convert
from .wire.dialect import as_ga

#: characters of a key, which travels in a header
_LONGEST = 8192


class ExpiresAfter(Struct):
    """How long the key lasts."""

    anchor: Literal["created_at"] = "created_at"
    seconds: Annotated[int, Meta(ge=10, le=7200)] = 600


class SecretRequest(Struct):
    """What is read of the body."""

    expires_after: ExpiresAfter | None = None
    session: dict[str, Any] = {}


async def create_secret(request: Request, service: Service) -> Response:
    """Sign a session's settings; nothing is stored."""
    body = convert(await read_json(request), SecretRequest, "")
    settings = initial(service, TurnDetection() if can_detect() else None)
    settings = settings.updated(asked_of(body.session), service)
    expires = int(time.time()) + (body.expires_after or ExpiresAfter()).seconds
    value = sign(body.session, expires, service.settings)
    if len(value) > _LONGEST:
        raise invalid("session is too long for a key; send the rest by session.update", "session")
    session = {"type": "realtime", "object": "realtime.session", "id": new_id("sess"), "model": service.model}
    return json_response({"value": value, "expires_at": expires, "session": {**session, **settings.described()}})


def asked_of(session: Mapping[str, Any]) -> Asked:
    """A session as clients write it.

    Raises:
        ApiError: malformed.
    """
    return convert(as_ga(session), Asked, "session")
