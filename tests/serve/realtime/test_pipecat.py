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

frames = pytest.importorskip("pipecat.frames.frames", reason="pipecat-ai is not installed: pip install pipecat-ai")
service = pytest.importorskip("pipecat.services.openai.realtime.llm", reason="pipecat-ai is not installed")
RATE = 24000


@pytest.fixture(autouse=True)
def scripted(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omniport.serve.realtime.voice_activity.SileroVad", Loudness)
    served.live.script(SAID, CODES)


async def answer(url: str) -> list[Any]:
    """Frames that leave a pipeline into which somebody speaks."""
    from pipecat.pipeline.pipeline import Pipeline
    from pipecat.pipeline.worker import PipelineParams, PipelineWorker
    from pipecat.processors.aggregators.llm_context import LLMContext
    from pipecat.processors.frame_processor import FrameProcessor
    from pipecat.workers.runner import WorkerRunner

    came: list[Any] = []
    spoken = asyncio.Event()

    class Collect(FrameProcessor):  # type: ignore[misc]
        async def process_frame(self, frame: Any, direction: Any) -> None:
            await super().process_frame(frame, direction)
            came.append(frame)
            if isinstance(frame, frames.TTSStoppedFrame):
                spoken.set()
            await self.push_frame(frame, direction)

    model = service.OpenAIRealtimeLLMService(api_key="none", base_url=url)
    rates = PipelineParams(audio_in_sample_rate=RATE, audio_out_sample_rate=RATE)
    task = PipelineWorker(Pipeline([model, Collect()]), params=rates)
    running = asyncio.ensure_future(WorkerRunner(handle_sigint=False).run(task))
    try:
        await task.queue_frame(frames.LLMContextFrame(LLMContext([{"role": "user", "content": "Hello"}])))
        await asyncio.wait_for(spoken.wait(), 30)
        spoken.clear()
        samples = np.concatenate([voice(0.5, RATE), np.zeros(RATE, np.float32)])
        for piece in np.split((samples * 32767).astype("<i2"), 15):
            await task.queue_frame(frames.InputAudioRawFrame(piece.tobytes(), RATE, 1))
        await asyncio.wait_for(spoken.wait(), 30)
    finally:
        await task.cancel()
        await asyncio.gather(running, return_exceptions=True)
    return came


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_text_and_a_spoken_turn(served: Served) -> None:
    came = asyncio.run(answer(f"ws{served.url[4:]}/v1/realtime"))
    assert not [frame for frame in came if isinstance(frame, frames.ErrorFrame)]
    sound = sum(len(frame.audio) for frame in came if isinstance(frame, frames.TTSAudioRawFrame))
    assert sound > 0
    assert sum(isinstance(frame, frames.TTSStartedFrame) for frame in came) == 2
    said = "".join(frame.text for frame in came if isinstance(frame, frames.TTSTextFrame))
    assert said == SAID * 2
