"""Turns that are written: what OpenAI's client, unmodified, sends and gets."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest
from openai.resources.realtime.realtime import RealtimeConnection
from support.served import Served

#: what the model says: the bundle stops after eight tokens
SAID = "Hello"
#: events that stand in every spoken reply, once each but for the deltas
SPOKEN = [
    "response.created",
    "response.output_item.added",
    "conversation.item.added",
    "response.content_part.added",
    "response.output_audio.done",
    "response.output_audio_transcript.done",
    "response.content_part.done",
    "conversation.item.done",
    "response.output_item.done",
    "response.done",
    "rate_limits.updated",
]


@pytest.fixture
def connection(served: Served) -> Iterator[RealtimeConnection]:
    served.live.script(SAID, codes=list(range(20)))
    with served.client().realtime.connect(model="gpt-realtime") as connected:
        assert connected.recv().type == "session.created"
        yield connected


def until(connection: RealtimeConnection, kind: str) -> list[Any]:
    """What comes, up to an event of this kind."""
    came: list[Any] = []
    while not came or came[-1].type != kind:
        came.append(connection.recv())
        assert came[-1].type != "error" or kind == "error", came[-1]
    return came


def ask(connection: RealtimeConnection, text: str, **response: Any) -> list[Any]:
    """The events of a turn."""
    message = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}
    connection.conversation.item.create(item=message)  # type: ignore[arg-type]
    assert [event.type for event in until(connection, "conversation.item.done")] == [
        "conversation.item.added",
        "conversation.item.done",
    ]
    connection.response.create(response=response)  # type: ignore[arg-type]
    return until(connection, "rate_limits.updated")


def test_text_in_speech_out(connection: RealtimeConnection) -> None:
    came = ask(connection, "Hello")
    kinds = [event.type for event in came]
    assert [kind for kind in kinds if not kind.endswith("delta")] == SPOKEN
    deltas = [event for event in came if event.type.endswith("delta")]
    text = "".join(event.delta for event in deltas if event.type == "response.output_audio_transcript.delta")
    sound = b"".join(base64.b64decode(event.delta) for event in deltas if event.type == "response.output_audio.delta")
    assert text == SAID
    assert all(len(base64.b64decode(event.delta)) <= 4800 for event in deltas if "audio.delta" in event.type)
    done = came[-2].response
    (item,) = done.output
    assert (done.status, item.status, item.content[0].transcript) == ("completed", "completed", text)
    assert len(sound) == done.usage.output_token_details.audio_tokens / 50 * 24000 * 2 > 0
    assert done.usage.total_tokens == done.usage.input_tokens + done.usage.output_tokens
    assert len({event.event_id for event in came}) == len(came)


def test_text_alone_and_the_conversation_goes_on(connection: RealtimeConnection) -> None:
    connection.session.update(session={"type": "realtime", "output_modalities": ["text"], "instructions": "Be brief."})
    updated = until(connection, "session.updated")[-1].session
    assert (updated.output_modalities, updated.instructions) == (["text"], "Be brief.")
    first = ask(connection, "Hello")
    assert "".join(event.delta for event in first if event.type == "response.output_text.delta") == SAID
    second = ask(connection, "And again")
    assert second[-2].response.usage.input_token_details.cached_tokens > 20
