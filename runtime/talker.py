"""The talker: the thinker's rows in, codec tokens out.

Follows ``Qwen2_5OmniForConditionalGeneration.generate`` and ``Qwen2_5OmniTalkerForConditionalGeneration.forward``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from .backends.base import Backend, KvCache
from .bundle import Bundle
from .decoder import Decoder
from .errors import BundleError, PromptTooLong
from .manifest import SamplingConfig, VoiceSpec
from .sampling import Sampler
from .timing import StageTimer

__all__ = ["Talker"]


class Talker:
    """The talker of one bundle.

    Raises:
        BundleError: the bundle has no talker.
    """

    def __init__(self, backend: Backend, bundle: Bundle) -> None:
        manifest = bundle.manifest
        if manifest.text_tokens is None or manifest.codec is None:
            raise BundleError(f"{bundle.root} has no talker: it was exported from a checkpoint that does not speak")
        self._backend = backend
        self._bundle = bundle
        self._text = manifest.text_tokens
        self._codec = manifest.codec

    def codes(
        self,
        prompt_rows: NDArray[np.float32],
        prompt_positions: NDArray[np.int64],
        rows: Iterable[NDArray[np.float32]],
        voice: VoiceSpec,
        config: SamplingConfig,
        rng: np.random.Generator | None,
        cache: KvCache,
        timer: StageTimer,
    ) -> Iterator[int]:
        """Codec tokens, without the stop code, one for each row that is pulled, then as many as the speech needs.

        Args:
            prompt_rows: float32 [S, H] of the thinker's prompt.
            prompt_positions: int64 [3, S].
            rows: reply rows float32 [H] of generated tokens 0, 1, ...; pulled one at a time when needed, so the thinker
                may still be at work. Without a single row nothing is said.

        Raises:
            PromptTooLong: the prompt leaves no room for speech.
        """
        reply = iter(rows)
        first = next(reply, None)
        if first is None:
            return
        count = len(prompt_rows) + 2
        if count > cache.capacity:
            raise PromptTooLong(
                f"to speak, the prompt takes {count} places; the talker's KV cache holds {cache.capacity}. Shorten the "
                "prompt, ask for text only (speak=False), or export with a larger --max-context"
            )
        with timer("load"):
            decoder = Decoder(self._backend.graph("talker"), cache)
        thinker, codec = self._bundle.embedding("thinker"), self._bundle.embedding("talker")
        with timer("talker"):
            opening = thinker.rows([voice.bos_token]) + codec.rows([self._codec.pad])
            embeds = np.concatenate([prompt_rows, opening, first[None] + codec.rows([self._codec.bos])])
            positions, position = _extend_positions(prompt_positions)
            logits, _ = decoder.forward(embeds, positions)
            text_eos, text_pad = thinker.rows([self._text.eos, self._text.pad])
        sampler = Sampler(config, rng, self._codec.suppress)
        conditioning = itertools.chain(reply, [text_eos], itertools.repeat(text_pad))
        limit = min(config.max_new_tokens, decoder.room + 1)
        # What the repetition penalty sees: a mask for each prompt token, then codec pad and bos.
        seen = np.full(count + limit, self._codec.mask, np.int64)
        seen[count - 2 : count] = self._codec.pad, self._codec.bos
        for k in range(limit):
            with timer("talker"):
                code = sampler.pick(logits, seen[: count + k])
            if code in self._codec.stop:
                return
            yield code
            if k + 1 == limit:
                return
            seen[count + k] = code
            row = next(conditioning)  # outside the timer: this may run the thinker
            with timer("talker"):
                logits, _ = decoder.forward(codec.rows([code]) + row, np.full((3, 1), position + k, np.int64))


def _extend_positions(prompt: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """Positions [3, S + 2] with the voice's and the first token's row, and the position of the first codec token.

    The two rows continue the prompt's trailing text; generation then continues from the highest position of all, which
    is another one where a medium reaches past the text that follows it.
    """
    tail = int(prompt[:, -1].max()) + 1
    extra = np.broadcast_to(np.asarray([tail, tail + 1]), (3, 2))
    positions = np.concatenate([prompt, extra], axis=1)
    return positions, int(positions.max()) + 1
