"""LiveKit's plugin for OpenAI's Realtime protocol, unmodified; no LiveKit server. It is no part of the `test` extra."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from support.live_turns import voice
from support.loudness import Loudness
from support.realtime import SAID
from support.served import Served

realtime = pytest.importorskip(
    "livekit.plugins.openai.realtime", reason="livekit-plugins-openai is not installed: pip install it"
)
rtc = pytest.importorskip("livekit.rtc", reason="livekit is not installed")
llm = pytest.importorskip("livekit.agents.llm", reason="livekit-agents is not installed")
RATE = 24000


@pytest.fixture(autouse=True)
def scripted(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omniport.serve.realtime.voice_activity.SileroVad", Loudness)
    served.live.script(SAID, [3, 5, 7, 11, 13] * 20)


async def said(generation: Any) -> tuple[str, float]:
    """Text, and seconds of sound."""
    text, seconds = "", 0.0
    async for message in generation.message_stream:
        async for frame in message.audio_stream:
            seconds += frame.duration
        async for piece in message.text_stream:
            text += piece
    return text, seconds


async def talk(served: Served, work: Any) -> None:
    model = realtime.RealtimeModel(base_url=f"{served.url}/v1", api_key="none", model="gpt-realtime")
    session = model.session()
    errors: list[Any] = []
    session.on("error", errors.append)
    try:
        await asyncio.wait_for(work(session), 60)
        assert not errors
    finally:
        await session.aclose()
        await model.aclose()


def test_a_reply_that_is_asked_for(served: Served) -> None:
    async def work(session: Any) -> None:
        history = llm.ChatContext.empty()
        history.add_message(role="user", content="Hello")
        history.add_message(role="assistant", content="Good morning.")
        history.add_message(role="user", content="How are you?")
        await session.update_instructions("Answer in one sentence.")
        await session.update_chat_ctx(history)
        text, seconds = await said(await session.generate_reply())
        assert text == SAID
        assert seconds > 0

    asyncio.run(talk(served, work))


def test_speech_is_answered(served: Served) -> None:
    async def work(session: Any) -> None:
        generations: asyncio.Queue[Any] = asyncio.Queue()
        session.on("generation_created", generations.put_nowait)
        samples = np.concatenate([voice(0.5, RATE), np.zeros(RATE, np.float32)])
        for piece in np.split((samples * 32767).astype(np.int16), 15):
            session.push_audio(rtc.AudioFrame(piece.tobytes(), RATE, 1, len(piece)))
        text, seconds = await said(await generations.get())
        assert text == SAID
        assert seconds > 0

    asyncio.run(talk(served, work))
