"""A client that was lost comes back to its session: what is kept, for how long, and what it gets again."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from omniport.runtime.errors import BackendError
from support.live_turns import held
from support.lost_client import BY_HAND, Socket, wait_until
from support.realtime import SAID
from support.served import Served, session_threads
from websockets.exceptions import InvalidStatus


@pytest.fixture
def make(root: Path) -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def build(**settings: Any) -> Served:
        made.append(Served(root, **settings).start())
        made[-1].live.script(SAID)
        return made[-1]

    yield build
    for served in made:
        served.close()


def counts(served: Served) -> tuple[int, int, int]:
    told = served.http().get("/v1/omniport/capacity").json()["realtime"]
    return told["open"], told["kept"], told["free"]


def test_the_conversation_goes_on(make: Callable[..., Served]) -> None:
    served = make(sessions=2)
    first = Socket(served.url)
    session = first.created()
    assert (session["omniport"]["resumed"], session["omniport"]["resume_seconds"]) == (False, 30)
    first.send("session.update", session={**BY_HAND, "instructions": "Be brief."})
    first.write("Hello")
    first.send("response.create")
    first.until("rate_limits.updated")
    assert counts(served) == (1, 0, 1)
    first.lose()
    wait_until(lambda: counts(served) == (0, 1, 2))
    second = Socket(served.url, f"resume={session['omniport']['resume_token']}")
    again = second.created()
    assert (again["id"], again["instructions"], again["omniport"]["resumed"]) == (session["id"], "Be brief.", True)
    assert counts(served) == (1, 0, 1)
    second.write("And now?")
    second.send("response.create")
    done = second.until("response.done")[-1]["response"]
    assert done["usage"]["input_token_details"]["cached_tokens"] > 20
    metrics = served.http().get("/metrics").text
    assert 'omniport_sessions{state="open"} 1.0' in metrics
    (tokens,) = [line for line in metrics.splitlines() if line.startswith('omniport_kv_tokens{session="realtime-0"}')]
    assert float(tokens.rpartition(" ")[2]) > 0


def test_what_was_being_said_is_stopped_and_what_was_missed_is_told(make: Callable[..., Served]) -> None:
    served = make()
    first = Socket(served.url)
    token = first.created()["omniport"]["resume_token"]
    first.send("session.update", session=BY_HAND)
    first.write("Hello")
    with held(served.live.backend.graphs, "thinker", at=4) as gate:
        first.send("response.create")
        known = first.until("response.created")[-1]
        assert gate.reached.wait(20)
        first.lose()
        wait_until(lambda: served.service.realtime.kept == 1)
    assert served.quiet(), "its place is free"
    second = Socket(served.url, f"resume={token}&after={known['event_id']}")
    came = second.until("rate_limits.updated")
    assert came[0]["type"] == "session.created"
    assert came[-2]["response"]["id"] == known["response"]["id"]
    assert came[-2]["response"]["status"] == "cancelled"
    assert not any(event["type"].endswith(".delta") for event in came)
    second.send("response.create")
    assert second.until("response.done")[-1]["response"]["status"] == "completed"
    assert 'interruptions_total{reason="client_lost"} 1.0' in served.http().get("/metrics").text


def test_events_after_one_that_is_known_come_again(make: Callable[..., Served]) -> None:
    served = make()
    first = Socket(served.url)
    token = first.created()["omniport"]["resume_token"]
    first.write("One")
    first.send("conversation.item.create", item={"type": "message", "role": "user", "content": "Two"})
    known = first.until("conversation.item.done")[0]
    second = Socket(served.url, f"resume={token}&after={known['event_id']}")  # the first one has not gone
    assert first.closed() == 1008
    came = second.until("conversation.item.done")
    assert [event["type"] for event in came] == ["session.created", "conversation.item.done"]
    third = Socket(served.url, f"resume={token}&after=nothing")
    second.closed()
    third.created()
    third.send("session.update", session=BY_HAND)
    assert third.until("session.updated")[0]["type"] == "session.updated", "all was delivered"


def test_who_leaves_before_it_is_back_may_come_again(
    make: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = make()
    first = Socket(served.url)
    token = first.created()["omniport"]["resume_token"]
    first.write("Hello")
    first.lose()
    wait_until(lambda: counts(served) == (0, 1, 4))

    async def fail(*_: Any) -> None:
        raise RuntimeError("it has left")

    with monkeypatch.context() as patched:
        patched.setattr("starlette.websockets.WebSocket.accept", fail)
        with pytest.raises(InvalidStatus):
            Socket(served.url, f"resume={token}")
    wait_until(lambda: counts(served) == (0, 1, 4))
    assert Socket(served.url, f"resume={token}").created()["omniport"]["resumed"] is True


def refused(served: Served, query: str) -> tuple[int, str]:
    with pytest.raises(InvalidStatus) as caught:
        Socket(served.url, query)
    return caught.value.response.status_code, json.loads(caught.value.response.body)["error"]["code"]


@pytest.mark.parametrize("way", ["left", "said nothing", "expired", "off"])
def test_what_is_not_kept(make: Callable[..., Served], way: str) -> None:
    served = make(resume_seconds={"off": 0, "expired": 0.3}.get(way, 30))
    first = Socket(served.url)
    token = first.created()["omniport"].get("resume_token", "none")
    if way != "said nothing":
        first.write("Hello")
    if way == "left":
        first.inner.close()
    else:
        first.lose()
    wait_until(lambda: served.service.realtime.open == 0 and served.service.realtime.kept == 0)
    assert refused(served, f"resume={token}") == (404, "session_not_found")
    assert served.service.realtime.open == 0


def test_a_kept_session_gives_way_to_a_new_client(make: Callable[..., Served]) -> None:
    served = make(sessions=1)
    first = Socket(served.url)
    token = first.created()["omniport"]["resume_token"]
    first.write("Hello")
    first.lose()
    wait_until(lambda: counts(served) == (0, 1, 1))
    second = Socket(served.url)
    second.created()
    assert counts(served) == (1, 0, 0)
    assert refused(served, f"resume={token}") == (404, "session_not_found")
    assert refused(served, "") == (429, "session_limit_reached")


def test_a_draining_server_ends_sessions_when_they_have_nothing_to_say(make: Callable[..., Served]) -> None:
    served = make()
    idle, busy = Socket(served.url), Socket(served.url)
    for client in (idle, busy):
        client.created()
    busy.send("session.update", session=BY_HAND)
    busy.write("Hello")
    with held(served.live.backend.graphs, "thinker", at=3) as gate:
        busy.send("response.create")
        assert gate.reached.wait(20)
        served.http().post("/v1/omniport/drain")
        assert idle.closed() == 1001
        assert refused(served, "") == (503, "not_ready")
        wait_until(lambda: served.service.realtime.open == 1)
    assert busy.until("response.done")[-1]["response"]["status"] == "completed"
    assert busy.closed() == 1001
    wait_until(lambda: served.service.realtime.open == 0)
    assert served.service.realtime.kept == 0


def test_a_frame_that_is_too_large_and_a_session_that_cannot_begin(
    make: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = make()
    large = Socket(served.url)
    large.created()
    # Its head alone, which is enough: who goes on sending may meet a reset before it reads why.
    large.inner.socket.sendall(b"\x81\xff" + (17 << 20).to_bytes(8, "big") + b"mask")
    assert large.closed() == 1009

    def fail() -> None:
        raise BackendError("no memory")

    monkeypatch.setattr(served.service.session, "fork", fail)
    assert Socket(served.url).closed() == 1013
    wait_until(lambda: served.service.realtime.open == 0)


def test_a_client_that_does_not_answer_is_lost(make: Callable[..., Served], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omniport.serve.server._PING", 0.2)
    served = make()
    alive = Socket(served.url, ping_interval=None)
    alive.created()
    dead = Socket(served.url, ping_interval=None)
    dead.created()
    dead.write("Hello")
    monkeypatch.setattr(dead.inner.protocol, "send_pong", lambda data: None, raising=False)
    monkeypatch.setattr(dead.inner.protocol, "receive_data", lambda data: None)
    wait_until(lambda: served.service.realtime.kept == 1)
    time.sleep(0.5)
    alive.send("session.update", session=BY_HAND)
    alive.until("session.updated")


def test_many_that_are_lost_take_no_more_than_their_places(make: Callable[..., Served]) -> None:
    served = make(sessions=3)
    before = session_threads()
    for _ in range(30):
        client = Socket(served.url)
        client.created()
        client.write("Hello")
        client.lose()
        wait_until(lambda: served.service.realtime.open == 0)
        assert served.service.realtime.kept <= 3
    assert counts(served) == (0, 3, 3)
    client = Socket(served.url)
    client.created()
    assert counts(served) == (1, 2, 2)
    wait_until(lambda: len(session_threads() - before) <= 3)


def test_where_a_status_cannot_be_sent_a_close_code_is(make: Callable[..., Served]) -> None:
    """Servers whose WebSockets are accepted or closed, and nothing else."""
    served = make(sessions=1)
    scope = {"type": "websocket", "path": "/v1/realtime", "query_string": b"", "headers": [(b"host", b"127.0.0.1")]}
    codes = []

    async def connect_and_leave(query: bytes) -> None:
        coming = iter([{"type": "websocket.connect"}, {"type": "websocket.disconnect", "code": 1000}])

        async def receive() -> Any:
            return next(coming)

        async def send(message: Any) -> None:
            codes.append(message.get("code", message["type"]))

        await served.app({**scope, "query_string": query}, receive, send)

    served.service.realtime.open = 1
    asyncio.run(connect_and_leave(b""))
    served.service.realtime.open = 0
    asyncio.run(connect_and_leave(b"resume=unknown"))
    served.service.state = "draining"
    asyncio.run(connect_and_leave(b""))
    assert codes == ["websocket.accept", 1013, "websocket.accept", 1008, "websocket.accept", 1013]


@pytest.mark.parametrize(("code", "kept"), [(1000, 0), (1006, 1)])
def test_a_goodbye_while_it_is_written_to_is_one(make: Callable[..., Served], code: int, kept: int) -> None:
    """The connection can be gone for the writer before the reader has seen how it ended."""
    served = make(sessions=1)
    item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]}
    scope = {"type": "websocket", "path": "/v1/realtime", "query_string": b"", "headers": [(b"host", b"127.0.0.1")]}

    async def leave() -> int:
        gone = asyncio.Event()
        coming: list[dict[str, Any]] = [{"type": "websocket.connect"}]
        coming.append(
            {"type": "websocket.receive", "text": json.dumps({"type": "conversation.item.create", "item": item})}
        )

        async def receive() -> Any:
            if coming:
                return coming.pop(0)
            await gone.wait()
            await asyncio.sleep(0.05)
            return {"type": "websocket.disconnect", "code": code}

        async def send(message: Any) -> None:
            if "conversation.item" in message.get("text", ""):
                gone.set()
                raise OSError("the connection is closed")

        await served.app(scope, receive, send)
        return served.service.realtime.kept

    assert asyncio.run(leave()) == kept
