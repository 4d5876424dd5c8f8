"""What a reply yields."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["AudioChunk", "Done", "Event", "Stats", "TextDelta"]


@dataclass(frozen=True)
class TextDelta:
    """Text that one thinker token completed. Empty while a multi-byte character is unfinished."""

    text: str
    token_id: int


@dataclass(frozen=True)
class AudioChunk:
    """Consecutive samples of the spoken reply: float32 [n] in -1..1."""

    samples: NDArray[np.float32]
    sample_rate: int
    index: int


@dataclass
class Stats:
    """Measurements of one reply. Times are seconds since ``reply`` was called; None where a stage did not run."""

    backend: str = ""
    prompt_tokens: int = 0
    text_tokens: int = 0
    codec_tokens: int = 0
    audio_seconds: float = 0.0
    time_to_first_token: float | None = None
    time_to_first_audio: float | None = None
    total_time: float = 0.0
    real_time_factor: float | None = None
    """total compute seconds per second of audio"""
    busy: dict[str, float] = field(default_factory=dict)
    """seconds spent in each stage: preprocess, audio_encoder, vision_encoder, prefill, thinker, talker, dit, bigvgan"""


@dataclass(frozen=True)
class Done:
    """End of the reply. ``token_ids`` without the stop token; ``codec_ids`` without the stop code."""

    text: str
    token_ids: list[int]
    codec_ids: list[int]
    stats: Stats


Event = TextDelta | AudioChunk | Done
