"""Decode video with PyAV (FFmpeg): frames sampled at fixed times, and the sound track."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import VisionFrontend
from ..errors import MediaError
from .audio import open_av, read_track, resample
from .image import MAX_PIXELS
from .source import Source, check_source, describe, require, stream

#: most memory that the sampled frames of one clip may take
MAX_BYTES = 4 << 30
SAMPLING_RATE = 16000
#: shortest sound track that gives an audio token (seconds); shorter ones count as silence
MIN_SOUND = 0.04


@dataclass(frozen=True, eq=False)
class VideoClip:
    """Sampled frames and sound of one video.

    Attributes:
        frames: uint8 [F, H, W, 3] in the source's size, upright; F is a multiple of the temporal patch size.
        times: float64 [F], the instants the frames were sampled at, in seconds from the first frame.
        second_per_grid: seconds that one temporal patch stands for.
        audio: float32 [n], 16 kHz mono, sample 0 at the first frame; None without a sound track or when not asked for.
    """

    frames: NDArray[np.uint8]
    times: NDArray[np.float64]
    second_per_grid: float
    audio: NDArray[np.float32] | None


def load_video(source: Source, frontend: VisionFrontend, with_audio: bool) -> VideoClip:
    """Read a video: the frame on show at 0, 1/fps, 2/fps, ... seconds, and its sound.

    The sampling rate is ``frontend.video_fps``. A clip that would give more than ``video_max_frames`` is sampled
    evenly that many times, and ``second_per_grid`` grows. An odd count is made even by repeating the last frame.
    Real times are kept for variable frame rates. Memory holds the sampled frames only.

    Args:
        source: a path, or the bytes of a file, of any container and codec that FFmpeg reads.
        with_audio: False never decodes the sound.

    Raises:
        MediaError: missing, empty or unreadable file; no video stream or no frame in it; frames beyond
            ``vision.MAX_PIXELS`` or together beyond ``MAX_BYTES``; a sound track that cannot be used.
    """
    checked = check_source(source, "video")
    label = f"video {describe(source)}"
    av = require("av")
    try:
        start, duration = _scan(checked, label)
        times, step = _sample_times(duration, frontend)
        frames = _pick_frames(checked, label, start, times, frontend.temporal_patch_size)
        audio = _sound(checked, label, start) if with_audio else None
    except (av.FFmpegError, ValueError) as error:
        raise MediaError(
            f"{label} cannot be decoded (FFmpeg: {error}); expected mp4, mkv, webm, mov, avi or another format that "
            "FFmpeg reads: convert it or check the file"
        ) from error
    missing = frames.shape[0] - times.shape[0]
    times = np.concatenate([times, times[-1] + step * np.arange(1, missing + 1)])
    return VideoClip(frames, times, frontend.temporal_patch_size * step, audio)


def _video_stream(container: Any, label: str) -> Any:
    """The first video stream that is not a cover picture."""
    cover = require("av").stream.Disposition.attached_pic
    for candidate in container.streams.video:
        if not candidate.disposition & cover:
            return candidate
    raise MediaError(f"{label} is a video without frames: it has no video stream; pass it as audio if it is sound")


def _scan(source: Path | bytes, label: str) -> tuple[float, float]:
    """Read packets without decoding: time of the first frame, and seconds from there to the end of the last."""
    with stream(source) as opened, open_av(opened) as container:
        video = _video_stream(container, label)
        context = video.codec_context
        if context is None:
            raise MediaError(f"{label} is in a codec that FFmpeg does not know here; convert it to H.264 in mp4")
        if context.width * context.height > MAX_PIXELS:
            raise MediaError(
                f"{label} is too large: {context.width}x{context.height} pixels a frame, at most {MAX_PIXELS}"
            )
        base = video.time_base
        rate = float(video.average_rate or video.guessed_rate or 25)
        spans: list[tuple[float, float]] = []
        for packet in container.demux(video):
            if packet.size == 0 or packet.is_discard:  # the flush at the end, and what an edit list hides
                continue
            if packet.pts is None:  # raw streams: frames follow each other at the nominal rate
                start, length = len(spans) / rate, 1 / rate
            else:
                start, length = float(packet.pts * base), float((packet.duration or 0) * base)
            spans.append((start, start + length))
    if not spans:
        raise MediaError(f"{label} is a video without frames: its video stream is empty; record or export it again")
    spans.sort()
    first, (last, end) = spans[0][0], spans[-1]
    if end <= last:  # no duration stored: the last frame stays as long as frames do on average
        end = last + ((last - first) / (len(spans) - 1) if len(spans) > 1 else 1 / rate)
    return first, end - first


def _sample_times(duration: float, frontend: VisionFrontend) -> tuple[NDArray[np.float64], float]:
    """Sampling instants in seconds from the first frame, and the step between them."""
    depth = frontend.temporal_patch_size
    step = 1.0 / frontend.video_fps
    most = max(depth, frontend.video_max_frames // depth * depth)
    # Containers round times: a clip of 2.001 s has no fifth instant at 2 s.
    count = max(1, math.ceil(duration / step - 0.01))
    if count > most:
        count, step = most, duration / most
    return np.arange(count, dtype=np.float64) * np.float64(step), step


def _pick_frames(
    source: Path | bytes, label: str, start: float, times: NDArray[np.float64], depth: int
) -> NDArray[np.uint8]:
    """Decode once, in order, and keep the frame on show at each instant: uint8 [F, H, W, 3], F a multiple of depth."""
    picked: NDArray[np.uint8] | None = None
    filled = 0
    with stream(source) as opened, open_av(opened) as container:
        video = _video_stream(container, label)
        video.thread_type = "AUTO"
        for frame, due in _shown(container, video, start, times):
            if due > filled:
                pixels = _upright(frame, None if picked is None else picked.shape[1:3])
                if picked is None:
                    picked = _allocate(-(-times.shape[0] // depth) * depth, pixels, label)
                picked[filled:due] = pixels
                filled = due
            if filled == times.shape[0]:
                break
    if picked is None:
        raise MediaError(f"{label} is a video without frames: nothing in its video stream decodes; export it again")
    picked[filled:] = picked[filled - 1]
    return picked


def _shown(container: Any, video: Any, start: float, times: NDArray[np.float64]) -> Iterator[tuple[Any, int]]:
    """Decoded frames, each with the number of instants that pass before the next one takes its place."""
    rate = float(video.average_rate or video.guessed_rate or 25)
    shown = None
    for number, frame in enumerate(container.decode(video)):
        time = number / rate if frame.pts is None else float(frame.time) - start
        if shown is not None:
            # A frame whose time stamp was rounded up by less than a millisecond is on show at its instant.
            yield shown, int(np.searchsorted(times, time - 1e-3, side="left"))
        shown = frame
    if shown is not None:
        yield shown, times.shape[0]


def _allocate(count: int, pixels: NDArray[np.uint8], label: str) -> NDArray[np.uint8]:
    if count * pixels.nbytes > MAX_BYTES:
        height, width = pixels.shape[:2]
        raise MediaError(
            f"{label} is too large: {count} frames of {width}x{height} take {count * pixels.nbytes >> 20} MiB, "
            f"at most {MAX_BYTES >> 20} MiB are kept; shrink or shorten it"
        )
    return np.empty((count, *pixels.shape), np.uint8)


def _upright(frame: Any, size: tuple[int, ...] | None) -> NDArray[np.uint8]:
    """RGB, uint8 [H, W, 3], with the container's rotation applied (phones film lying down)."""
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    pixels = frame.to_ndarray(format="rgb24")
    pixels = np.rot90(pixels, turns)
    if size is not None and pixels.shape[:2] != size:  # the stream changed its size: bring back the first one's
        height, width = size if turns % 2 == 0 else size[::-1]
        pixels = np.rot90(frame.reformat(width=width, height=height, format="rgb24").to_ndarray(), turns)
    return np.ascontiguousarray(pixels)


def _sound(source: Path | bytes, label: str, start: float) -> NDArray[np.float32] | None:
    """The first sound track at 16 kHz, aligned with the first frame; None if there is none worth a token."""
    with stream(source) as opened, open_av(opened) as container:
        if not container.streams.audio:
            return None
        samples, rate = read_track(container, f"sound of {label}", origin=start)
    if samples.shape[0] < MIN_SOUND * rate or samples.shape[0] == 0:
        return None
    if not np.isfinite(samples).all():
        raise MediaError(f"sound of {label} holds NaN or infinite samples; re-encode it")
    return resample(samples, rate, SAMPLING_RATE)
