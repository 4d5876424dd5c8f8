"""Two servers that share a store: a session of one goes on at the other."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omniport.runtime import OmniSession
from omniport.serve.realtime.held_session import HeldSession
from omniport.serve.replicas import session_keeper, session_store
from omniport.serve.replicas.session_store import SessionState, SessionTable
from PIL import Image
from support.live_turns import held, voice
from support.lost_client import BY_HAND, Socket, wait_until
from support.realtime import CODES, SAID, pcm
from support.served import Served
from websockets.exceptions import InvalidStatus

CALL = '<tool_call>\n{"name": "look", "arguments": {"where": "up"}}\n</tool_call>'
LOOK = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}}


class Broken(SessionTable):
    """A table that may be out of reach."""

    broken = gone = False

    async def save(self, key: str, owner: str, changes: SessionState) -> Any:
        if self.broken:
            raise ConnectionError("no store")
        return await super().save(key, owner, changes)

    async def owner(self, key: str) -> str | None:
        if self.broken:
            raise ConnectionError("no store")
        return await super().owner(key)

    async def take(self, key: str, owner: str) -> SessionState | None:
        if self.gone:
            raise ConnectionError("no store any more")
        return await super().take(key, owner)


@pytest.fixture
def table() -> Broken:
    return Broken()


@pytest.fixture
def make(root: Path, table: Broken) -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def build(**settings: Any) -> Served:
        made.append(Served(root, table, **settings).start())
        made[-1].live.script(SAID, codes=CODES)
        return made[-1]

    yield build
    for served in made:
        served.close()


def begin(served: Served, **session: Any) -> tuple[Socket, str]:
    client = Socket(served.url)
    token = client.created()["omniport"]["resume_token"]
    client.send("session.update", session={**BY_HAND, **session})
    client.until("session.updated")
    return client, token


def ask(client: Socket) -> dict[str, Any]:
    client.send("response.create")
    response: dict[str, Any] = client.until("response.done")[-1]["response"]
    client.until("rate_limits.updated")
    return response


def the_session(served: Served) -> OmniSession:
    (kept,) = served.service.realtime._all.values()
    assert isinstance(kept, HeldSession)
    return kept.session._session


def content(served: Served) -> list[Any]:
    return [(item.role, item.content, item.start, item.tokens) for item in the_session(served).items]


def refused(served: Served, token: str) -> tuple[int, str]:
    with pytest.raises(InvalidStatus) as caught:
        Socket(served.url, f"resume={token}")
    body = caught.value.response.body
    assert body is not None
    return caught.value.response.status_code, body.decode().partition('"code":"')[2].partition('"')[0]


def picture() -> str:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 56, 3), np.uint8)).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def test_the_conversation_is_the_same_elsewhere(make: Callable[..., Served]) -> None:
    first, second = make(), make()
    client, token = begin(first, instructions="Be brief.", tools=[LOOK], max_output_tokens=100)
    client.write("Hello")
    ask(client)
    shown = {"type": "input_image", "image_url": f"data:image/png;base64,{picture()}"}
    client.send("conversation.item.create", item={"type": "message", "role": "user", "content": [shown]})
    client.until("conversation.item.done")
    for seconds, sound in enumerate(np.split(voice(3.0, 24000), 3)):
        client.send("input_audio_buffer.append", audio=pcm(sound))
        client.send("input_image_buffer.append", image=picture(), time_ms=seconds * 1000)
    client.send("input_audio_buffer.commit")
    client.until("conversation.item.done")
    first.live.script(f"{SAID}\n{CALL}")
    done = ask(client)
    assert [item["type"] for item in done["output"]] == ["message", "function_call"]
    output = {"type": "function_call_output", "call_id": done["output"][1]["call_id"], "output": "The sky."}
    client.send("conversation.item.create", item=output)
    last = client.until("conversation.item.done")[-1]["item"]
    wanted = content(first)
    client.lose()

    again = Socket(second.url, f"resume={token}")
    session = again.created()
    assert (session["instructions"], session["omniport"]["resumed"]) == ("Be brief.", True)
    assert content(second) == wanted
    again.send("conversation.item.retrieve", item_id=last["id"])
    assert again.until("conversation.item.retrieved")[-1]["item"] == last
    assert ask(again)["status"] == "completed"
    again.send("session.update", session={"audio": {"output": {"voice": "other"}}})
    assert again.until("error")[-1]["error"]["code"] in ("cannot_update_voice", "voice_not_found")


def test_only_what_was_being_said_is_lost(make: Callable[..., Served]) -> None:
    first, second = make(), make()
    client, token = begin(first)
    client.write("Hello")
    ask(client)
    client.write("And now?")
    before = content(first)
    with held(first.live.backend.graphs, "thinker", at=4) as gate:
        client.send("response.create")
        response = client.until("response.output_item.added")[0]["response"]["id"]
        assert gate.reached.wait(20)
        again = Socket(second.url, f"resume={token}")
        came = again.until("response.done")
    kinds = [event["type"] for event in came]
    assert kinds == ["session.created", "conversation.item.deleted", "response.done"]
    assert (came[-1]["response"]["id"], came[-1]["response"]["status"]) == (response, "failed")
    assert came[-1]["response"]["status_details"]["error"]["code"] == "replica_lost"
    again.until("rate_limits.updated")
    assert content(second) == before
    assert ask(again)["status"] == "completed"
    assert client.closed() == 1008
    wait_until(lambda: first.service.realtime.open == 0)
    assert first.service.realtime.kept == 0, "its own is of no use any more"


def test_what_was_missed_is_told_elsewhere(make: Callable[..., Served]) -> None:
    first, second = make(), make()
    client, token = begin(first)
    client.write("Hello")
    client.send("response.create")
    known = client.until("response.created")[-1]["event_id"]
    told = client.until("rate_limits.updated")
    client.lose()
    again = Socket(second.url, f"resume={token}&after={known}")
    came = again.until("rate_limits.updated")
    whole = [event["event_id"] for event in told if not event["type"].endswith(".delta")]
    assert [event["event_id"] for event in came[1:]] == whole


def test_there_and_back_again(make: Callable[..., Served]) -> None:
    first, second = make(), make()
    client, token = begin(first)
    client.write("One")
    client.lose()
    wait_until(lambda: first.service.realtime.kept == 1)
    client = Socket(second.url, f"resume={token}")
    client.created()
    client.write("Two")
    client.lose()
    wait_until(lambda: second.service.realtime.kept == 1)
    wanted = content(second)
    client = Socket(first.url, f"resume={token}")
    client.created()
    assert content(first) == wanted, "not what it has kept"
    assert (first.service.realtime.open, first.service.realtime.kept) == (1, 0)


def test_a_session_that_is_over_is_nowhere(make: Callable[..., Served], table: Broken) -> None:
    first, second = make(resume_seconds=0.3), make()
    client, token = begin(first)
    client.write("Hello")
    client.inner.close()
    wait_until(lambda: first.service.realtime.open == 0)
    assert refused(second, token) == (404, "session_not_found")
    client, token = begin(first)
    client.write("Hello")
    client.lose()
    assert table._kept
    wait_until(lambda: not table._kept)
    assert first.service.realtime.open == first.service.realtime.kept == 0
    assert refused(second, token) == (404, "session_not_found")
    assert refused(second, "unknown") == (404, "session_not_found")
    assert (second.service.realtime.open, second.service.realtime.kept) == (0, 0)


def test_a_full_replica_refuses_and_another_takes_it(make: Callable[..., Served]) -> None:
    first, full, free = make(), make(sessions=1), make()
    client, token = begin(first)
    client.write("Hello")
    other, _ = begin(full)
    client.lose()
    assert refused(full, token) == (429, "session_limit_reached")
    assert Socket(free.url, f"resume={token}").created()["omniport"]["resumed"] is True
    other.inner.close()


def test_a_replica_that_drains_gives_its_sessions_away(make: Callable[..., Served]) -> None:
    first, second = make(), make()
    client, token = begin(first)
    client.write("Hello")
    first.service.drain()
    assert client.closed() == 1001
    again = Socket(second.url, f"resume={token}")
    assert again.created()["omniport"]["resumed"] is True
    assert ask(again)["status"] == "completed"


def test_a_session_goes_on_without_its_store(
    make: Callable[..., Served], table: Broken, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_keeper, "_REST", 0.0)
    first, second = make(), make()
    client, token = begin(first)
    client.write("Hello")
    table.broken = True
    client.write("Are you there?")
    assert refused(second, token) == (404, "session_not_found")
    table.broken, table.gone = False, True
    assert refused(second, token) == (404, "session_not_found")
    assert second.service.realtime.open == 0
    table.gone = False
    table._kept.clear()
    client.write("And now?")
    wanted = content(first)
    client.lose()
    Socket(second.url, f"resume={token}").created()
    assert content(second) == wanted


def test_what_a_store_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(session_store.time, "monotonic", lambda: now)
    table = SessionTable(most=1000)

    def state(**fields: Any) -> SessionState:
        return SessionState(b"head", ["a"], seconds=30, **fields)

    async def run() -> None:
        nonlocal now
        assert await table.save("one", "me", state(whole=False)) == "unknown"
        assert await table.save("one", "me", state(items={"a": b"1", "b": b"2"}, given={"a": b"x"})) == "saved"
        assert await table.save("one", "other", state()) == "taken"
        assert await table.save("one", "me", state(whole=False, given={"a": b""}, events=[("e", "text")])) == "saved"
        kept = await table.take("one", "other")
        assert kept is not None
        assert (kept.items, kept.given, kept.events) == ({"a": b"1"}, {}, [("e", "text")])
        await table.forget("one", "me")
        assert await table.owner("one") == "other"
        for _ in range(10):
            now += 20
            await table.renew("other")
        assert await table.owner("one") == "other"
        now += 46
        assert await table.owner("one") is None, "30 s, after 15 without a word"
        for number in range(3):
            await table.save(str(number), "me", state(items={"a": b"x" * 400}))
        assert [await table.owner(str(number)) for number in range(3)] == [None, "me", "me"]

    asyncio.run(run())
