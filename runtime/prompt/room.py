"""What a prompt's media take, known before they are decoded, and how pictures are made to fit beside the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..bundle.manifest import VisionFrontend
from ..errors import PromptTooLong
from ..media.limits import Sampling, VisionLimits, image_size, target_size, video_bounds, video_size
from ..media.video import Video

#: tokens that the chat template and the ends of a message and its media take at most
_TEMPLATE, _FRAME = 64, 8
_REMEDY = {
    "text": "shorten the text",
    "audio": "cut the sound shorter",
    "image": "give pictures a smaller max_pixels (--max-pixels)",
    "video": "give videos a smaller fps, max_frames or max_pixels (--fps, --max-frames, --max-pixels), or a part of "
    "them by video_start and video_end",
}


class Visual(Protocol):
    """A picture or video that is planned."""

    def tokens(self, share: float) -> int:
        """What it takes when its pixels are scaled by ``share`` (0 to 1); what its part asks for is kept."""


@dataclass(frozen=True)
class PlannedImage:
    """A still picture of ``height`` x ``width`` pixels."""

    height: int
    width: int
    frontend: VisionFrontend
    limits: VisionLimits

    def size(self, share: float) -> tuple[int, int]:
        """Height and width that it is shown in."""
        shown = image_size(self.height, self.width, self.frontend, self.limits)
        if share >= 1 or self.limits.sets_size:
            return shown
        least = self.frontend.min_pixels
        return target_size(self.height, self.width, self.frontend, least, max(least, share * shown[0] * shown[1]))

    def tokens(self, share: float) -> int:
        return _tokens(self.size(share), 1, self.frontend)


@dataclass(frozen=True)
class PlannedVideo:
    """An open video."""

    video: Video
    frontend: VisionFrontend
    limits: VisionLimits

    def shown(self, share: float) -> tuple[Sampling, tuple[int, int]]:
        """Frames that are shown, and their height and width: first pixels give way, then frames."""
        sampling = self.video.sample(self.frontend, self.limits)
        count = len(sampling.indices)
        height, width = self._size(count)
        pixels = height * width
        least = self.frontend.min_pixels if self.video.listed else video_bounds(count, self.frontend, self.limits)[0]
        if share >= 1:
            return sampling, (height, width)
        if not self.limits.sets_size and pixels > least:
            height, width = self._size(count, max(least, share * pixels))
        excess = height * width / (share * pixels) if share else count
        if excess > 1.5 and not self.limits.sets_frames:  # pixels alone could not give so much
            most = max(2 * self.frontend.temporal_patch_size, int(count / excess))
            sampling = self.video.sample(self.frontend, self.limits, most)
        return sampling, (height, width)

    def _size(self, count: int, most: float | None = None) -> tuple[int, int]:
        video, frontend = self.video, self.frontend
        if not video.listed:
            return video_size(video.height, video.width, count, frontend, self.limits, most or float("inf"))
        if most is None:
            return image_size(video.height, video.width, frontend, self.limits)
        return target_size(video.height, video.width, frontend, frontend.min_pixels, most)

    def tokens(self, share: float) -> int:
        sampling, size = self.shown(share)
        return _tokens(size, len(sampling.indices) // self.frontend.temporal_patch_size, self.frontend)


def _tokens(size: tuple[int, int], grids: int, frontend: VisionFrontend) -> int:
    unit = frontend.patch_size * frontend.merge_size
    return grids * (size[0] // unit) * (size[1] // unit)


class Room:
    """Tokens that one prompt, or one push of content, may take.

    Args:
        before: tokens that are taken already.

    Attributes:
        capacity: tokens in all.
        share: of their pixels, that pictures keep; 1 unless everything would not fit.
    """

    def __init__(self, capacity: int, before: int = 0) -> None:
        self.capacity = capacity
        self._before = before
        self._taken = {"text": before, "audio": 0}
        self._visuals: list[tuple[str, Visual]] = []
        self._parts = 0
        self.share = 1.0

    def take(self, kind: str, tokens: int) -> None:
        """Text or sound of so many tokens.

        Raises:
            PromptTooLong: they do not fit.
        """
        self._parts += 1
        self._taken[kind] += tokens
        if sum(self._taken.values()) > self.capacity:
            raise self._too_long(sum(self._taken.values()), "at least ")

    def add(self, kind: str, visual: Visual) -> None:
        """A picture or video."""
        self._parts += 1
        self._visuals.append((kind, visual))

    def fit(self) -> None:
        """All parts are there: choose ``share``. What would not fit is shown smaller, with some room for a reply.

        Raises:
            PromptTooLong: it does not fit at any size.
        """
        beside = sum(self._taken.values()) + _TEMPLATE + _FRAME * self._parts
        if not self._visuals or beside + self._visible(1.0) <= self.capacity:
            return
        room = self.capacity - beside - min(512, self.capacity // 8)
        if self._visible(0.0) > room:
            raise self._too_long(sum(self._taken.values()) + self._visible(0.0), "at least ")
        low, high = 0.0, 1.0
        for _ in range(16):
            middle = (low + high) / 2
            low, high = (middle, high) if self._visible(middle) <= room else (low, middle)
        self.share = low

    @property
    def tokens(self) -> int:
        """What all parts take, without what was there before."""
        return sum(self._taken.values()) - self._before + self._visible(self.share)

    def _visible(self, share: float) -> int:
        return sum(visual.tokens(share) for _, visual in self._visuals)

    def _too_long(self, tokens: int, roughly: str = "") -> PromptTooLong:
        seen = sum(visual.tokens(0.0) for _, visual in self._visuals)
        sizes = {**self._taken}
        for kind, visual in self._visuals:
            sizes[kind] = sizes.get(kind, 0) + visual.tokens(0.0)
        media = self._taken["audio"] + seen
        return too_long(tokens, self._taken["text"], media, self.capacity, sizes, roughly)


def too_long(
    tokens: int, text: int, media: int, capacity: int, sizes: dict[str, int], roughly: str = ""
) -> PromptTooLong:
    """The error of a prompt that does not fit, with the remedy for what takes most.

    Args:
        sizes: tokens by kind of part.
    """
    largest = max(sizes, key=lambda kind: sizes[kind])
    return PromptTooLong(
        f"the prompt takes {roughly}{tokens} tokens ({text} of text, {media} of media); this bundle's KV cache holds "
        f"{capacity}: {_REMEDY[largest]}, or export with a larger --max-context"
    )
