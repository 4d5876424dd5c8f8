"""A client of the Realtime protocol for tests: OpenAI's, unmodified."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from openai.resources.realtime.realtime import RealtimeConnection

from .served import Served

#: what the model says: the bundle stops after eight tokens
SAID = "Hello"
#: a second of speech: what the fake says of itself may be none
CODES = [3, 5, 7, 11, 13] * 10


@contextmanager
def connected(served: Served, **session: Any) -> Iterator[RealtimeConnection]:
    """A connection whose session has these settings."""
    with served.client().realtime.connect(model="gpt-realtime") as connection:
        assert connection.recv().type == "session.created"
        if session:
            connection.session.update(session={"type": "realtime", **session})  # type: ignore[typeddict-item]
            until(connection, "session.updated")
        yield connection


def until(connection: RealtimeConnection, kind: str) -> list[Any]:
    """What comes, up to an event of this kind."""
    came: list[Any] = []
    while not came or came[-1].type != kind:
        came.append(connection.recv())
        assert came[-1].type != "error" or kind == "error", came[-1]
    return came


def kinds(events: list[Any]) -> list[str]:
    """Their types, without deltas."""
    return [event.type for event in events if not event.type.endswith("delta")]


def write(connection: RealtimeConnection, text: str) -> Any:
    """A user's message is put into the conversation; its item."""
    message = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}
    connection.conversation.item.create(item=message)  # type: ignore[arg-type]
    return until(connection, "conversation.item.done")[-1].item


def ask(connection: RealtimeConnection, text: str, **response: Any) -> list[Any]:
    """The events of the reply to a message."""
    write(connection, text)
    connection.response.create(response=response)  # type: ignore[arg-type]
    return until(connection, "rate_limits.updated")


def pcm(samples: NDArray[np.float32]) -> str:
    """Base64 of 16-bit samples."""
    return base64.b64encode((samples * 32767).astype("<i2").tobytes()).decode()
