"""Run the two encoders: sound, pictures and video in, embeddings for the placeholder tokens out.

Sound comes in chunks of 2 s (media/log_mel.py), pictures as windows of patches (media/image.py). A call takes a bounded
number of either: neither encoder's attention crosses what a batch is cut from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Array, Backend
from ..concurrency.timing import StageTimer
from ..errors import OmniportError
from ..media.image import VisionInput
from ..media.log_mel import audio_tokens
from ..prompt.builder import MediaSpan

#: chunks of 2 s of one audio call at most, and frames of one vision call: engines are built for as many
AUDIO_CHUNKS = 32
VISION_FRAMES = 8
#: patches of a frame squared, times frames, of one vision call at most: scores of one head, which bound memory
_VISION_SCORES = 1 << 23


class Encoders:
    """The encoders of one reply or turn.

    Args:
        timer: told how long they take.
    """

    def __init__(self, backend: Backend, timer: StageTimer) -> None:
        self._backend = backend
        self._timer = timer

    def embed(self, span: MediaSpan) -> NDArray[np.float32]:
        """Encode one medium: float32 [n, H], a row for each of the span's indices.

        Raises:
            OmniportError: the encoder gives another number of rows than the prompt has placeholders.
        """
        if span.kind == "audio":
            assert span.chunks is not None
            assert span.frames is not None
            embeds = self.audio(span.chunks, span.frames)
        else:
            assert span.vision is not None
            embeds = self.vision(span.vision)
        if len(embeds) != len(span.indices):
            raise OmniportError(
                f"the {span.kind} encoder gave {len(embeds)} embeddings for {len(span.indices)} placeholder tokens; "
                "export the bundle again"
            )
        return embeds

    def audio(self, chunks: NDArray[np.float32], frames: NDArray[np.int64]) -> NDArray[np.float32]:
        """Embeddings float32 [n, H] of chunks [C, n_mels, chunk_frames] with ``frames`` [C] valid ones each."""
        with self._timer("load"):
            graph = self._backend.graph("audio_encoder")
        with self._timer("audio_encoder"):
            calls = ((graph.run(feeds)["embeds"], feeds["frames"]) for feeds in audio_batches(chunks, frames))
            return np.concatenate([rows for embeds, valid in calls for rows in valid_rows(embeds, valid)])

    def vision(self, vision: VisionInput) -> NDArray[np.float32]:
        """Embeddings float32 [T*N/4, H] of one picture or video."""
        with self._timer("load"):
            graph = self._backend.graph("vision_encoder")
        with self._timer("vision_encoder"):
            return np.concatenate([graph.run(feeds)["embeds"] for feeds in vision_batches(vision)])


def audio_batches(chunks: NDArray[np.float32], frames: NDArray[np.int64]) -> Iterator[dict[str, Array]]:
    """What the audio encoder is called with for chunks [C, n_mels, chunk_frames], one call after the other."""
    for start in range(0, len(frames), AUDIO_CHUNKS):
        yield {
            "mel": np.ascontiguousarray(chunks[start : start + AUDIO_CHUNKS], np.float32),
            "frames": np.ascontiguousarray(frames[start : start + AUDIO_CHUNKS]),
        }


def vision_batches(vision: VisionInput) -> Iterator[dict[str, Array]]:
    """What the vision encoder is called with for one picture or video, one call after the other."""
    frames, patches = vision.patches.shape[:2]
    batch = max(1, min(VISION_FRAMES, _VISION_SCORES // (patches * patches)))
    for start in range(0, frames, batch):
        yield {
            "patches": np.ascontiguousarray(vision.patches[start : start + batch], np.float32),
            "grid_hw": vision.grid_hw,
            "window_index": vision.window_index,
            "window_valid": vision.window_valid,
        }


def valid_rows(embeds: NDArray[np.float32], frames: Iterable[int]) -> list[NDArray[np.float32]]:
    """The rows [n, H] of each chunk of one call that stand for its valid frames."""
    return [chunk[: audio_tokens(int(count))] for chunk, count in zip(embeds, frames, strict=True)]
