"""Replies by transformers' own `generate`, of the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2_5OmniForConditionalGeneration

from wren.prompts import Prompts, Turn


class Reference:
    """The checkpoint in float32, greedy."""

    def __init__(self, checkpoint: Path, prompts: Prompts) -> None:
        self.model: Any = Qwen2_5OmniForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.prompts = prompts
        self._codes: list[int] = []
        self.model.token2wav.forward = self._take_codes

    def _take_codes(self, codes: torch.Tensor, *_: Any, **_options: Any) -> torch.Tensor:
        """In the place of DiT and vocoder, which take most of the time: nobody listens to this reply."""
        self._codes = codes[0].tolist()
        return torch.zeros(1)

    def reply(self, turns: Sequence[Turn], voice: str, most_codes: int) -> tuple[list[int], list[int]]:
        """Text tokens and codes without their ends; the last turn's answer is left open.

        One padding token stands before the prompt: a mask without any is dropped before the talker sees it, which then
        adds no codec pad and start (transformers 5.23 and 5.24).
        """
        inputs, _ = self.prompts.batch([self.prompts.lay(turns)])
        tokens, stop = self.prompts.manifest.tokens, self.prompts.manifest.chat.stop
        ids = torch.nn.functional.pad(inputs.pop("input_ids"), (1, 0), value=tokens.endoftext)
        del inputs["position_ids"]
        clips = len(inputs.get("video_grid_thw", ()))
        if clips:
            inputs["video_second_per_grid"] = torch.ones(clips)
        sequences, _ = self.model.generate(
            input_ids=ids,
            attention_mask=(torch.arange(ids.shape[1]) > 0).long()[None],
            speaker=voice,
            use_audio_in_video=clips > 0,
            thinker_max_new_tokens=64,
            thinker_do_sample=False,
            thinker_eos_token_id=list(stop),
            talker_do_sample=False,
            talker_max_new_tokens=most_codes,
            # as shared keywords pixels would reach the talker, which refuses them
            **{f"thinker_{name}" if "pixel" in name else name: value for name, value in inputs.items()},
        )
        said = sequences[0, ids.shape[1] :].tolist()
        return said[:-1] if said[-1] in stop else said, self._codes
