"""OpenAI's agents SDK, unmodified, with its default session: it is no part of the `test` extra."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from support.live_turns import held, voice
from support.loudness import Loudness
from support.realtime import CODES, SAID
from support.served import Served

realtime = pytest.importorskip("agents.realtime", reason="openai-agents is not installed: pip install openai-agents")
RATE = 24000


@pytest.fixture(autouse=True)
def scripted(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omniport.serve.realtime.voice_activity.SileroVad", Loudness)
    served.live.script(SAID, CODES)


class Talk:
    """A session of the SDK's, and the events that it has given."""

    def __init__(self, session: Any) -> None:
        self.session, self.events = session, aiter(session)
        self.came: list[Any] = []

    async def until(self, kind: str) -> Any:
        while not self.came or self.came[-1].type != kind:
            self.came.append(await asyncio.wait_for(anext(self.events), 20))
            assert self.came[-1].type != "error", self.came[-1]
        event, self.came = self.came[-1], []
        return event

    async def hear(self, samples: Any) -> None:
        await self.session.send_audio((samples * 32767).astype("<i2").tobytes())


async def talk(served: Served, work: Any) -> None:
    agent = realtime.RealtimeAgent(name="Assistant", instructions="Answer in one sentence.")
    where = {"api_key": "none", "url": f"ws{served.url[4:]}/v1/realtime?model=gpt-realtime"}
    session = await realtime.RealtimeRunner(agent).run(model_config=where)
    async with session:
        await work(Talk(session))


def test_a_message_is_answered_in_speech(served: Served) -> None:
    async def work(talk: Talk) -> None:
        await talk.session.send_message("Hello")
        sound = (await talk.until("audio")).audio.data
        assert len(sound) > 0
        await talk.until("audio_end")
        await talk.until("agent_end")
        *_, said = talk.session._history
        assert said.role == "assistant"
        assert said.content[0].transcript == SAID

    asyncio.run(talk(served, work))


def test_speech_interrupts_and_is_answered(served: Served) -> None:
    async def work(talk: Talk) -> None:
        silence = np.zeros(RATE, np.float32)
        with held(served.live.backend.graphs, "bigvgan", at=2) as gate:
            await talk.hear(np.concatenate([voice(0.5, RATE), silence]))
            await talk.until("audio")
            await talk.hear(voice(0.5, RATE))
            await asyncio.sleep(0.3)
            gate.go.set()
            await talk.until("audio_interrupted")
        await talk.hear(silence)
        await talk.until("audio_end")

    asyncio.run(talk(served, work))
