"""Wyoming's own client, unmodified: what Home Assistant sends and gets."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omniport.runtime import OmniSession
from omniport.runtime.errors import UsageError
from omniport.serve.settings import Limits, Settings
from omniport.serve.wyoming.sentences import Sentences
from support.live_turns import held, voice
from support.served import Served
from support.wyoming_client import ask
from wyoming.asr import Transcribe, Transcript
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.client import AsyncTcpClient
from wyoming.event import Event, Eventable, write_event
from wyoming.handle import Handled
from wyoming.info import Describe, Info
from wyoming.ping import Ping
from wyoming.tts import Synthesize, SynthesizeChunk, SynthesizeStart, SynthesizeStop, SynthesizeVoice

SAID = "Hello"
#: a second of speech: what the fake says of itself may be none
CODES = [3, 5, 7, 11, 13] * 10
Talk = Callable[[AsyncTcpClient], Awaitable[Any]]


@pytest.fixture
def make(root: Path) -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def build(**settings: Any) -> Served:
        made.append(Served(root, wyoming=("127.0.0.1", 0), **settings).start())
        made[-1].live.script(SAID, CODES)
        return made[-1]

    yield build
    for served in made:
        served.close()


@pytest.fixture
def served(make: Callable[..., Served]) -> Served:
    return make()


def talk(served: Served, work: Talk) -> Any:
    """What a client makes of its connection."""

    async def run() -> Any:
        async with AsyncTcpClient(*served.wyoming, connect_timeout=10, read_timeout=20) as client:
            return await work(client)

    return asyncio.run(run())


def kinds(events: list[Event]) -> list[str]:
    """Their types, those in a row once."""
    types = [event.type for event in events]
    return [kind for i, kind in enumerate(types) if not i or types[i - 1] != kind]


def recorded(seconds: float, rate: int = 16000, channels: int = 1, width: int = 2) -> list[Eventable]:
    samples = np.repeat(voice(seconds, rate)[:, None], channels, 1)
    if width == 1:
        data = (samples * 127 + 128).astype("u1").tobytes()
    else:
        data = (samples * (2 ** (8 * width - 1) - 1)).astype(f"<i{width}").tobytes()
    format = {"rate": rate, "width": width, "channels": channels}
    size = rate // 10 * width * channels
    chunks = [AudioChunk(**format, audio=data[at : at + size]) for at in range(0, len(data), size)]
    return [AudioStart(**format), *chunks, AudioStop()]


def test_what_there_is(served: Served) -> None:
    async def work(client: AsyncTcpClient) -> tuple[Info, Event]:
        (told,) = await ask(client, "info", Describe())
        (pong,) = await ask(client, "pong", Ping("x"))
        return Info.from_event(told), pong

    info, pong = talk(served, work)
    assert pong.data == {"text": "x"}
    assert info.asr[0].supports_transcript_streaming
    assert info.handle[0].supports_handled_streaming
    assert info.tts[0].supports_synthesize_streaming
    assert [voice.name for voice in info.tts[0].voices] == served.service.voice_names
    assert info.asr[0].models[0].installed
    assert "en" in info.asr[0].models[0].languages


@pytest.mark.parametrize(("rate", "channels", "width"), [(16000, 1, 2), (48000, 2, 4), (8000, 1, 1)])
def test_speech_to_text(served: Served, rate: int, channels: int, width: int) -> None:
    async def work(client: AsyncTcpClient) -> list[Event]:
        return await ask(client, "transcript-stop", Transcribe(language="en"), *recorded(1.0, rate, channels, width))

    came = talk(served, work)
    assert kinds(came) == ["transcript-start", "transcript-chunk", "transcript", "transcript-stop"]
    assert "".join(event.data["text"] for event in came if event.type == "transcript-chunk") == SAID
    told = Transcript.from_event(came[-2])
    assert (told.text, told.language) == (SAID, "en")


def test_the_likeliest_is_written_down(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = []
    reply = served.service.session.reply

    def watched(*arguments: Any, **options: Any) -> Any:
        sampled.append(options["thinker"].temperature)
        return reply(*arguments, **options)

    monkeypatch.setattr(served.service.session, "reply", watched)

    async def work(client: AsyncTcpClient) -> None:
        await ask(client, "transcript", *recorded(0.5))

    talk(served, work)
    assert sampled == [0.0]


def test_a_question_is_answered_and_the_conversation_goes_on(served: Served) -> None:
    context = {"conversation_id": "c1"}

    async def work(client: AsyncTcpClient) -> list[Event]:
        return await ask(client, "handled-stop", Transcript("What is a fjord?", context=context))

    came = talk(served, work)
    assert kinds(came) == ["handled-start", "handled-chunk", "handled", "handled-stop"]
    handled = Handled.from_event(came[-2])
    assert (handled.text, handled.context) == (SAID, context)
    talk(served, work)  # over another connection, as Home Assistant does
    counted = 'omniport_requests_total{route="wyoming/handle",status="200"} 2.0'
    metrics = metrics_with(served, counted)
    assert float(metrics.split("\nomniport_reused_tokens_total ")[1].split()[0]) > 20


def metrics_with(served: Served, line: str) -> str:
    """All metrics, once that is among them: a request is counted after all of it was sent."""
    due, metrics = time.monotonic() + 20, ""
    while line not in metrics and time.monotonic() < due:
        metrics = served.http().get("/metrics").text
    assert line in metrics
    return metrics


def sound_of(events: list[Event]) -> int:
    """Samples, all of one format."""
    assert {tuple(event.data[key] for key in ("rate", "width", "channels")) for event in events[:-1]} == {(24000, 2, 1)}
    return sum(len(event.payload or b"") for event in events if event.type == "audio-chunk") // 2


def test_text_to_speech(served: Served) -> None:
    async def work(client: AsyncTcpClient) -> list[Event]:
        return await ask(client, "audio-stop", Synthesize("Hello there.", SynthesizeVoice("Ethan")))

    came = talk(served, work)
    assert kinds(came) == ["audio-start", "audio-chunk", "audio-stop"]
    assert sound_of(came) > 0
    assert all(len(event.payload or b"") <= 4800 for event in came)


def test_a_text_that_comes_in_pieces_is_spoken_as_it_comes(served: Served) -> None:
    async def work(client: AsyncTcpClient) -> tuple[list[Event], list[Event]]:
        start = SynthesizeStart(voice=SynthesizeVoice("Chelsie"))
        first = await ask(client, "audio-chunk", start, SynthesizeChunk("Hello there. How"))
        rest = await ask(
            client,
            "synthesize-stopped",
            SynthesizeChunk(" are you"),
            Synthesize("Hello there. How are you"),
            SynthesizeStop(),
        )
        return first, rest

    first, rest = talk(served, work)
    assert kinds(first) == ["audio-start", "audio-chunk"]
    assert kinds(rest) == ["audio-chunk", "audio-stop", "synthesize-stopped"]
    assert served.quiet()


def test_what_cannot_be_done_is_told_and_the_client_goes_on(make: Callable[..., Served]) -> None:
    served = make(limits=Limits(audio_seconds=1.0))

    async def work(client: AsyncTcpClient) -> list[tuple[str, str]]:
        told = []
        for events in (
            [Synthesize("Hello", SynthesizeVoice("Nobody"))],
            [Synthesize("x" * 30_000)],
            [Transcript("  ")],
            [Transcribe(), *recorded(2.0)],
            [Transcribe(), AudioStart(16000, 2, 1), AudioStop()],
            [Transcribe(), AudioStart(16000, 2, 1), AudioChunk(1, 2, 1, b"ab")],
        ):
            came = await ask(client, "error", *events)
            told.append((came[-1].data["code"], came[-1].data["text"]))
        (pong,) = await ask(client, "pong", Ping())
        assert pong.type == "pong"
        served.service.state = "draining"
        told.append(((await ask(client, "error", Synthesize("Hello")))[-1].data["code"], ""))
        return told

    codes = [code for code, _ in talk(served, work)]
    assert codes == ["voice_not_found", *["invalid_value"] * 5, "not_ready"]


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\n",
        b"[]\n",
        b'{"type": 3}\n',
        b"x" * 100_000,
        b'{"type":"ping","data_length":-1}\n',
        b'{"type":"ping","data_length":2}\n[]',
        b'{"type":"ping","payload_length":1099511627776}\n',
    ],
)
def test_what_is_no_event_ends_the_connection(served: Served, sent: bytes) -> None:
    with socket.create_connection(served.wyoming, timeout=20) as client:
        client.sendall(sent)
        told = b""
        while data := client.recv(65536):
            told += data
    assert b'"error"' in told.splitlines()[0]
    assert b"invalid_value" in told


def test_a_client_that_leaves_cancels(served: Served) -> None:
    with held(served.live.backend.graphs, "thinker", at=2) as gate:

        async def work(client: AsyncTcpClient) -> None:
            await client.write_event(Transcript("Hello").event())
            await asyncio.to_thread(gate.reached.wait, 20)

        talk(served, work)
        metrics_with(served, 'interruptions_total{reason="client_left"}')
    assert served.quiet(), "its place is free"
    metrics_with(served, 'omniport_requests_total{route="wyoming/handle",status="499"} 1.0')


def test_clients_that_leave_at_once_free_all(served: Served) -> None:
    for event in (Transcript("Hello"), SynthesizeStart(), Synthesize("Hello there.")):
        for _ in range(5):
            with socket.create_connection(served.wyoming, timeout=20) as client:
                file = client.makefile("wb")
                write_event(event.event(), file)
                file.close()
    due = time.monotonic() + 30  # the last connections may not have been looked at yet
    while served.http().get("/v1/omniport/capacity").json()["active"]:
        assert time.monotonic() < due, "a place is not free again"
        time.sleep(0.05)


def test_a_text_whose_voice_is_unknown_holds_nobody_up(served: Served) -> None:
    async def work(client: AsyncTcpClient) -> list[str]:
        chunks = [SynthesizeChunk("One. ") for _ in range(600)]
        start = SynthesizeStart(voice=SynthesizeVoice("Nobody"))
        codes = [(await ask(client, "error", start, *chunks, SynthesizeStop()))[-1].data["code"]]
        came = await ask(client, "pong", Ping())
        return [*codes, came[-1].type]

    assert talk(served, work) == ["voice_not_found", "pong"]


def test_more_clients_than_may_be_are_told(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omniport.serve.wyoming.listener._MOST", 1)

    async def work(client: AsyncTcpClient) -> tuple[str, str]:
        (first,) = await ask(client, "pong", Ping())
        async with AsyncTcpClient(*served.wyoming, read_timeout=20) as other:
            told = await other.read_event()
            assert told is not None
            assert await other.read_event() is None
        return first.type, told.data["code"]

    assert talk(served, work) == ("pong", "session_limit_reached")


def test_replies_wait_for_their_place_and_too_many_are_refused(make: Callable[..., Served]) -> None:
    served = make(limits=Limits(queue=0))

    async def work(client: AsyncTcpClient) -> tuple[str, str]:
        await client.write_event(Transcript("Hello").event())
        await asyncio.to_thread(gate.reached.wait, 20)
        async with AsyncTcpClient(*served.wyoming, read_timeout=20) as other:
            refused = (await ask(other, "handled", Transcript("Hello")))[-1]
        gate.go.set()
        return refused.data["code"], (await ask(client, "handled"))[-1].data["text"]

    with held(served.live.backend.graphs, "thinker", at=2) as gate:
        assert talk(served, work) == ("session_limit_reached", SAID)


def test_a_connection_asks_for_so_much_at_once(served: Served) -> None:
    async def work(client: AsyncTcpClient) -> tuple[str, list[str]]:
        refused = (await ask(client, "handled", *[Transcript("Hello")] * 5))[-1]
        gate.go.set()
        return refused.data["code"], [(await ask(client, "handled"))[-1].type for _ in range(4)]

    with held(served.live.backend.graphs, "thinker", at=2) as gate:
        assert talk(served, work) == ("session_limit_reached", ["handled"] * 4)


def test_it_has_no_keys_so_others_are_let_in_by_name_alone() -> None:
    with pytest.raises(UsageError, match="Wyoming has no keys"):
        Settings(wyoming=("0.0.0.0", 10300), keys=("sk-key",))
    Settings(wyoming=("0.0.0.0", 10300), no_auth=True)
    Settings(wyoming=("::1", 10300), keys=("sk-key",))


def test_sentences() -> None:
    sentences = Sentences()
    assert sentences.add("One. Two! Thr") == ["One.", "Two!"]
    assert sentences.add("ee? 3.5 of them.\n") == ["Three?", "3.5 of them."]
    assert sentences.add("\u4f60\u597d\u3002\u518d\u89c1") == ["\u4f60\u597d\u3002"]
    assert sentences.finish() == ["\u518d\u89c1"]
    long = Sentences().add("word " * 200)
    assert all(len(part) <= 400 for part in long)
    assert Sentences().add("... !!! \n") == []


@pytest.mark.parametrize("error", [asyncio.TimeoutError, TimeoutError, ConnectionResetError])
def test_a_fault_of_the_server_is_not_taken_for_a_client_that_left(
    served: Served, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(OmniSession, "reply", fail)

    async def work(client: AsyncTcpClient) -> tuple[list[Event], list[Event]]:
        told = await ask(client, "audio-stop", Synthesize("Hello there."))
        return told, await ask(client, "pong", Ping("x"))

    told, pong = talk(served, work)
    assert [event.data["code"] for event in told] == ["internal_error"]
    assert kinds(pong) == ["pong"]
    metrics_with(served, 'omniport_requests_total{route="wyoming/tts",status="500"} 1.0')
