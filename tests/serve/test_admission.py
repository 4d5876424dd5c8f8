"""Places for replies, sessions for chats, and streams that nobody reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from omniport.serve.admission import Admission, Full
from omniport.serve.http.answering import Stream, kept_alive
from omniport.serve.session_pool import SessionPool
from omniport.serve.settings import Limits
from support.live_turns import Live
from support.served import Served


def test_places_go_in_order_and_the_rest_is_refused() -> None:
    async def run() -> list[str]:
        admission, seen, gate = Admission(2, 2), [], asyncio.Event()

        async def reply(name: str) -> None:
            async with admission.place():
                seen.append(name)
                await gate.wait()

        replies = [asyncio.ensure_future(reply(name)) for name in "abcd"]
        await asyncio.sleep(0.01)
        assert (seen, admission.active, admission.waiting) == (["a", "b"], 2, 2)
        with pytest.raises(Full) as full:
            await reply("e")
        assert full.value.seconds > 0
        replies[2].cancel()  # who waits may leave: the next gets the place
        await asyncio.sleep(0.01)
        assert admission.waiting == 1
        gate.set()
        await asyncio.gather(replies[0], replies[1], replies[3])
        assert (admission.active, admission.waiting, admission.expected_wait()) == (0, 0, 0.0)
        return seen

    assert asyncio.run(run()) == ["a", "b", "d"]


def test_a_chat_gets_the_session_that_knows_it(root: Path) -> None:
    live = Live(root)
    pool = SessionPool(live.session, 2)

    def use(*texts: str, tools: tuple[dict[str, Any], ...] = ()) -> int:
        with pool.borrow([{"role": "user", "content": text} for text in texts], tools) as session:
            return id(session)

    first, second = use("a", "b"), use("x", "y")
    assert first != second
    assert use("a", "b", "c") == first
    assert use("x", "y", "z") == second
    assert use("a", "b", "d") == first, "another end"
    assert use("new") == second, "not used longest"
    assert use("a", "b", "d", tools=({"name": "t"},)) == first, "not used longest now"
    with pool.borrow([{"content": "new"}], ()) as one, pool.borrow([{"content": "new"}], ()) as other:
        assert one is not other, "one conversation at a time"
    pool.close()
    live.session.close()


def stalled(served: Served, read: int) -> tuple[int, list[str]]:
    """(pieces taken, what was let go of) of a stream whose client takes so many and neither leaves nor reads on."""
    taken, freed = [], []

    async def pieces() -> AsyncIterator[bytes]:
        try:
            for _ in range(10):
                yield b"x"
        finally:
            freed.append("body")

    async def send(message: Any) -> None:
        if len(taken) > read:
            await asyncio.sleep(60)
        taken.append(message)

    async def receive() -> Any:
        await asyncio.sleep(60)

    async def run() -> None:
        held = AsyncExitStack()
        held.callback(freed.append, "place")
        await Stream(pieces(), held, served.service, "text/plain")({"type": "http"}, receive, send)

    asyncio.run(asyncio.wait_for(run(), 10))
    return len(taken), freed


def test_a_stream_that_nobody_reads_is_given_up(root: Path) -> None:
    with Served(root, limits=Limits(unread_seconds=0.1)) as served:
        assert stalled(served, read=3) == (4, ["body", "place"])
        assert stalled(served, read=20) == (12, ["body", "place"])
        assert 'omniport_interruptions_total{reason="client_stalled"} 1.0' in served.http().get("/metrics").text


def test_a_silent_stream_of_events_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omniport.serve.http.answering._SILENCE", 0.05)

    async def lines() -> AsyncIterator[bytes]:
        yield b"data: 1\n\n"
        await asyncio.sleep(0.12)
        yield b"data: 2\n\n"

    async def run() -> list[bytes]:
        return [line async for line in kept_alive(lines())]

    first, *comments, last = asyncio.run(run())
    assert (first, last) == (b"data: 1\n\n", b"data: 2\n\n")
    assert comments
    assert set(comments) == {b": working\n\n"}
