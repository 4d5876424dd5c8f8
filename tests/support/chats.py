"""Chats by OpenAI's client, unmodified, over fake graphs."""

from __future__ import annotations

import base64
import io
import itertools
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from .served import Served

HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
SPOKEN: dict[str, Any] = {"modalities": ["text", "audio"], "audio": {"voice": "Ethan", "format": "wav"}}
CODES = [3, 5, 7, 11, 13, 17, 19, 23] * 4


def say(served: Served, text: str) -> None:
    served.live.script(text, [*CODES, served.live.bundle.manifest.codec.stop[0]])  # type: ignore[union-attr]


_COUNT = itertools.count()


def hello() -> list[dict[str, Any]]:
    """A question that was not asked before: the fake counts a reply's steps from the tokens that are prefilled."""
    return [{"role": "user", "content": f"{next(_COUNT)} Hello"}]


def ask(served: Served, messages: list[dict[str, Any]] | None = None, **options: Any) -> Any:
    options = {"model": "tiny", "seed": 1, **options}
    messages = messages or hello()
    if "modalities" in options:
        options.setdefault("extra_body", {"talker": {"temperature": 0}})
    return served.client().chat.completions.create(messages=messages, **options)


def wav(seconds: float = 0.5, rate: int = 16000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, 0.1 * np.sin(np.arange(int(seconds * rate)) / 10), rate, format="WAV")
    return file.getvalue()


def png(width: int = 56, height: int = 84) -> str:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 80, 20)).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def refused(served: Served, body: dict[str, Any]) -> tuple[int, str, str | None]:
    """(status, code, param) of an error."""
    response = served.http().post("/v1/chat/completions", json={"messages": HELLO, **body})
    error = response.json()["error"]
    assert error["message"]
    return response.status_code, error["code"], error["param"]
