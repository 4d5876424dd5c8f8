"""Run the talker: conditioning from the thinker in, codec tokens out.

Follows ``Qwen2_5OmniForConditionalGeneration.generate`` and ``Qwen2_5OmniTalkerForConditionalGeneration.forward``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import SamplingConfig, VoiceSpec
from ..bundle.reader import Bundle
from ..concurrency.timing import StageTimer
from ..errors import BundleError, PromptTooLong
from .decoder import Decoder
from .sampling import Sampler


class Talker:
    """The talker, for one reply.

    Args:
        ignore_stop: speak until ``max_new_tokens``: codes that end the speech, or stand for no sound, are never picked.

    Attributes:
        finish_reason: once ``codes`` has ended: ``stop``, ``length`` (``max_new_tokens``) or ``context`` (full cache).

    Raises:
        BundleError: the bundle has no talker.
    """

    def __init__(self, bundle: Bundle, *, ignore_stop: bool = False) -> None:
        manifest = bundle.manifest
        if manifest.text_tokens is None or manifest.codec is None:
            raise BundleError(f"{bundle.root} has no talker: it was exported from a checkpoint that does not speak")
        self.finish_reason = "stop"
        self._bundle = bundle
        self._text = manifest.text_tokens
        self._codec = manifest.codec
        self._suppress = self._codec.suppress
        if ignore_stop and manifest.dit is not None and manifest.talker is not None:
            silent = range(manifest.dit.num_embeds + 1, manifest.talker.vocab_size)
            self._suppress = tuple({*self._suppress, *self._codec.stop, *silent})

    def sampler(self, config: SamplingConfig, rng: np.random.Generator | None) -> Sampler:
        """Picks codec tokens."""
        return Sampler(config, rng, self._suppress)

    def codes(
        self,
        decoder: Decoder,
        conditioning: Iterable[NDArray[np.float32]],
        voice: VoiceSpec,
        sampler: Sampler,
        timer: StageTimer,
        *,
        tail: int,
        highest: int,
    ) -> Iterator[int]:
        """Codec tokens, without the stop code, one for each vector that is pulled, then as many as the speech needs.

        Args:
            decoder: holds the conditioning of the prompt, and nothing else.
            conditioning: float32 [H] of generated tokens 0, 1, ...; pulled one at a time when needed, so the thinker
                may still be at work. Without a single one nothing is said.
            tail: position after the prompt's last token.
            highest: highest position in the prompt.
            sampler: suppresses ``codec.suppress``, see ``sampler``.

        Raises:
            PromptTooLong: the prompt leaves no room for speech.
        """
        reply = iter(conditioning)
        first = next(reply, None)
        if first is None:
            return
        if decoder.room < 2:
            raise PromptTooLong(
                f"to speak, the prompt takes {decoder.length + 2} tokens; the talker's KV cache holds "
                f"{decoder.length + decoder.room}. Shorten the prompt, ask for text only (speak=False), or export with "
                "a larger --max-context"
            )
        thinker, codec = self._bundle.embedding("thinker"), self._bundle.embedding("talker")
        # Two tokens more than the prompt has. They continue its trailing text; generation then continues from the
        # highest position of all, which is another one where a medium reaches past the text that follows it.
        positions = np.broadcast_to(np.asarray([tail, tail + 1]), (3, 2))
        position = max(highest, tail + 1) + 1
        with timer("talker"):
            opening = np.stack([thinker.rows([voice.bos_token])[0], first])
            logits, _ = decoder.forward(opening + codec.rows([self._codec.pad, self._codec.bos]), positions)
            text_eos, text_pad = thinker.rows([self._text.eos, self._text.pad])
        following = itertools.chain(reply, [text_eos], itertools.repeat(text_pad))
        count, limit = decoder.length, min(sampler.config.max_new_tokens, decoder.room + 1)
        # What the repetition penalty sees: a mask for each prompt token, then codec pad and bos.
        seen = np.full(count + limit, self._codec.mask, np.int64)
        seen[count - 2 : count] = self._codec.pad, self._codec.bos
        for k in range(limit):
            with timer("talker"):
                code = sampler.pick(logits, seen[: count + k])
            if code in self._codec.stop:
                return
            if k + 1 == limit:
                self.finish_reason = "length" if limit == sampler.config.max_new_tokens else "context"
            yield code
            if k + 1 == limit:
                return
            seen[count + k] = code
            row = next(following)  # outside the timer: this may wait for the thinker
            with timer("talker"):
                logits, _ = decoder.forward(codec.rows([code]) + row, np.full((3, 1), position + k, np.int64))
