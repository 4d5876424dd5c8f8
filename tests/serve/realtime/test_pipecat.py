"""A pipeline of Pipecat's with its service for OpenAI's Realtime protocol, unmodified. No part of the `test` extra."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from support.live_turns import voice
from support.loudness import Loudness
from support.realtime import CODES, SAID
from support.served import Served

pytest.importorskip("pipecat.services.openai.realtime.llm", reason="pipecat-ai is not installed: pip install it")
RATE = 24000


@pytest.fixture(autouse=True)
def scripted(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omniport.serve.realtime.voice_activity.SileroVad", Loudness)
    served.live.script(SAID, CODES)


async def answer(url: str) -> list[Any]:
    """Frames that leave a pipeline into which somebody speaks."""
    from pipecat.processors.aggregators.llm_context import LLMContext
    from support.pipecat_pipeline import Running, frames

    async with Running(url) as pipeline:
        await pipeline.put(frames.LLMContextFrame(LLMContext([{"role": "user", "content": "Hello"}])))
        await pipeline.spoken()
        samples = np.concatenate([voice(0.5, RATE), np.zeros(RATE, np.float32)])
        for piece in np.split((samples * 32767).astype("<i2"), 15):
            await pipeline.put(frames.InputAudioRawFrame(piece.tobytes(), RATE, 1))
        await pipeline.spoken()
        return pipeline.came


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_text_and_a_spoken_turn(served: Served) -> None:
    from support.pipecat_pipeline import frames

    came = asyncio.run(answer(f"ws{served.url[4:]}/v1/realtime"))
    assert not [frame for frame in came if isinstance(frame, frames.ErrorFrame)]
    sound = sum(len(frame.audio) for frame in came if isinstance(frame, frames.TTSAudioRawFrame))
    assert sound > 0
    assert sum(isinstance(frame, frames.TTSStartedFrame) for frame in came) == 2
    said = "".join(frame.text for frame in came if isinstance(frame, frames.TTSTextFrame))
    assert said == SAID * 2
