"""Read one medium of a request within its limits: the only place where a client's bytes meet a decoder.

Files are decoded by a child process. Here are read 16-bit samples alone, and wav files that hold no more than those.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from omniport.runtime.bundle.manifest import VisionFrontend
from omniport.runtime.media.audio import MAX_CHANNELS, RATES, check_level, load_audio
from omniport.runtime.media.limits import Sampling, VisionLimits, sample_frames
from omniport.runtime.media.video import MAX_SOUND, SAMPLING_RATE

from ..settings import Limits
from .decoders import Decoders
from .decoding_messages import Frames, Opened, OpenVideo, Picture, Sound, Track

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


def read_medium(medium: Medium, limits: Limits, decoders: Decoders) -> dict[str, Any]:
    """The part of a message that the runtime takes.

    Raises:
        MediaError: it cannot be read, or is beyond a limit.
    """
    if medium.kind == "audio":
        return {"type": "audio", "audio": (_read_sound(medium, limits, decoders), RATE)}
    if medium.kind == "image":
        return {"type": "image", **_read_picture(medium, limits, decoders)}
    video = DecodedVideo(medium.data, limits, decoders)
    return {"type": "video", "video": video, "use_audio": medium.use_audio}


def raw_rate(format: str | None, rate: int | None) -> int | None:
    """``Medium.raw_rate`` of what a request calls its sound."""
    return (rate or _PCM_RATE) if format in ("pcm16", "pcm") else None


def _read_sound(medium: Medium, limits: Limits, decoders: Decoders) -> NDArray[np.float32]:
    """Sound as float32 [n] at ``RATE``."""
    data, samples = medium.data, None
    if medium.raw_rate is not None:
        samples = np.frombuffer(data[: len(data) // 2 * 2], "<i2"), medium.raw_rate
    else:
        samples = plain_wav(data)
    if samples is not None:
        return load_audio(samples, RATE, max_seconds=limits.audio_seconds)
    decoded = decoders.decode(Sound(RATE, limits.audio_seconds), data)
    assert isinstance(decoded, np.ndarray), "sound is an array"
    return decoded


def plain_wav(data: bytes) -> tuple[NDArray[np.int16], int] | None:
    """16-bit samples [n, channels] and their rate, of a wav file that holds those and is whole; None of any other."""
    if data[:4] != b"RIFF" or data[8:16] != b"WAVEfmt " or len(data) < 44:
        return None
    size, kind, channels, rate, _, _, bits = struct.unpack_from("<IHHIIHH", data, 16)
    start = 20 + size + size % 2
    if (kind, bits) != (1, 16) or not 16 <= size <= 40 or not 1 <= channels <= MAX_CHANNELS:
        return None
    while len(data) >= start + 8 and data[start : start + 4] in (b"LIST", b"fact"):
        start += 8 + (length := int.from_bytes(data[start + 4 : start + 8], "little")) + length % 2
    length = int.from_bytes(data[start + 4 : start + 8], "little")
    if data[start : start + 4] != b"data" or start + 8 + length > len(data) or length % (2 * channels):
        return None
    if not RATES[0] <= rate <= RATES[1] or length // (2 * channels) <= channels:
        return None
    return np.frombuffer(data, "<i2", length // 2, start + 8).reshape(-1, channels), rate


def _read_picture(medium: Medium, limits: Limits, decoders: Decoders) -> dict[str, Any]:
    pixels = decoders.decode(Picture(limits.image_pixels), medium.data)
    assert isinstance(pixels, np.ndarray), "a picture is an array"
    part: dict[str, Any] = {"image": pixels}
    longest = max(pixels.shape[:2])
    if medium.detail == "low" and longest > LOW_DETAIL:
        part["max_pixels"] = max(1, round(pixels.shape[0] * pixels.shape[1] * (LOW_DETAIL / longest) ** 2))
    return part


class DecodedVideo:
    """A video that the runtime reads by a child, see ``runtime.media.video.Video``.

    Raises:
        MediaError: it cannot be read, or is beyond a limit.
    """

    listed = False

    def __init__(self, data: bytes, limits: Limits, decoders: Decoders) -> None:
        self._data, self._decoders = data, decoders
        opened = decoders.decode(OpenVideo(limits.video_seconds), data)
        assert isinstance(opened, Opened), "a video is looked at first"
        self.frames, self.rate = opened.frames, opened.rate
        self.height, self.width = opened.height, opened.width

    def sample(self, frontend: VisionFrontend, limits: VisionLimits, most: int | None = None) -> Sampling:
        """Which frames are shown, at most ``most`` if given."""
        return sample_frames(self.frames, self.rate, frontend, limits, most)

    def read(self, indices: NDArray[np.int64], size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """These frames, uint8 [F, H, W, 3], in the source's size or another."""
        asked = Frames([int(index) for index in indices], size or (self.height, self.width))
        frames = self._decoders.decode(asked, self._data)
        assert isinstance(frames, np.ndarray), "frames are an array"
        return frames

    def sound(self, limits: VisionLimits, max_seconds: float = MAX_SOUND) -> NDArray[np.float32] | None:
        """The sound beside what is shown: float32 [n], 16 kHz mono; None without one."""
        track = self._decoders.decode(Track(limits.video_start, limits.video_end, max_seconds), self._data)
        if track is None:
            return None
        assert isinstance(track, np.ndarray), "sound is an array"
        check_level(track, SAMPLING_RATE, "the sound of the video")
        return track
