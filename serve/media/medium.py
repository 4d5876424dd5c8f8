"""Read one medium of a request within its limits: the only place where a client's bytes meet a decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from omniport.runtime.errors import MediaError
from omniport.runtime.media.audio import load_audio, open_av
from omniport.runtime.media.image import load_image, picture_size
from omniport.runtime.media.source import parsing, stream

from ..settings import Limits

Kind = Literal["audio", "image", "video"]
#: what a picture of low detail is shown in, longest side (pixels)
LOW_DETAIL = 512
RATE = 16000
_PCM_RATE = 24000


@dataclass(frozen=True, kw_only=True)
class Medium:
    """A medium as it came.

    Attributes:
        raw_rate: of sound that is 16-bit samples alone, Hz.
        detail: of a picture, OpenAI's word. use_audio: a video's sound is heard.
    """

    kind: Kind
    data: bytes
    raw_rate: int | None = None
    detail: str = "auto"
    use_audio: bool = False


def read_medium(medium: Medium, limits: Limits) -> dict[str, Any]:
    """The part of a message that the runtime takes.

    Raises:
        MediaError: it cannot be read, or is beyond a limit.
    """
    if medium.kind == "audio":
        return {"type": "audio", "audio": (read_sound(medium, limits), RATE)}
    if medium.kind == "image":
        return {"type": "image", **_read_picture(medium, limits)}
    _check_video(medium.data, limits)
    return {"type": "video", "video": medium.data, "use_audio": medium.use_audio}


def read_sound(medium: Medium, limits: Limits) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Sound as float32 [n] at ``RATE``."""
    source: Any = medium.data
    if medium.raw_rate is not None:
        source = (np.frombuffer(medium.data[: len(medium.data) // 2 * 2], "<i2"), medium.raw_rate)
    return load_audio(source, RATE, max_seconds=limits.audio_seconds)


def raw_rate(format: str | None, rate: int | None) -> int | None:
    """``Medium.raw_rate`` of what a request calls its sound."""
    return (rate or _PCM_RATE) if format in ("pcm16", "pcm") else None


def _read_picture(medium: Medium, limits: Limits) -> dict[str, Any]:
    height, width = picture_size(medium.data)
    if height * width > limits.image_pixels:
        most = limits.image_pixels / 1e6
        raise MediaError(f"the picture has {width}x{height} pixels; at most {most:g} million are taken: shrink it")
    part: dict[str, Any] = {"image": load_image(medium.data)}
    longest = max(height, width)
    if medium.detail == "low" and longest > LOW_DETAIL:
        part["max_pixels"] = max(1, round(height * width * (LOW_DETAIL / longest) ** 2))
    return part


def _check_video(data: bytes, limits: Limits) -> None:
    """By what the container says; however long it is, the runtime shows no more frames than the model takes."""
    problem = "the video cannot be read", "send mp4, webm, mov or another format that FFmpeg reads"
    with parsing(*problem), stream(data) as opened, open_av(opened) as container:
        seconds = (container.duration or 0) / 1e6
    if seconds > limits.video_seconds:
        raise MediaError(f"the video lasts {seconds:.0f} s; at most {limits.video_seconds:g} s are taken: cut it")
