"""Keys that the server signs itself: they say until when they hold, and what for."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from .settings import Settings

PREFIX = "ek_"
#: what signs where the server has no key: such a key ends with the process
_OF_THIS_PROCESS = secrets.token_bytes(32)


class _Content(msgspec.Struct):
    expires: int
    session: dict[str, Any]


def sign(session: Mapping[str, Any], expires: int, settings: Settings) -> str:
    """A key for a session with these settings; ``expires``: seconds since 1970."""
    content = msgspec.json.encode({"expires": expires, "session": session})
    return PREFIX + base64.urlsafe_b64encode(_signature(content, settings) + content).decode().rstrip("=")


def session_of(key: str, settings: Settings) -> dict[str, Any] | None:
    """What a key was signed for; None if it was not, or holds no more."""
    if not key.startswith(PREFIX):
        return None
    text = key[len(PREFIX) :]
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True)
    except (binascii.Error, ValueError):
        return None
    signature, content = data[:32], data[32:]
    if not hmac.compare_digest(signature, _signature(content, settings)):
        return None
    known = msgspec.json.decode(content, type=_Content)
    return known.session if known.expires > time.time() else None


def _signature(content: bytes, settings: Settings) -> bytes:
    secret = hashlib.sha256(settings.keys[0].encode()).digest() if settings.keys else _OF_THIS_PROCESS
    return hmac.digest(secret, b"client secret:" + content, "sha256")
