"""Clients of a load test: what a listener has of a reply, clients that leave, that do not read, that are cut off."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import statistics
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
from omniport.runtime import AudioChunk, OmniSession
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

RATE = 24000
#: seconds after which an answer counts as one that does not come
HANG = 120.0


@dataclass
class Heard:
    """A reply, as a listener has it who plays its sound from the first piece on.

    Attributes:
        first: seconds to the first sound. total: to the end. seconds: of sound.
        underruns, dry: how often and for how long there was nothing to play.
    """

    asked: float = 0.0
    first: float | None = None
    total: float = 0.0
    seconds: float = 0.0
    underruns: int = 0
    dry: float = 0.0
    _ends: float = 0.0

    def hear(self, seconds: float) -> None:
        """A piece of sound has come."""
        now = time.perf_counter()
        if self.first is None:
            self.first, self._ends = now - self.asked, now
        elif now > self._ends:
            self.underruns += 1
            self.dry += now - self._ends
            self._ends = now
        self._ends += seconds
        self.seconds += seconds
        self.total = now - self.asked

    @property
    def rtf(self) -> float:
        """Seconds for a second of sound."""
        return self.total / self.seconds


def chat_body(text: str, codes: int, tokens: int, **changes: Any) -> dict[str, Any]:
    """A question that is answered in speech, of so many codec tokens at most."""
    return {
        "messages": [{"role": "user", "content": text}],
        "modalities": ["text", "audio"],
        "audio": {"format": "pcm16"},
        "stream": True,
        "max_tokens": tokens,
        "talker": {"max_tokens": codes},
        "seed": 1,
        **changes,
    }


async def spoken_chat(client: httpx.AsyncClient, body: dict[str, Any], pieces: int | None = None) -> Heard:
    """Ask, and hear the reply; leave after so many pieces of sound.

    Raises:
        httpx.HTTPStatusError: it was refused.
    """
    heard = Heard(asked=time.perf_counter())
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            response.raise_for_status()
        came = 0
        async for line in response.aiter_lines():
            event = json.loads(line[6:]) if line.startswith("data: {") else {}
            if "error" in event:
                raise RuntimeError(event["error"])
            sound = [choice["delta"].get("audio", {}).get("data", "") for choice in event.get("choices", ())]
            if sound and sound[0]:
                heard.hear(len(base64.b64decode(sound[0])) / 2 / RATE)
                came += 1
                if came == pieces:
                    break
    return heard


@asynccontextmanager
async def clients(url: str) -> AsyncIterator[httpx.AsyncClient]:
    """HTTP without limits of its own."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=HANG, limits=limits) as client:
        yield client


def realtime(url: str, query: str = "") -> connect:
    """A WebSocket."""
    return connect(f"ws{url[4:]}/v1/realtime?model=any{query}", max_size=None, open_timeout=HANG, ping_interval=None)


async def admitted(url: str) -> ClientConnection:
    """A WebSocket; where there is no place for it, it comes again when it was told to."""
    due = time.perf_counter() + HANG
    while True:
        try:
            return await realtime(url)
        except InvalidStatus as error:
            if error.response.status_code != 429 or time.perf_counter() > due:
                raise
            await asyncio.sleep(float(error.response.headers["retry-after"]))


async def send(connection: ClientConnection, type: str, **fields: Any) -> None:
    """One event."""
    await connection.send(json.dumps({"type": type, **fields}))


async def until(connection: ClientConnection, type: str) -> dict[str, Any]:
    """The next event of that type.

    Raises:
        RuntimeError: an error came before.
    """
    while True:
        event: dict[str, Any] = json.loads(await asyncio.wait_for(connection.recv(), HANG))
        if event["type"] == "error":
            raise RuntimeError(event["error"])
        if event["type"] == type:
            return event


async def say(connection: ClientConnection, text: str, role: str = "user") -> None:
    """Add a message to the conversation."""
    kind = "input_text" if role == "user" else "output_text"
    item = {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}
    await send(connection, "conversation.item.create", item=item)


def connect_and_drop(port: int, n: int) -> None:
    """A client that is gone again, in one of four ways."""
    handshake = (
        b"GET /v1/realtime?model=any HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    sent = (b"", handshake[:60], handshake, handshake)[n % 4]
    with socket.create_connection(("127.0.0.1", port), timeout=HANG) as client:
        client.sendall(sent)
        if n % 4 == 2:
            client.recv(1 << 16)
        if n % 2:  # cut off, without a farewell
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def ask_and_read_nothing(port: int, body: dict[str, Any]) -> socket.socket:
    """A connection whose answer is left in the network, of which it takes little."""
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(HANG)
    client.connect(("127.0.0.1", port))
    client.sendall(head + data)
    return client


async def be_brief(connection: ClientConnection, tokens: int) -> None:
    """Text alone, of so many tokens."""
    session = {"type": "realtime", "output_modalities": ["text"], "max_output_tokens": tokens}
    await send(connection, "session.update", session=session)


async def talk_until_killed(url: str, kill: Callable[[], None], tokens: int) -> tuple[str, list[tuple[str, str]]]:
    """A conversation whose server is killed while it replies; the token of the session, and what was said."""
    async with realtime(url) as connection:
        created = await until(connection, "session.created")
        told = []
        await be_brief(connection, tokens)
        for text in ("Remember the number seven.", "What is a fjord?"):
            await say(connection, text)
            await send(connection, "response.create")
            done = await until(connection, "response.done")
            content = done["response"]["output"][0]["content"] if done["response"]["output"] else []
            told += [("user", text), ("assistant", "".join(part.get("text", "") for part in content) or "Yes.")]
        await say(connection, "And now?")
        await send(connection, "response.create")
        await until(connection, "response.created")
        kill()
        with suppress(ConnectionClosed):
            while True:
                await asyncio.wait_for(connection.recv(), HANG)
    return created["session"]["omniport"]["resume_token"], told


async def go_on(url: str, token: str, told: list[tuple[str, str]], tokens: int) -> dict[str, Any]:
    """Come back to a server that knows nothing any more: the session is gone, and its items are given again."""
    code = None
    try:
        async with realtime(url, f"&resume={token}"):
            pass
    except InvalidStatus as error:
        code = json.loads(error.response.body or b"{}").get("error", {}).get("code")
    async with realtime(url) as connection:
        await until(connection, "session.created")
        await be_brief(connection, tokens)
        for role, text in told:
            await say(connection, text, role)
        await say(connection, "And now?")
        await send(connection, "response.create")
        done = await until(connection, "response.done")
    usage, status = done["response"]["usage"], done["response"]["status"]
    return {
        "resume_refused": code,
        "status": status,
        "turns_given_again": len(told),
        "input_tokens": usage["input_tokens"],
    }


def first_sound(session: OmniSession, body: dict[str, Any]) -> float:
    """What the server does for a chat, without it."""
    manifest = session.manifest
    assert manifest.talker_sampling is not None
    replace = msgspec.structs.replace
    begun = time.perf_counter()
    session.items.replace(body["messages"], [])
    turn = session.turn(
        thinker=replace(manifest.thinker_sampling, max_new_tokens=body["max_tokens"]),
        talker=replace(manifest.talker_sampling, max_new_tokens=body["talker"]["max_tokens"]),
        seed=body["seed"],
    )
    events = turn.answer(drop=False)
    try:
        while not isinstance(next(events), AudioChunk):
            pass
        return time.perf_counter() - begun
    finally:
        events.close()  # type: ignore[attr-defined]


def spread(heard: list[Heard]) -> dict[str, Any]:
    """Of several replies."""
    first = [one.first if one.first is not None else HANG for one in heard]
    rtf = [one.rtf for one in heard]
    return {
        "replies": len(heard),
        "first_sound": statistics.median(first),
        "first_sound_95": late(first),
        "rtf": statistics.median(rtf),
        "rtf_95": late(rtf),
        "underruns": sum(one.underruns for one in heard),
        "dry_seconds": sum(one.dry for one in heard),
    }


def late(values: list[float]) -> float:
    """The 95th percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))]
