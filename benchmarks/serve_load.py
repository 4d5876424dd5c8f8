"""Load a server on loopback (Linux): how many it serves at once, what it costs, and that nothing is left behind.

    python -m benchmarks.serve_load BUNDLE [--parts sessions,drops,...] [--soak MINUTES]

Writes docs/results/serve.json and serve.md; parts that are not run keep the figures that they had. The parts:

  sessions  replies at once, twice as many each time, until speech is no longer made as fast as it is heard
  refusals  more clients than there are places: each is answered or refused, and told when to come again
  drops     1,000 clients that connect and are gone
  cancels   200 replies whose clients leave while they are spoken
  readers   clients that do not read what they asked for, beside one who does
  drain     SIGTERM while a reply is spoken and a WebSocket is open
  kill      SIGKILL, a new start, and clients that go on
  overhead  first sound through the server and through the Python API, in turns
  protocol  processor time of the protocol, for a session that sends and gets sound all the time
  imports   of the runtime
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from omniport.runtime import OmniSession
from omniport.runtime.bundle.reader import Bundle
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from benchmarks import serve_page
from benchmarks.harness import command_line, record
from benchmarks.live import environment
from benchmarks.serve_clients import (
    HANG,
    Heard,
    admitted,
    ask_and_read_nothing,
    be_brief,
    chat_body,
    clients,
    connect_and_drop,
    first_sound,
    go_on,
    late,
    realtime,
    say,
    send,
    spoken_chat,
    spread,
    talk_until_killed,
    until,
)
from benchmarks.served_process import ServedProcess

Figures = dict[str, Any]
_QUESTION = "What do you see, and what would you do next?"
_SPOKEN = 4  # places of realtime sessions
_REPLIES = 8  # whose sound goes out one after the other, for the protocol
#: what the import of the runtime must not bring
_SERVER = ("starlette", "uvicorn", "websockets", "prometheus_client", "multipart", "omniport.serve")


class Load:
    """The parts.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.bundle: Path = options.bundle
        self.options = options
        self._numbers = itertools.count()

    def body(self, codes: int | None = None, **changes: Any) -> Figures:
        """A question that nobody has asked before, so that no KV cache holds it."""
        text = f"{next(self._numbers)}. {_QUESTION}"
        return chat_body(text, codes or self.options.codes, self.options.tokens, **changes)

    def sessions(self) -> Figures:
        """Replies at once, until speech is made slower than it is heard."""
        rows: list[Figures] = []
        with ServedProcess(self.bundle, "--active", 64, "--sessions", 64, "--queue", 0) as server:
            asyncio.run(self._at_once(server, 1))  # a first reply of this length
            for n in (1, 2, 4, 8, 16, 32, 64):
                heard = asyncio.run(self._at_once(server, n))
                rows.append({"sessions": n, **spread(heard)})
                if rows[-1]["rtf_95"] > 1 or n >= self.options.most:
                    break
            left = server.stop()
        kept = [row["sessions"] for row in rows if row["rtf_95"] <= 1]
        return {"rows": rows, "most_in_time": max(kept, default=0), **left}

    async def _at_once(self, server: ServedProcess, n: int) -> list[Heard]:
        async with clients(server.url) as client:

            async def talk() -> list[Heard]:
                return [await spoken_chat(client, self.body()) for _ in range(self.options.rounds)]

            return [heard for all in await asyncio.gather(*(talk() for _ in range(n))) for heard in all]

    def refusals(self) -> Figures:
        """Sixteen at once for one place and a queue of four; eight WebSockets for four places."""
        with ServedProcess(self.bundle, "--sessions", _SPOKEN) as server:
            found = asyncio.run(self._refused(server))
            return {**found, "settled": server.settle(), **server.stop()}

    async def _refused(self, server: ServedProcess) -> Figures:
        async with clients(server.url) as client:
            bodies = [self.body() for _ in range(16)]

            async def ask(body: Figures) -> tuple[int, float, str | None]:
                begun = time.perf_counter()
                response = await client.post("/v1/chat/completions", json={**body, "stream": False})
                return response.status_code, time.perf_counter() - begun, response.headers.get("retry-after")

            told = await asyncio.gather(*(ask(body) for body in bodies))
        refused = [one for one in told if one[0] == 429]
        open_sockets, turned_away = [], []
        for _ in range(2 * _SPOKEN):
            begun = time.perf_counter()
            try:
                open_sockets.append(await realtime(server.url))
            except InvalidStatus as error:
                seconds = time.perf_counter() - begun
                response = error.response
                turned_away.append((response.status_code, seconds, response.headers.get("retry-after")))
        for connection in open_sockets:
            await connection.close()
        return {
            "answered": sum(status == 200 for status, *_ in told),
            "refused": len(refused),
            "others": sum(status not in (200, 429) for status, *_ in told),
            "refused_after": max(seconds for _, seconds, _ in refused),
            "answered_after": max(seconds for status, seconds, _ in told if status == 200),
            "websockets_open": len(open_sockets),
            "websockets_refused": sum(status == 429 for status, *_ in turned_away),
            "websocket_refused_after": max(seconds for _, seconds, _ in turned_away),
            "without_retry_after": sum(not again for _, _, again in (*refused, *turned_away)),
        }

    def drops(self) -> Figures:
        """Clients that are gone as soon as they have come."""
        return self._many(self.options.drops, lambda server, n: connect_and_drop(server.port, n))

    def cancels(self) -> Figures:
        """Clients that leave while their reply is spoken; the next one asks at once."""

        def leave(server: ServedProcess, n: int) -> None:
            async def begin() -> None:
                async with clients(server.url) as client:
                    await spoken_chat(client, self.body(), pieces=1 + n % 3)

            asyncio.run(begin())

        return self._many(self.options.cancels, leave, "--queue", 8)

    def _many(self, count: int, one: Callable[[ServedProcess, int], None], *options: object) -> Figures:
        """So many clients, four at once, and what is left behind by all but the first quarter of them."""
        with ServedProcess(self.bundle, *options) as server:
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(lambda n: one(server, n), range(count // 4)))
                before = _settled(server)
                begun = time.perf_counter()
                list(pool.map(lambda n: one(server, n), range(count // 4, count)))
                seconds = time.perf_counter() - begun
            settled, after = server.settle(), _settled(server)
            next_one = asyncio.run(self._at_once(server, 1))
            figures = {"clients": count, "seconds": seconds, "settled": settled, "before": before, "after": after}
            return {**figures, "next_first_sound": next_one[0].first, **server.stop()}

    def readers(self) -> Figures:
        """Three that do not read, and one that does, at the same time."""
        with ServedProcess(self.bundle, "--active", 4, "--sessions", 8) as server:
            alone = asyncio.run(self._at_once(server, 1))
            slow = [ask_and_read_nothing(server.port, self.body(self.options.long)) for _ in range(3)]
            heard = asyncio.run(self._at_once(server, 1))
            time.sleep(self.options.stall)
            stalled, grown = server.busy(), server.state()["memory"]
            for client in slow:
                client.close()
            settled = server.settle()
            return {
                "alone": spread(alone),
                "beside": spread(heard),
                "held_back": stalled,
                "memory": grown,
                "settled": settled,
                **server.stop(),
            }

    def drain(self) -> Figures:
        """SIGTERM while a reply is spoken."""
        with ServedProcess(self.bundle) as server:
            return {**asyncio.run(self._drained(server)), **server.stop()}

    async def _drained(self, server: ServedProcess) -> Figures:
        async with clients(server.url) as client, realtime(server.url) as idle:
            reply = asyncio.ensure_future(spoken_chat(client, self.body()))
            await asyncio.sleep(0.1)
            while not reply.done() and not await asyncio.to_thread(server.busy):
                await asyncio.sleep(0.02)
            begun = time.perf_counter()
            server.signal(signal.SIGTERM)
            code = None
            try:
                while True:
                    await asyncio.wait_for(idle.recv(), HANG)
            except ConnectionClosed as closed:
                code = closed.rcvd.code if closed.rcvd is not None else None
            try:
                heard, cut = (await reply).seconds, False
            except httpx.RemoteProtocolError:  # it took longer than the server waits
                heard, cut = 0.0, True
            await asyncio.to_thread(server.wait)
            seconds = time.perf_counter() - begun
            return {"heard": heard, "cut": cut, "websocket_code": code, "seconds": seconds}

    def kill(self) -> Figures:
        """SIGKILL in the middle of a conversation. Nothing of it is on disk: clients give it again."""
        server = ServedProcess(self.bundle)
        port, tokens = server.port, self.options.tokens
        begun = time.perf_counter()
        token, told = asyncio.run(talk_until_killed(server.url, lambda: server.signal(signal.SIGKILL), tokens))
        lost = time.perf_counter()
        server.wait()
        server.stop()
        with ServedProcess(self.bundle, port=port) as fresh:
            found = asyncio.run(go_on(fresh.url, token, told, tokens))
            again = time.perf_counter() - lost
            return {
                "before": lost - begun,
                "ready_after": fresh.seconds,
                "answered_after": again,
                **found,
                **fresh.stop(),
            }

    def overhead(self) -> Figures:
        """First sound through the server, and through the Python API as the server calls it."""
        through, direct = [], []
        with ServedProcess(self.bundle) as server, OmniSession.open(self.bundle) as session:
            session.load()
            for n in range(self.options.pairs + 1):
                body = self.body(self.options.codes)
                heard = asyncio.run(self._hear(server, body))
                direct.append(first_sound(session, body))
                through.append(heard.first or 0.0)
                if not n:  # the first of each has more to do
                    through, direct = [], []
            left = server.stop()
        later = [a - b for a, b in zip(through, direct, strict=True)]
        return {
            "pairs": len(later),
            "server": statistics.median(through),
            "python": statistics.median(direct),
            "later": statistics.median(later),
            "later_95": late(later),
            **left,
        }

    async def _hear(self, server: ServedProcess, body: Figures) -> Heard:
        async with clients(server.url) as client:
            return await spoken_chat(client, body, pieces=1)

    def protocol(self) -> Figures:
        """Of the thread of the event loop: for a second of sound that comes, and for one that goes."""
        with ServedProcess(self.bundle, "--sessions", _SPOKEN) as server:
            seconds, waited = self.options.listen, server.loop_seconds()
            time.sleep(seconds)
            idle = (server.loop_seconds() - waited) / seconds
            asyncio.run(self._send_sound(server, 1.0))
            begun = server.loop_seconds()
            asyncio.run(self._send_sound(server, seconds))
            coming = (server.loop_seconds() - begun) / seconds / _SPOKEN
            begun, wall = server.loop_seconds(), time.perf_counter()
            heard = sum(asyncio.run(self._spoken(server, self.options.long)) for _ in range(_REPLIES))
            wall = time.perf_counter() - wall
            going = (server.loop_seconds() - begun - idle * wall) / max(heard, 0.1)
            share = coming - idle / _SPOKEN + going
            return {"idle": idle, "coming": coming, "going": going, "share": share, "heard": heard, **server.stop()}

    async def _send_sound(self, server: ServedProcess, seconds: float) -> None:
        """Of silence, which no graph hears: the buffer is cleared each second, before there is enough to encode."""
        frame = "A" * 2560  # 40 ms

        async def speak() -> None:
            connection = await admitted(server.url)  # those of the call before may not be gone yet
            async with connection:
                settings = {"type": "realtime", "audio": {"input": {"turn_detection": None}}}
                await send(connection, "session.update", session=settings)
                begun = time.perf_counter()
                for n in range(round(seconds * 25)):
                    await send(connection, "input_audio_buffer.append", audio=frame)
                    if n % 25 == 24:
                        await send(connection, "input_audio_buffer.clear")
                    await asyncio.sleep(max(0.0, begun + n / 25 - time.perf_counter()))

        await asyncio.gather(*(speak() for _ in range(_SPOKEN)))

    async def _spoken(self, server: ServedProcess, codes: int) -> float:
        async with clients(server.url) as client:
            return (await spoken_chat(client, self.body(codes))).seconds

    def imports(self) -> Figures:
        """Seconds of a fresh process for ``import omniport.runtime``, and what of a server it brings."""
        code = (
            "import sys, time; begun = time.perf_counter(); import omniport.runtime; "
            f"print(time.perf_counter() - begun, *[name for name in {_SERVER!r} if name in sys.modules])"
        )
        told = [subprocess.check_output([sys.executable, "-c", code], text=True).split() for _ in range(6)][1:]
        brings = {name for one in told for name in one[1:]}
        return {"seconds": statistics.median(float(one[0]) for one in told), "brings": sorted(brings)}

    def soak(self) -> Figures:
        """All of it for minutes: what is resident, threads and files of the second quarter and of the last."""
        rows: list[Figures] = []
        counts = {"replies": 0, "cancelled": 0, "dropped": 0, "conversations": 0}
        with ServedProcess(self.bundle, "--sessions", _SPOKEN, "--queue", 8) as server:
            due = time.monotonic() + self.options.soak * 60
            while time.monotonic() < due:
                asyncio.run(self._round(server, counts))
                server.settle()
                rows.append(server.state())
                print(f"{counts} {rows[-1]}", file=sys.stderr, flush=True)
            left = server.stop()
        quarter = max(1, len(rows) // 4)
        halves = {"second_quarter": rows[quarter : 2 * quarter], "last_quarter": rows[-quarter:]}
        middle = {name: _medians(part or rows) for name, part in halves.items()}
        growth = middle["last_quarter"]["memory"] / middle["second_quarter"]["memory"] - 1
        return {"minutes": self.options.soak, **counts, **middle, "memory_growth": growth, **left}

    async def _round(self, server: ServedProcess, counts: dict[str, int]) -> None:
        async with clients(server.url) as client:
            await asyncio.gather(*(spoken_chat(client, self.body(100)) for _ in range(3)))
            await asyncio.gather(*(spoken_chat(client, self.body(), pieces=2) for _ in range(2)))
        for n in range(8):
            await asyncio.to_thread(connect_and_drop, server.port, n)
        connection = await admitted(server.url)
        async with connection:
            await be_brief(connection, self.options.tokens)
            for text in ("What is a fjord?", "And a lake?"):
                await say(connection, text)
                await send(connection, "response.create")
                await until(connection, "response.done")
        for name, more in (("replies", 3), ("cancelled", 2), ("dropped", 8), ("conversations", 1)):
            counts[name] += more


def _settled(server: ServedProcess) -> dict[str, int]:
    """Once connections that are gone are forgotten, and sessions that nobody comes back to."""
    time.sleep(1.0)
    return server.state()


def _medians(rows: list[Figures]) -> Figures:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


PARTS = ("sessions", "refusals", "drops", "cancels", "readers", "drain", "kill", "overhead", "protocol", "imports")


def measure(options: argparse.Namespace, found: Any) -> Iterator[Figures]:
    """Each part in turn, over what was found before."""
    load, figures = Load(options), dict(found)
    names = options.parts.split(",") if options.parts else [*PARTS] if not options.soak else []
    for name in (*names, *(["soak"] if options.soak else [])):
        print(f"{name} ...", file=sys.stderr, flush=True)
        begun = time.perf_counter()
        try:
            part = getattr(load, name)()
        except (OSError, RuntimeError, httpx.HTTPError, WebSocketException, asyncio.TimeoutError) as error:
            part = {"failed": f"{type(error).__name__}: {error}"[:300]}
        model = Bundle.open(options.bundle).manifest.source.name
        place = {"bundle": model, "environment": environment(), "took": time.perf_counter() - begun}
        figures[name] = {**part, **place}
        yield figures


if __name__ == "__main__":
    line = command_line(__doc__)
    line.add_argument("bundle", type=Path, nargs="?", default=Path("demo/bundle"))
    line.add_argument("--parts", default="", help="some of them, separated by commas; without it all but the soak")
    line.add_argument(
        "--soak", type=float, default=0.0, metavar="MINUTES", help="this part alone unless --parts names others"
    )
    line.add_argument("--codes", type=int, default=150, help="codec tokens of a reply at most, 50 a second")
    line.add_argument("--long", type=int, default=750, help="of the replies that slow readers ask for")
    line.add_argument("--tokens", type=int, default=24, help="text tokens of a reply at most")
    line.add_argument("--rounds", type=int, default=3, help="replies of each session")
    line.add_argument("--most", type=int, default=64, help="sessions at once")
    line.add_argument("--drops", type=int, default=1000)
    line.add_argument("--cancels", type=int, default=200)
    line.add_argument("--pairs", type=int, default=15, help="for the overhead")
    line.add_argument("--listen", type=float, default=10.0, help="seconds of sound for the protocol")
    line.add_argument("--stall", type=float, default=5.0, help="seconds that slow readers do not read")
    record("serve", serve_page.page, measure, line)
