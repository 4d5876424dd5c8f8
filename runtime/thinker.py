"""The thinker: media and text in, text tokens out, and the rows that condition the talker."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .backends.base import Array, Backend, KvCache
from .bundle import Bundle
from .decoder import Decoder
from .errors import OmniportError, PromptTooLong
from .manifest import SamplingConfig
from .prompt import MediaSpan, Prompt
from .sampling import Sampler
from .timing import StageTimer

__all__ = ["Thinker", "ThinkerRun", "ThinkerStep", "embed_media"]

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


class Thinker:
    """The thinker of one bundle."""

    def __init__(self, backend: Backend, bundle: Bundle) -> None:
        self._backend = backend
        self._bundle = bundle

    def start(
        self,
        prompt: Prompt,
        config: SamplingConfig,
        rng: np.random.Generator | None,
        cache: KvCache,
        timer: StageTimer,
    ) -> ThinkerRun:
        """Embed the prompt, encode its media and prefill.

        Raises:
            PromptTooLong: the prompt leaves no room for a reply.
        """
        embedding = self._bundle.embedding("thinker")
        require_room(len(prompt.token_ids), cache.capacity)
        with timer("prefill"):
            embeds = embedding.rows(prompt.token_ids)
        for span in prompt.media:
            embeds[span.positions] = embed_media(span, self._backend, timer)
        with timer("load"):
            graph = self._backend.graph("thinker")
        decoder = Decoder(graph, cache)
        with timer("prefill"):
            logits, hidden = decoder.forward(embeds, prompt.position_ids)
        if hidden is None:
            raise OmniportError("the thinker graph gives no 'hidden'; export the bundle again")
        # The talker sees media through the hidden state alone.
        embeds[prompt.media_mask] = 0
        sampler = Sampler(config, rng)
        return ThinkerRun(decoder, prompt, logits, hidden + embeds, sampler, self._bundle, timer)


class ThinkerRun:
    """One reply after prefill.

    Attributes:
        prompt_rows: float32 [S, H], the talker's conditioning for the prompt.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompt: Prompt,
        logits: NDArray[np.float32],
        prompt_rows: NDArray[np.float32],
        sampler: Sampler,
        bundle: Bundle,
        timer: StageTimer,
    ) -> None:
        self.prompt_rows = prompt_rows
        self._decoder = decoder
        self._prompt = prompt
        self._logits = logits
        self._sampler = sampler
        self._embedding = bundle.embedding("thinker")
        self._stop = frozenset(bundle.manifest.chat.stop)
        self._timer = timer

    def steps(self) -> Iterator[ThinkerStep]:
        """Generate until a stop token, ``max_new_tokens``, or a full cache."""
        # The last token is not consumed, so a reply may be one token longer than the room.
        limit = min(self._sampler.config.max_new_tokens, self._decoder.room + 1)
        seen = np.concatenate([self._prompt.token_ids, np.zeros(limit, np.int64)])
        count, logits, row = len(self._prompt.token_ids), self._logits, None
        for k in range(limit):
            with self._timer("thinker"):
                token = self._sampler.pick(logits, seen[: count + k])
            stop = token in self._stop
            last = stop or k + 1 == limit
            yield ThinkerStep(token, row, stop, last)
            if last:
                return
            seen[count + k] = token
            with self._timer("thinker"):
                embed = self._embedding.rows([token])
                positions = np.full((3, 1), self._prompt.next_position + k, np.int64)
                logits, hidden = self._decoder.forward(embed, positions)
                row = None if hidden is None else hidden[0] + embed[0]


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
    rows = _encode_audio(span, backend, timer) if span.kind == "audio" else _encode_vision(span, backend, timer)
    if len(rows) != len(span.positions):
        raise OmniportError(
            f"the {span.kind} encoder gave {len(rows)} embeddings for {len(span.positions)} placeholder tokens; export "
            "the bundle again"
        )
    return rows


def _encode_audio(span: MediaSpan, backend: Backend, timer: StageTimer) -> NDArray[np.float32]:
    assert span.chunks is not None
    assert span.frames is not None
    with timer("load"):
        graph = backend.graph("audio_encoder")
    rows = []
    with timer("audio_encoder"):
        for start in range(0, len(span.frames), _AUDIO_CHUNKS):
            frames = span.frames[start : start + _AUDIO_CHUNKS]
            chunks = np.ascontiguousarray(span.chunks[start : start + _AUDIO_CHUNKS], np.float32)
            embeds = graph.run({"mel": chunks, "frames": np.ascontiguousarray(frames)})["embeds"]
            # A convolution of stride 2, then a mean over pairs that drops a lone last frame.
            rows += [chunk[: ((int(count) - 1) // 2 + 1) // 2] for chunk, count in zip(embeds, frames, strict=True)]
    return np.concatenate(rows)


def _encode_vision(span: MediaSpan, backend: Backend, timer: StageTimer) -> NDArray[np.float32]:
    assert span.vision is not None
    vision = span.vision
    with timer("load"):
        graph = backend.graph("vision_encoder")
    frames, patches = vision.patches.shape[:2]
    batch = max(1, _VISION_SCORES // (patches * patches))
    rows = []
    with timer("vision_encoder"):
        for start in range(0, frames, batch):
            feeds: dict[str, Array] = {
                "patches": np.ascontiguousarray(vision.patches[start : start + batch], np.float32),
                "grid_hw": vision.grid_hw,
                "window_index": vision.window_index,
                "window_valid": vision.window_valid,
            }
            rows.append(graph.run(feeds)["embeds"])
    return np.concatenate(rows)
