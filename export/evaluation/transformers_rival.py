"""Run transformers' modules eagerly, to compare a bundle's speed with: ``omniport bench --against``.

They get the same inputs and threads, in the same process. Attention is transformers' default (``sdpa``), the
faster of its two on a CPU. One part is in memory at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omniport.runtime.bench.workloads import Job
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import UsageError
from torch import nn

from ..checkpoint.checkpoint import Checkpoint
from ..models.decoder_stack import reference_input, reference_logits, reference_stack
from ..models.model_parts import MODEL_PARTS
from ..models.part import ModelPart
from .reference_modules import cache_keyword, load_reference

Array = NDArray[Any]

_PIECE = 512


class TransformersRival:
    """The checkpoint that a bundle was exported from, in transformers.

    Args:
        threads: of one operator.

    Raises:
        UsageError: the bundle was exported from another checkpoint.
        CheckpointError: it cannot be read.
    """

    name: str = "transformers"
    libraries: tuple[str, ...] = ("torch", "transformers")

    def __init__(self, bundle: Bundle, checkpoint: str, threads: int) -> None:
        self._bundle = bundle
        self._checkpoint = Checkpoint.open(checkpoint)
        self._part: tuple[str, nn.Module] | None = None
        self._filled: Any = None
        source = bundle.manifest.source
        if source.fingerprint != self._checkpoint.fingerprint:
            raise UsageError(
                f"{bundle.root} was exported from {source.name} with fingerprint {source.fingerprint[:12]}, and "
                f"{checkpoint} has {self._checkpoint.fingerprint[:12]}. Give the checkpoint it was exported from"
            )
        torch.set_num_threads(threads)

    def runner(self, job: Job) -> Callable[[], Array] | None:
        """See `omniport.runtime.bench.workloads.Rival`."""
        part = MODEL_PARTS[job.graph]
        module = self._module(part.name)
        if part.decoder is not None:
            run = self._decoder(job, part, module)
        elif part.ask is not None:
            asked = part.ask(job.given, self._bundle, self._checkpoint)
            run = partial(asked, module)
        else:
            return None

        def computed() -> Array:
            with torch.inference_mode():
                return np.asarray(run().float().numpy())

        return computed

    def release(self) -> None:
        """See `omniport.runtime.bench.workloads.Rival`."""
        self._part = self._filled = None

    def reply(self, prompt_ids: NDArray[np.int64], text_tokens: int, codes: int) -> tuple[float, float]:
        """``generate``: its waveform comes when everything is done. The first call loads the whole model and warms up.

        Raises:
            UsageError: it is silent, so that its time says nothing.
        """
        model = self._whole()
        seconds, sound = _generate(model, prompt_ids, text_tokens, codes)
        if not float(np.std(sound)) > 1e-4:
            raise UsageError("the reference's speech is silent: its time says nothing. Give another checkpoint")
        return seconds, sound.size / 24000

    def _whole(self) -> Any:
        import transformers

        if self._part is None or self._part[0] != "whole":
            self.release()
            loaded: Any = transformers.Qwen2_5OmniForConditionalGeneration
            model = loaded.from_pretrained(
                self._checkpoint.path, dtype=torch.float32, attn_implementation="sdpa"
            ).eval()
            self._part = ("whole", model)
            _generate(model, np.arange(16, dtype=np.int64), 2, 26)
        return self._part[1]

    def _module(self, graph: str) -> nn.Module:
        if self._part is None or self._part[0] != graph:
            self.release()
            self._part = (graph, load_reference(self._checkpoint, graph))
        return self._part[1]

    def _decoder(self, job: Job, part: ModelPart, module: nn.Module) -> Callable[[], torch.Tensor]:
        """The tokens after ``context``, over a cache that holds those before, and the last one's logits."""
        rows, context = torch.from_numpy(job.given["rows"]), job.given["context"]
        cache, decoder = self._cache(context), reference_stack(module, part)
        places = torch.arange(len(rows))[None, None].expand(3, 1, -1)

        def feed(start: int, stop: int) -> torch.Tensor:
            output = decoder(
                inputs_embeds=reference_input(module, part, rows[None, start:stop]),
                position_ids=places[..., start:stop],
                use_cache=True,
                **{cache_keyword(decoder): cache},
            )
            return torch.as_tensor(output.last_hidden_state)

        with torch.inference_mode():
            for start in range(cache.get_seq_length(), context, _PIECE):
                feed(start, min(start + _PIECE, context))

        def run() -> torch.Tensor:
            _cut(cache, context)
            return reference_logits(module, part, feed(context, len(rows))[0, -1])

        return run

    def _cache(self, context: int) -> Any:
        """A cache of at most ``context`` tokens, those of the job before: contexts of a stage grow."""
        import transformers

        if self._filled is None or context == 0:
            made: Any = transformers.DynamicCache
            self._filled = made()
        _cut(self._filled, context)
        return self._filled


def _cut(cache: Any, tokens: int) -> None:
    """Forget what lies behind the first ``tokens``: transformers' ``crop`` takes how many to remove, negated."""
    more = cache.get_seq_length() - tokens
    if more > 0:
        cache.crop(-more)


def _generate(model: Any, prompt_ids: NDArray[np.int64], text_tokens: int, codes: int) -> tuple[float, Array]:
    ids = torch.from_numpy(prompt_ids[None])
    begin = time.perf_counter()
    with torch.inference_mode():
        _, wave = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            thinker_max_new_tokens=text_tokens,
            thinker_min_new_tokens=text_tokens,
            talker_max_new_tokens=codes,
            talker_min_new_tokens=codes,
        )
    return time.perf_counter() - begin, wave.numpy()
