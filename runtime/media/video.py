"""Decode video with PyAV (FFmpeg): frames by their numbers, and the sound track; or take lists of frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import VisionFrontend
from ..errors import MediaError
from .audio import open_av, read_track
from .image import load_image, picture_size, resize
from .limits import Sampling, VisionLimits, sample_frames
from .source import as_array, check_source, describe, is_array, parsing, require, stream

VideoSource = Any  # Source | a list of pictures | frames as one array or tensor | Video

#: largest frame, 8K: decoders hold several
MAX_FRAME_PIXELS = 7680 * 4320
#: most frames and packets of one clip
MAX_FRAMES = 1 << 20
#: most memory that the sampled frames of one clip may take
MAX_BYTES = 4 << 30
SAMPLING_RATE = 16000
#: a stated rate that is wrong by more than this gives way to the one that is counted: the sound would part from it
_RATE_ERROR = 0.05
#: longest sound beside a video that is decoded (seconds)
MAX_SOUND = 3600.0
#: shortest sound track that gives an audio token (seconds); shorter ones count as silence
MIN_SOUND = 0.04


@runtime_checkable
class Video(Protocol):
    """An open video, nothing of which is in memory yet.

    Attributes:
        frames: their number. height, width: upright.
        listed: a list of frames, all of which are shown.
    """

    frames: int
    height: int
    width: int
    listed: bool

    @property
    def rate(self) -> float | None:
        """Frames a second; None of a list."""

    def sample(self, frontend: VisionFrontend, limits: VisionLimits, most: int | None = None) -> Sampling:
        """Which frames are shown, at most ``most`` if given."""

    def read(self, indices: NDArray[np.int64], size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """These frames, uint8 [F, H, W, 3], in the source's size or another."""

    def sound(self, limits: VisionLimits, max_seconds: float = MAX_SOUND) -> NDArray[np.float32] | None:
        """The sound beside what is shown: float32 [n], 16 kHz mono, sample 0 at the first frame; None without one."""


@dataclass(frozen=True, eq=False)
class VideoClip:
    """Sampled frames and sound of one video.

    Attributes:
        frames: uint8 [F, H, W, 3] in the source's size, upright; F is a multiple of the temporal patch size.
        second_per_grid: seconds that one temporal patch stands for.
        audio: float32 [n], 16 kHz mono, sample 0 at the first frame; None without a sound track or when not asked for.
    """

    frames: NDArray[np.uint8]
    second_per_grid: float
    audio: NDArray[np.float32] | None


def load_video(
    source: VideoSource, frontend: VisionFrontend, with_audio: bool, limits: VisionLimits | None = None
) -> VideoClip:
    """Read a video: the frames that are shown, see ``sample_frames``, and its sound.

    Args:
        source: as ``open_video``.
        with_audio: False never decodes the sound.

    Raises:
        MediaError: as ``open_video``; frames together beyond ``MAX_BYTES``; a sound track that cannot be used.
    """
    limits = limits or VisionLimits()
    video = open_video(source)
    shown = video.sample(frontend, limits)
    audio = video.sound(limits) if with_audio else None
    return VideoClip(video.read(shown.indices), shown.second_per_grid, audio)


def open_video(source: VideoSource) -> Video:
    """Open a video: packets are counted and one frame is decoded, no more.

    Args:
        source: a path or ``file://`` URL, or the bytes of a file, of any container and codec that FFmpeg reads; a list
            of pictures as ``load_image`` takes them; an array or tensor [F, H, W, 3] or [F, 3, H, W], uint8 or float
            in 0..1; or a video that is open already.

    Raises:
        MediaError: missing, empty or unreadable; no video stream, no frame in it, or one beyond ``MAX_FRAME_PIXELS``.
    """
    if isinstance(source, (list, tuple)) or is_array(source):
        return _Frames(source)
    if isinstance(source, Video):
        return source
    checked = check_source(source, "video")
    return _File(checked, f"video {describe(checked)}")


class _Frames:
    """Frames that are given one by one, or as one array."""

    listed = True
    rate = None

    def __init__(self, source: Any) -> None:
        if is_array(source):
            source = as_array(source, "frames of a video")
            if source.ndim == 4 and source.shape[1] == 3 != source.shape[3]:
                source = source.transpose(0, 2, 3, 1)
            if source.ndim != 4:
                raise MediaError(f"video array has shape {list(source.shape)}; expected [F, H, W, 3]")
        self._source: Sequence[Any] = source
        self.frames = len(source)
        if not self.frames:
            raise MediaError("video is a list without frames; pass at least one picture")
        if self.frames > MAX_FRAMES:
            raise MediaError(f"video is a list of {self.frames} frames, at most {MAX_FRAMES} are taken; shorten it")
        self.height, self.width = picture_size(source[0])

    def sample(self, frontend: VisionFrontend, limits: VisionLimits, most: int | None = None) -> Sampling:
        depth = frontend.temporal_patch_size
        fps = frontend.video_fps if limits.fps is None else limits.fps
        count = -(-self.frames // depth) * depth
        if most is not None and most < count:
            return sample_frames(self.frames, fps, frontend, VisionLimits(max_frames=count), most)
        return Sampling(np.minimum(np.arange(count), self.frames - 1), depth / fps)

    def read(self, indices: NDArray[np.int64], size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        frames = np.empty((len(indices), *(size or (self.height, self.width)), 3), np.uint8)
        for place, number in enumerate(indices):
            pixels = load_image(self._source[number])
            if pixels.shape[:2] != (self.height, self.width):
                raise MediaError(
                    f"frame {number} has {pixels.shape[1]}x{pixels.shape[0]} pixels, the first {self.width}x"
                    f"{self.height}; bring all frames of a video to one size"
                )
            frames[place] = resize(pixels, *frames.shape[1:3])
        return frames

    def sound(self, limits: VisionLimits, max_seconds: float = MAX_SOUND) -> NDArray[np.float32] | None:
        return None


class _File:
    """A file, or the bytes of one."""

    listed = False

    def __init__(self, source: Path | bytes, label: str) -> None:
        self._source, self._label = source, label
        with self._open() as container:
            stream = _video_stream(container, label)
            self._check_size(stream.codec_context.width, stream.codec_context.height)
            self.rate = float(stream.average_rate or stream.guessed_rate or 25)
            starts = self._packets(container, stream)
        self.frames = len(starts)
        span = starts[-1] - starts[0]
        if span > 0 and abs((len(starts) - 1) / span / self.rate - 1) > _RATE_ERROR:
            self.rate = (len(starts) - 1) / span
        self._start = starts[0]
        with self._open() as container:
            frame = next(self._decoded(container), None)
            if frame is None:
                raise MediaError(
                    f"{label} is a video without frames: nothing in its video stream decodes; export it again"
                )
            upright = _upright(frame, None)
            self.height, self.width = upright.shape[:2]

    def sample(self, frontend: VisionFrontend, limits: VisionLimits, most: int | None = None) -> Sampling:
        return sample_frames(self.frames, self.rate, frontend, limits, most)

    def read(self, indices: NDArray[np.int64], size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        shape = (len(indices), *(size or (self.height, self.width)), 3)
        if int(np.prod(shape)) > MAX_BYTES:
            raise MediaError(
                f"{self._label} is too large: {shape[0]} frames of {shape[2]}x{shape[1]} take "
                f"{int(np.prod(shape)) >> 20} MiB, at most {MAX_BYTES >> 20} MiB are kept; shrink or shorten it"
            )
        picked = np.empty(shape, np.uint8)
        filled = 0
        frame = None
        with self._open() as container:
            for number, frame in enumerate(self._decoded(container)):
                if number == indices[filled]:
                    due = int(np.searchsorted(indices, number, side="right"))
                    picked[filled:due] = resize(_upright(frame, (self.height, self.width)), *shape[1:3])
                    filled = due
                    if filled == len(indices):
                        return picked
            if frame is None:
                raise MediaError(f"{self._label} is a video without frames; export it again")
            picked[filled:] = resize(_upright(frame, (self.height, self.width)), *shape[1:3])  # fewer than packets
        return picked

    def sound(self, limits: VisionLimits, max_seconds: float = MAX_SOUND) -> NDArray[np.float32] | None:
        start, end = limits.video_start or 0.0, limits.video_end
        with self._open() as container:
            if not container.streams.audio:
                return None
            samples = read_track(
                container, f"sound of {self._label}", SAMPLING_RATE, max_seconds, origin=self._start + start
            )
        if end is not None:
            samples = samples[: max(0, round((end - start) * SAMPLING_RATE))]
        return samples if samples.shape[0] >= MIN_SOUND * SAMPLING_RATE else None

    @contextmanager
    def _open(self) -> Iterator[Any]:
        with (
            parsing(
                f"{self._label} cannot be decoded",
                "expected mp4, mkv, webm, mov, avi or another format that FFmpeg reads: convert it or check the file",
            ),
            stream(self._source) as opened,
            open_av(opened) as container,
        ):
            yield container

    def _decoded(self, container: Any) -> Iterator[Any]:
        """Frames in the order of their times."""
        video = _video_stream(container, self._label)
        # Each thread of a decoder holds a frame.
        large = video.codec_context.width * video.codec_context.height > 1920 * 1200
        video.thread_type = "SLICE" if large else "AUTO"
        for frame in container.decode(video):
            self._check_size(frame.width, frame.height)
            yield frame

    def _packets(self, container: Any, video: Any) -> list[float]:
        """Times of all packets, in order, without decoding (seconds)."""
        starts: list[float] = []
        for packet in container.demux(video):
            if packet.size == 0 or packet.is_discard:  # the flush at the end, and what an edit list hides
                continue
            # raw streams have no times: frames follow each other at the nominal rate
            starts.append(len(starts) / self.rate if packet.pts is None else float(packet.pts * video.time_base))
            if len(starts) > MAX_FRAMES:
                raise MediaError(f"{self._label} has more than {MAX_FRAMES} frames; cut it into shorter clips")
        if not starts:
            raise MediaError(
                f"{self._label} is a video without frames: its video stream is empty; record or export it again"
            )
        return sorted(starts)

    def _check_size(self, width: int, height: int) -> None:
        if width * height > MAX_FRAME_PIXELS:
            raise MediaError(
                f"{self._label} is too large: {width}x{height} pixels a frame, at most {MAX_FRAME_PIXELS}; shrink it"
            )


def _video_stream(container: Any, label: str) -> Any:
    """The first video stream that is not a cover picture."""
    cover = require("av").stream.Disposition.attached_pic
    for candidate in container.streams.video:
        if not candidate.disposition & cover:
            if candidate.codec_context is None:
                raise MediaError(f"{label} is in a codec that FFmpeg does not know here; convert it to H.264 in mp4")
            return candidate
    raise MediaError(f"{label} is a video without frames: it has no video stream; pass it as audio if it is sound")


def _upright(frame: Any, size: tuple[int, ...] | None) -> NDArray[np.uint8]:
    """RGB, uint8 [H, W, 3], with the container's rotation applied (phones film lying down)."""
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    pixels = frame.to_ndarray(format="rgb24")
    pixels = np.rot90(pixels, turns)
    if size is not None and pixels.shape[:2] != size:  # the stream changed its size: bring back the first one's
        height, width = size if turns % 2 == 0 else size[::-1]
        pixels = np.rot90(frame.reformat(width=width, height=height, format="rgb24").to_ndarray(), turns)
    return np.ascontiguousarray(pixels)
