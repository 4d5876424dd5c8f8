"""Turns that are written: what OpenAI's client, unmodified, sends and gets."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Iterator
from typing import Any

import pytest
from omniport.serve.reply_events import ReplyEvents
from openai.resources.realtime.realtime import RealtimeConnection
from support.live_turns import held
from support.realtime import SAID, ask, connected, kinds, until, write
from support.served import Served, session_threads

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
    served.live.script(SAID)
    with connected(served) as made:
        yield made


def test_text_in_speech_out(connection: RealtimeConnection) -> None:
    came = ask(connection, "Hello")
    assert kinds(came) == SPOKEN
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


def test_items_are_read_back_deleted_and_put_in_between(connection: RealtimeConnection) -> None:
    first, last = write(connection, "One"), write(connection, "Three")
    message = {"id": "two", "type": "message", "role": "user", "content": [{"type": "input_text", "text": "Two"}]}
    connection.conversation.item.create(item=message, previous_item_id=first.id)  # type: ignore[arg-type]
    added = until(connection, "conversation.item.done")[0]
    assert (added.item.id, added.previous_item_id) == ("two", first.id)
    connection.conversation.item.delete(item_id=last.id)
    assert until(connection, "conversation.item.deleted")[-1].item_id == last.id
    connection.conversation.item.retrieve(item_id="two")
    assert until(connection, "conversation.item.retrieved")[-1].item.content[0].text == "Two"
    connection.send({"type": "conversation.item.retrieve", "item_id": last.id, "event_id": "mine"})  # type: ignore[misc]
    error = until(connection, "error")[-1].error
    assert (error.code, error.event_id) == ("item_retrieve_invalid_item_id", "mine")
    came = ask(connection, "Four")
    assert came[-2].response.status == "completed"


def test_a_response_apart_leaves_nothing(connection: RealtimeConnection) -> None:
    write(connection, "Hello")
    connection.response.create(
        response={"conversation": "none", "metadata": {"topic": "x"}, "output_modalities": ["text"]}
    )
    came = until(connection, "rate_limits.updated")
    assert "conversation.item.added" not in kinds(came)
    assert (came[0].response.metadata, came[-2].response.conversation_id) == ({"topic": "x"}, None)
    again = ask(connection, "Again")
    before = next(event for event in again if event.type == "conversation.item.added")
    assert before.previous_item_id is not None


def test_a_response_to_an_input_of_its_own(connection: RealtimeConnection) -> None:
    item = write(connection, "Hello")
    given = [
        {"type": "item_reference", "id": item.id},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Is that a greeting?"}]},
    ]
    asked = {"conversation": "none", "input": given, "output_modalities": ["text"]}
    connection.response.create(response=asked)  # type: ignore[arg-type]
    (said,) = until(connection, "response.done")[-1].response.output
    assert said.content[0].text == SAID
    connection.response.create(response={"input": given[1:]})  # type: ignore[typeddict-item]
    (kept,) = until(connection, "response.done")[-1].response.output
    connection.conversation.item.delete(item_id=kept.id)
    until(connection, "conversation.item.deleted")


def test_cancelled_while_it_waits_for_its_place(served: Served, connection: RealtimeConnection) -> None:
    with held(served.live.backend.graphs, "thinker", at=3) as gate:
        write(connection, "Hello")
        connection.response.create()
        assert gate.reached.wait(20)
        connection.response.create()
        assert until(connection, "error")[-1].error.code == "conversation_already_has_active_response"
        with connected(served) as other:
            other.response.create()
            until(other, "response.created")
            other.response.cancel()
            response = until(other, "response.done")[-1].response
            assert (response.status, response.status_details.reason) == ("cancelled", "client_cancelled")
    assert until(connection, "response.done")[-1].response.status == "completed"


def test_clients_that_leave_free_all(served: Served) -> None:
    before = session_threads()
    for _ in range(5):
        with connected(served) as connection:
            write(connection, "Hello")
            connection.response.create()
    due = time.monotonic() + 10
    while (served.service.realtime.open or session_threads() - before) and time.monotonic() < due:
        time.sleep(0.05)
    assert served.service.realtime.open == 0
    assert served.quiet()
    assert not session_threads() - before


def test_what_can_be_ignored_is_and_the_rest_is_told(connection: RealtimeConnection) -> None:
    connection.session.update(session={"type": "realtime", "tracing": "auto", "nonsense": 1})  # type: ignore[typeddict-item]
    until(connection, "session.updated")
    for event, code in (
        ({"type": "response.cancel"}, "response_cancel_not_active"),
        ({"type": "input_audio_buffer.commit"}, "input_audio_buffer_commit_empty"),
        ({"type": "nothing.known"}, "invalid_value"),
        ({"type": "session.update", "session": {"audio": {"output": {"voice": "Nobody"}}}}, "voice_not_found"),
        ({"type": "session.update", "session": {"tools": [{"type": "mcp"}]}}, "unsupported_parameter"),
        ({"type": "input_audio_buffer.append", "audio": "%"}, "invalid_value"),
        ({"type": "conversation.item.create", "item": {"type": "message", "role": "user"}}, "invalid_value"),
    ):
        connection.send({**event, "event_id": "e1"})  # type: ignore[arg-type]
        error = until(connection, "error")[-1].error
        assert (error.code, error.event_id) == (code, "e1"), error
    connection.send({"type": "output_audio_buffer.clear"})
    assert ask(connection, "Hello")[-2].response.status == "completed"


def test_the_voice_stays_once_it_was_heard(served: Served) -> None:
    def voice(name: str) -> dict[str, Any]:
        return {"type": "realtime", "audio": {"output": {"voice": name}}}

    with connected(served) as connection:
        for name in ("Ethan", "Chelsie"):
            connection.session.update(session=voice(name))  # type: ignore[arg-type]
            assert until(connection, "session.updated")[-1].session.audio.output.voice == name
        ask(connection, "Hello?")
        connection.session.update(session=voice("Ethan"))  # type: ignore[arg-type]
        assert until(connection, "error")[-1].error.code == "cannot_update_voice"
        connection.session.update(session={**voice("Chelsie"), "instructions": "Be brief."})  # type: ignore[arg-type]
        assert until(connection, "session.updated")[-1].session.audio.output.voice == "Chelsie"


def test_a_reply_that_nobody_stopped_was_not_cancelled(
    connection: RealtimeConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads that end under it cancel what waits for them."""

    async def gone(*_: object) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(ReplyEvents, "__anext__", gone)
    write(connection, "Hello")
    connection.response.create()
    done = until(connection, "response.done")[-1].response
    assert (done.status, done.status_details.error.code) == ("failed", "internal_error")
