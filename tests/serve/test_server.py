"""The command itself, in a process of its own: where it listens, readiness, and how it stops."""

from __future__ import annotations

import asyncio
import base64
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx
import openai
import pytest
from omniport.serve.server import listen
from support.served_process import SLOW, listening, start

BROKEN = """
from support.fake_backend import FakeDecoder
from omniport.runtime.errors import BackendError
def compute(*_): raise BackendError("the engine is for another device")
FakeDecoder.compute = compute
"""


def test_a_signal_ends_the_server_after_the_reply(root: Path, stopped: list[subprocess.Popen[str]]) -> None:
    process = start(root, slow=SLOW, OMNIPORT_API_KEY="sk-1")
    stopped.append(process)
    url = listening(process)
    assert httpx.get(f"{url}/v1/models").status_code == 401
    with openai.OpenAI(base_url=f"{url}/v1", api_key="sk-1", max_retries=0) as client:
        chunks = iter(
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hello"}], stream=True)
        )
        next(chunks)
        process.send_signal(signal.SIGTERM)
        ended = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert ended[-1] == "length", "the reply under way was ended"
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert out == ""
    assert "POST /v1/chat/completions 200" in err
    assert "Traceback" not in err
    assert "Hello" not in err


def test_a_signal_while_the_graphs_are_loaded(root: Path, stopped: list[subprocess.Popen[str]]) -> None:
    process = start(root, "--quiet", slow=SLOW.replace("0.1", "1.0"))
    stopped.append(process)
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    while httpx.get(f"{url}/health").status_code != 200:
        time.sleep(0.05)
    assert httpx.get(f"{url}/ready").status_code == 503
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")


def test_what_is_sent_is_not_held_back() -> None:
    """Nagle's algorithm would add 40 ms to the first sound."""

    async def run() -> int:
        accepted: asyncio.Future[asyncio.BaseTransport] = asyncio.get_running_loop().create_future()

        class Protocol(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                accepted.set_result(transport)

        with listen("127.0.0.1", 0) as bound:
            server = await asyncio.get_running_loop().create_server(Protocol, sock=bound)
            with socket.create_connection(bound.getsockname()):
                transport = await asyncio.wait_for(accepted, 10)
            no_delay = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            transport.close()
            server.close()
            return int(no_delay)

    assert asyncio.run(run())


def test_graphs_that_do_not_run_end_the_server(root: Path, stopped: list[subprocess.Popen[str]]) -> None:
    process = start(root, "--quiet", slow=BROKEN)
    stopped.append(process)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert out.startswith("http://")
    assert err == "error: the engine is for another device\n"


def test_an_address_that_is_taken_or_open_to_all(root: Path, stopped: list[subprocess.Popen[str]]) -> None:
    for arguments, problem in ((["--host", "0.0.0.0"], "--no-auth"), (["--host", "192.0.2.1", "--no-auth"], "listen")):
        process = start(root, "--quiet", *arguments)
        stopped.append(process)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2
        assert problem in err
        assert "Traceback" not in err


@pytest.mark.slow
def test_an_exported_bundle_speaks(tiny_bundle: Path, stopped: list[subprocess.Popen[str]]) -> None:
    """Real graphs, where the other tests have fakes."""
    process = start(tiny_bundle, "--quiet", fake=False)
    stopped.append(process)
    with openai.OpenAI(base_url=f"{listening(process)}/v1", api_key="none", max_retries=0) as client:
        (model,) = client.models.list().data
        made = client.chat.completions.create(
            model=model.id,
            messages=[{"role": "user", "content": "Hello"}],
            modalities=["text", "audio"],
            audio={"voice": "alloy", "format": "wav"},
            max_tokens=8,
            extra_body={"talker": {"max_tokens": 20}},
        )
    audio, usage = made.choices[0].message.audio, made.usage
    assert audio is not None
    assert usage is not None
    assert usage.completion_tokens_details is not None
    codes = usage.completion_tokens_details.audio_tokens
    assert codes
    assert len(base64.b64decode(audio.data)) == 44 + codes * 480 * 2
