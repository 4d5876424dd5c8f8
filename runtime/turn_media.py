"""The media of a turn while it is open: its clips, one after the other, and media that come whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .generation.conversation import Conversation
from .generation.encoders import Encoders
from .pipeline.task import ReplyTask
from .prompt.builder import Media
from .prompt.live_clip import LiveClip
from .prompt.messages import Part
from .prompt.positions import Layout, fresh_key
from .prompt.room import Room


class TurnMedia:
    """Lays out media behind what a turn holds, encoded.

    Args:
        layout: of the turn's message.

    Attributes:
        clip: the one that is open.
    """

    def __init__(self, task: ReplyTask, layout: Layout, conversation: Conversation) -> None:
        self.clip: LiveClip | None = None
        self._task, self._layout, self._conversation = task, layout, conversation
        self._encoders = Encoders(task.backend, task.timer)
        self._whole = Media(layout)
        self._seconds = 0.0  # of sound that was taken

    def clip_for(self, medium: Literal["audio", "video"]) -> LiveClip:
        """The clip that takes what comes next: the open one, or another, which is not open yet."""
        if self.clip is not None and self.clip.takes(medium):
            return self.clip
        return LiveClip(self._layout, self._encoders, self._seconds, self._task.exact)

    def sound(self, samples: NDArray[np.float32], rate: float) -> None:
        """Take sound [n]."""
        clip = self.clip_for("audio")
        clip.require_sound(len(samples), rate)
        self._open(clip)
        clip.push_sound(samples, rate)
        self._seconds += len(samples) / rate

    def picture(self, pixels: NDArray[np.uint8], seconds: float) -> None:
        """Take the frame [H, W, 3] of a video."""
        clip = self.clip_for("video")
        clip.require_picture(pixels, seconds)
        self._open(clip)
        clip.push_picture(pixels, seconds)

    def read(self, parts: Sequence[Part]) -> tuple[list[Callable[[], None]], int]:
        """Decode parts that must fit together beside the turn so far: what appends each, and their tokens at most."""
        conversation = self._conversation
        room = Room(conversation.capacity, conversation.committed + self._layout.pending)
        made = self._whole.read(parts, self._task.codec, room)
        ends = sum(4 if part.use_audio else 2 for part in parts if part.kind != "text")  # where each begins and ends
        return [decode() for decode in made], room.tokens + ends

    def whole(self, lay: Sequence[Callable[[], None]]) -> None:
        """Append what was read. It closes the clip."""
        self.close_clip()
        for append in lay:
            append()
        for span in self._whole.spans:
            self._layout.fill(span.indices, self._encoders.embed(span), span.key)
        self._whole.spans.clear()

    def close_clip(self) -> None:
        """Lay out the rest of the clip that is open."""
        clip = self.clip
        if clip is None:
            return
        clip.require_tokens()
        self.clip = None
        changed = clip.close()
        if changed is not None:
            self._conversation.add(self._layout.segment())
            self._conversation.replace_embeds(*changed, fresh_key())

    def _open(self, clip: LiveClip) -> None:
        if clip is not self.clip:
            self.close_clip()
            self.clip = clip
