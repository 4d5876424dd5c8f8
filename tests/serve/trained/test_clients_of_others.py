"""The trained model answers questions that are spoken to it through the clients of others, unmodified.

None of them is part of the `test` extra: `make serve-check` installs them.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest
from support.paths import REPOSITORY
from support.served import ServedSession
from support.spoken_questions import ANSWERS, RATE, Listener, question

FIRST, SECOND = ANSWERS
NODE = shutil.which("node")


def within_a_minute(work: Awaitable[Any]) -> Any:
    async def run() -> Any:
        return await asyncio.wait_for(work, 60)

    return asyncio.run(run())


def test_openai_agents(wren: ServedSession, listener: Listener) -> None:
    realtime = pytest.importorskip("agents.realtime", reason="openai-agents is not installed: pip install it")

    async def talk() -> tuple[str, bytes]:
        agent = realtime.RealtimeAgent(name="Wren")
        where = {"api_key": "none", "url": f"ws{wren.url[4:]}/v1/realtime?model=gpt-realtime"}
        sound = b""
        async with await realtime.RealtimeRunner(agent).run(model_config=where) as session:
            for piece in question(FIRST).pieces():
                await session.send_audio(piece)
            async for event in session:
                assert event.type != "error", event
                if event.type == "audio":
                    sound += event.audio.data
                elif event.type == "agent_end":
                    break
            *_, said = session._history
            return said.content[0].transcript, sound

    text, sound = within_a_minute(talk())
    assert text == FIRST
    assert listener.hears(sound, FIRST)


def test_livekit(wren: ServedSession, listener: Listener) -> None:
    realtime = pytest.importorskip("livekit.plugins.openai.realtime", reason="livekit-plugins-openai is not installed")
    from livekit import rtc

    async def talk() -> tuple[str, bytes]:
        model = realtime.RealtimeModel(base_url=f"{wren.url}/v1", api_key="none", model="gpt-realtime")
        session = model.session()
        generations: asyncio.Queue[Any] = asyncio.Queue()
        session.on("generation_created", generations.put_nowait)
        text, sound = "", b""
        try:
            for piece in question(SECOND).pieces():
                session.push_audio(rtc.AudioFrame(piece, RATE, 1, len(piece) // 2))
            async for message in (await generations.get()).message_stream:
                async for frame in message.audio_stream:
                    sound += bytes(frame.data)
                async for part in message.text_stream:
                    text += part
        finally:
            await session.aclose()
            await model.aclose()
        return text, sound

    text, sound = within_a_minute(talk())
    assert text == SECOND
    assert listener.hears(sound, SECOND)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pipecat(wren: ServedSession, listener: Listener) -> None:
    pytest.importorskip("pipecat.services.openai.realtime.llm", reason="pipecat-ai is not installed")
    from support.pipecat_pipeline import Running, frames

    async def talk() -> list[Any]:
        async with Running(f"ws{wren.url[4:]}/v1/realtime") as pipeline:
            for piece in question(FIRST).pieces():
                await pipeline.put(frames.InputAudioRawFrame(piece, RATE, 1))
            await pipeline.spoken()
            return pipeline.came

    came = within_a_minute(talk())
    assert "".join(frame.text for frame in came if isinstance(frame, frames.TTSTextFrame)) == FIRST
    sound = b"".join(frame.audio for frame in came if isinstance(frame, frames.TTSAudioRawFrame))
    assert listener.hears(sound, FIRST)


def has_package() -> bool:
    wanted = "require.resolve('@openai/agents-realtime')"
    return NODE is not None and subprocess.run([NODE, "-e", wanted], capture_output=True).returncode == 0


@pytest.mark.skipif(not has_package(), reason="no Node with @openai/agents-realtime: npm install, and NODE_PATH")
def test_agents_realtime_in_javascript(wren: ServedSession, listener: Listener, tmp_path: Path) -> None:
    """The second question is spoken into the answer to the first."""
    for name, answer in (("first", FIRST), ("second", SECOND)):
        (tmp_path / f"{name}.pcm").write_bytes(b"".join(question(answer).pieces()))
    script = REPOSITORY / "tests" / "support" / "agents_realtime_question.cjs"
    command = [str(NODE), str(script), f"ws{wren.url[4:]}/v1/realtime", str(tmp_path)]
    ended = subprocess.run(command, env=os.environ.copy(), capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["errors"] == []
    assert told["interrupted"] >= 1
    (cut,) = told["truncated"]
    assert 0 < cut < 2700, "some of it was heard"
    assert told["said"][-1] == SECOND
    assert listener.hears((tmp_path / "answer-2.pcm").read_bytes(), SECOND)
