"""How large pictures are shown, and which frames of a video: as transformers' processors and Qwen's qwen-omni-utils."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import VisionFrontend
from ..errors import MediaError

#: longest side over shortest side, as the reference's smart_resize
MAX_ASPECT = 200
#: what a size given by hand is brought to, and what one video may have in all, by Qwen's tool
_HAND_MADE = (4 * 28 * 28, 16384 * 28 * 28)
_VIDEO_TOTAL = 128_000 * 28 * 28 * 9 // 10
_MIN_FRAMES = 4


@dataclass(frozen=True, kw_only=True)
class VisionLimits:
    """What a part asks of its picture or video, in the words of Qwen's tool; None: the bundle's own.

    Attributes:
        min_pixels, max_pixels: of a picture, or of one frame.
        total_pixels: of all frames together, counted by pairs.
        resized_height, resized_width: the size instead.
        fps: frames a second; of a list of frames, how fast they follow each other.
        min_frames, max_frames: bounds of their number. nframes: their number itself.
        video_start, video_end: seconds of the clip that are shown.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None
    fps: float | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    nframes: int | None = None
    video_start: float | None = None
    video_end: float | None = None

    @property
    def sets_size(self) -> bool:
        """Whether it bounds pixels from above."""
        return self.max_pixels is not None or self.total_pixels is not None or self.resized_height is not None

    @property
    def sets_frames(self) -> bool:
        """Whether it says how many frames are taken."""
        return self.fps is not None or self.max_frames is not None or self.nframes is not None


@dataclass(frozen=True, eq=False)
class Sampling:
    """Frames of a video that are shown.

    Attributes:
        indices: int64 [F], ascending, F a multiple of the temporal patch.
        second_per_grid: seconds that one temporal patch stands for.
    """

    indices: NDArray[np.int64]
    second_per_grid: float


def target_size(
    height: int, width: int, frontend: VisionFrontend, min_pixels: float, max_pixels: float, *, by_tool: bool = False
) -> tuple[int, int]:
    """Height and width after resizing: multiples of patch * merge in the pixel bounds, aspect kept as well as can be.

    Follows the reference's smart_resize, half-to-even rounding included: a picture of any size is enlarged as needed.

    Args:
        by_tool: that of Qwen's tool, where no side is rounded to nothing.

    Raises:
        MediaError: an aspect ratio above ``MAX_ASPECT``.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise MediaError(
            f"picture of {width}x{height} pixels is too elongated: its aspect ratio is "
            f"{max(height, width) / min(height, width):.0f}, at most {MAX_ASPECT} is taken; crop it"
        )
    unit = frontend.patch_size * frontend.merge_size
    rows, columns = (max(int(by_tool), round(side / unit)) for side in (height, width))
    if rows * columns * unit * unit > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(1, math.floor(side / shrink / unit)) for side in (height, width))
    elif rows * columns * unit * unit < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / unit) for side in (height, width))
    return rows * unit, columns * unit


def image_size(height: int, width: int, frontend: VisionFrontend, limits: VisionLimits) -> tuple[int, int]:
    """Height and width that a still picture is shown in."""
    own = (frontend.min_pixels, frontend.max_pixels)
    if limits.resized_height is not None and limits.resized_width is not None:
        height, width = target_size(limits.resized_height, limits.resized_width, frontend, *_HAND_MADE, by_tool=True)
    elif limits.min_pixels is not None or limits.max_pixels is not None:
        bounds = (limits.min_pixels or own[0], limits.max_pixels or own[1])
        height, width = target_size(height, width, frontend, *bounds, by_tool=True)
    return target_size(height, width, frontend, *own)


def video_bounds(frames: int, frontend: VisionFrontend, limits: VisionLimits) -> tuple[float, float]:
    """Least and most pixels of one frame, when so many frames are shown."""
    least = limits.min_pixels or frontend.video_min_pixels
    total = limits.total_pixels or _VIDEO_TOTAL
    shared = total / frames * frontend.temporal_patch_size
    most = max(min(frontend.video_max_pixels, shared), int(least * 1.05))
    return least, min(limits.max_pixels or most, most)


def video_size(
    height: int, width: int, frames: int, frontend: VisionFrontend, limits: VisionLimits, most: float = math.inf
) -> tuple[int, int]:
    """Height and width that a video's frames are shown in, of at most ``most`` pixels each."""
    if limits.resized_height is not None and limits.resized_width is not None:
        height, width = target_size(limits.resized_height, limits.resized_width, frontend, *_HAND_MADE, by_tool=True)
    else:
        low, high = video_bounds(frames, frontend, limits)
        height, width = target_size(height, width, frontend, low, min(high, most), by_tool=True)
    return target_size(height, width, frontend, frontend.min_pixels, frontend.max_pixels)


def sample_frames(
    frames: int, rate: float, frontend: VisionFrontend, limits: VisionLimits, most: int | None = None
) -> Sampling:
    """Which of a file's frames are shown: at least 4, floored to even, spread evenly from the first to the last.

    Args:
        frames: in the file. rate: theirs a second.
        most: fewer than the limits say.

    Raises:
        MediaError: ``video_start`` and ``video_end`` leave nothing.
    """
    depth = frontend.temporal_patch_size
    start, end = limits.video_start or 0.0, limits.video_end
    first = math.ceil(start * rate - 1e-6)
    last = frames - 1 if end is None else min(frames - 1, math.floor(end * rate + 1e-6))
    if first > last:
        raise MediaError(
            f"video_start {start:g} s and video_end {'' if end is None else f'{end:g} s'} leave no frame of "
            f"{frames / rate:.2f} s: correct them"
        )
    total = last - first + 1
    fps = frontend.video_fps if limits.fps is None else limits.fps
    nominal = total / rate * fps
    if limits.nframes is not None:
        wanted, spread = float(min(round(limits.nframes / depth) * depth, total)), True
    else:
        least = math.ceil((limits.min_frames or _MIN_FRAMES) / depth) * depth
        bound = min(frontend.video_max_frames, total) if limits.max_frames is None else limits.max_frames
        wanted = min(max(nominal, least), bound // depth * depth, total)
        spread = nominal >= wanted + depth
    if most is not None and wanted > most:
        wanted, spread = most, True
    count = max(depth, int(wanted // depth) * depth)
    second = total / (count * rate) * depth if spread else depth / fps
    return Sampling(_evenly(first, last, count), second)


def _evenly(first: int, last: int, count: int) -> NDArray[np.int64]:
    """``torch.linspace(first, last, count).round()``, whose float32 decides at halves."""
    step = np.float64(np.float32(last - first) / np.float32(count - 1))
    number = np.arange(count)
    ahead, back = first + step * number, last - step * (count - 1 - number)
    return np.round(np.where(number < count // 2, ahead, back).astype(np.float32)).astype(np.int64)
