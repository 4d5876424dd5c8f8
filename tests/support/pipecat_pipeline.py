"""A pipeline of Pipecat's with its service for OpenAI's Realtime protocol, unmodified."""

from __future__ import annotations

import asyncio
from typing import Any

from pipecat.frames import frames
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.frame_processor import FrameProcessor
from pipecat.services.openai.realtime.llm import OpenAIRealtimeLLMService
from pipecat.workers.runner import WorkerRunner

RATE = 24000


class Running:
    """While it is entered. ``came``: frames that left it."""

    def __init__(self, url: str) -> None:
        self.came: list[Any] = []
        self._spoken = asyncio.Event()
        model = OpenAIRealtimeLLMService(api_key="none", base_url=url)
        rates = PipelineParams(audio_in_sample_rate=RATE, audio_out_sample_rate=RATE)
        self._task = PipelineWorker(Pipeline([model, self._collector()]), params=rates)

    def _collector(self) -> FrameProcessor:
        outer = self

        class Collect(FrameProcessor):  # type: ignore[misc]
            async def process_frame(self, frame: Any, direction: Any) -> None:
                await super().process_frame(frame, direction)
                outer.came.append(frame)
                if isinstance(frame, frames.TTSStoppedFrame):
                    outer._spoken.set()
                await self.push_frame(frame, direction)

        return Collect()

    async def __aenter__(self) -> Running:
        self._runs = asyncio.ensure_future(WorkerRunner(handle_sigint=False).run(self._task))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._task.cancel()
        await asyncio.gather(self._runs, return_exceptions=True)

    async def put(self, frame: Any) -> None:
        """Into its front."""
        await self._task.queue_frame(frame)

    async def spoken(self) -> None:
        """Once a reply was spoken."""
        await asyncio.wait_for(self._spoken.wait(), 30)
        self._spoken.clear()
