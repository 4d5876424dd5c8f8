"""Run the thinker: media and text in, text tokens and the talker's conditioning out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Array, Backend
from ..bundle.reader import EmbeddingTable
from ..concurrency.timing import StageTimer
from ..errors import OmniportError, PromptTooLong
from ..media.image import VisionInput
from ..media.log_mel import audio_tokens
from ..prompt.builder import MediaSpan
from .decoder import Decoder
from .sampling import Sampler

#: frames of one vision call at most: engines are built for as many
VISION_FRAMES = 8
#: encoder batches that bound memory; neither encoder's attention crosses what a batch is cut from
_AUDIO_CHUNKS = 32
_VISION_SCORES = 1 << 23
"""patches of a frame squared, times frames: scores of one head"""


@dataclass(frozen=True)
class ThinkerStep:
    """One generated token.

    Attributes:
        token_id: the k-th generated token.
        row: float32 [H], the talker's conditioning ``hidden + embedding`` of generated token k - 1, which was consumed
            to pick this one; None at k = 0. The last generated token is never consumed: it has no row.
        stop: the token ends the reply and is not part of it.
        last: no step follows: a stop token, the last of ``max_new_tokens``, or a full cache.
    """

    token_id: int
    row: NDArray[np.float32] | None
    stop: bool
    last: bool


class ThinkerRun:
    """One reply of the thinker, after prefill.

    Args:
        decoder: holds the prompt, and nothing else.
        logits: float32 [V] after the prompt.
        prompt_ids: int64 [S], what the repetition penalty sees beside the reply.
        position: of the first generated token, in all three components; the k-th has this plus k.
        embedding: the thinker's.
        stop: ids that end the reply.

    Attributes:
        rows: float32 [H] each, the talker's conditioning of the generated tokens that were consumed so far.
        finish_reason: once ``steps`` has ended: ``stop``, ``length`` (``max_new_tokens``) or ``context`` (full cache).
    """

    def __init__(
        self,
        decoder: Decoder,
        logits: NDArray[np.float32],
        prompt_ids: NDArray[np.int64],
        position: int,
        sampler: Sampler,
        embedding: EmbeddingTable,
        stop: Iterable[int],
        timer: StageTimer,
    ) -> None:
        self.rows: list[NDArray[np.float32]] = []
        self.finish_reason = "stop"
        self._decoder = decoder
        self._logits = logits
        self._prompt_ids = prompt_ids
        self._position = position
        self._sampler = sampler
        self._embedding = embedding
        self._stop = frozenset(stop)
        self._timer = timer

    def steps(self) -> Iterator[ThinkerStep]:
        """Generate until a stop token, ``max_new_tokens``, or a full cache."""
        # The last token is not consumed, so a reply may be one token longer than the room.
        limit = min(self._sampler.config.max_new_tokens, self._decoder.room + 1)
        seen = np.concatenate([self._prompt_ids, np.zeros(limit, np.int64)])
        count, logits = len(self._prompt_ids), self._logits
        for k in range(limit):
            with self._timer("thinker"):
                token = self._sampler.pick(logits, seen[: count + k])
            stop = token in self._stop
            last = stop or k + 1 == limit
            if last and not stop:
                self.finish_reason = "length" if limit == self._sampler.config.max_new_tokens else "context"
            yield ThinkerStep(token, self.rows[-1] if self.rows else None, stop, last)
            if last:
                return
            seen[count + k] = token
            with self._timer("thinker"):
                embed = self._embedding.rows([token])
                logits, hidden = self._decoder.forward(embed, np.full((3, 1), self._position + k, np.int64))
                if hidden is not None:
                    self.rows.append(hidden[0] + embed[0])


def require_room(tokens: int, capacity: int, reply: int = 1) -> None:
    """PromptTooLong unless a prompt and at least ``reply`` more tokens fit."""
    if tokens + reply > capacity:
        raise PromptTooLong(
            f"the prompt takes {tokens} tokens, and the reply needs at least {reply} more; the KV cache holds "
            f"{capacity}. Shorten the prompt or its media, or export with a larger --max-context"
        )


def embed_media(span: MediaSpan, backend: Backend, timer: StageTimer) -> NDArray[np.float32]:
    """Encode one medium: float32 [n, H], a row for each of the span's positions.

    Raises:
        OmniportError: the encoder gives another number of rows than the prompt has places for.
    """
    if span.kind == "audio":
        assert span.chunks is not None
        assert span.frames is not None
        rows = encode_audio(span.chunks, span.frames, backend, timer)
    else:
        assert span.vision is not None
        rows = encode_vision(span.vision, backend, timer)
    if len(rows) != len(span.positions):
        raise OmniportError(
            f"the {span.kind} encoder gave {len(rows)} embeddings for {len(span.positions)} placeholder tokens; export "
            "the bundle again"
        )
    return rows


def audio_batches(chunks: NDArray[np.float32], frames: NDArray[np.int64]) -> Iterator[dict[str, Array]]:
    """What the audio encoder is called with for encoder chunks [C, n_mels, chunk_frames], one call after the other."""
    for start in range(0, len(frames), _AUDIO_CHUNKS):
        yield {
            "mel": np.ascontiguousarray(chunks[start : start + _AUDIO_CHUNKS], np.float32),
            "frames": np.ascontiguousarray(frames[start : start + _AUDIO_CHUNKS]),
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


def encode_audio(
    chunks: NDArray[np.float32], frames: NDArray[np.int64], backend: Backend, timer: StageTimer
) -> NDArray[np.float32]:
    """Embeddings float32 [n, H] of encoder chunks [C, n_mels, chunk_frames] with ``frames`` [C] valid ones each."""
    with timer("load"):
        graph = backend.graph("audio_encoder")
    with timer("audio_encoder"):
        rows = [
            row for feeds in audio_batches(chunks, frames) for row in heard(graph.run(feeds)["embeds"], feeds["frames"])
        ]
    return np.concatenate(rows)


def heard(embeds: NDArray[np.float32], frames: Iterable[int]) -> list[NDArray[np.float32]]:
    """The rows [n, H] of each chunk of one call that stand for its valid frames."""
    return [chunk[: audio_tokens(int(count))] for chunk, count in zip(embeds, frames, strict=True)]


def encode_vision(vision: VisionInput, backend: Backend, timer: StageTimer) -> NDArray[np.float32]:
    """Embeddings float32 [T*N/4, H] of one picture or video."""
    with timer("load"):
        graph = backend.graph("vision_encoder")
    with timer("vision_encoder"):
        return np.concatenate([graph.run(feeds)["embeds"] for feeds in vision_batches(vision)])
