"""Thinker: the language model that hears, sees and writes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .layers import Decoder, DecoderConfig
from .module import Linear, Transpose
from .stack import Context, Stack


class Thinker(Stack):
    """Decoder and head over embeddings (transformers: Qwen2_5OmniThinkerForConditionalGeneration, language part).

    The token-embedding table is not part of the graph: the runtime looks rows up in a mapped file.
    """

    prefix = "thinker."

    def __init__(self, config: DecoderConfig, tied: bool) -> None:
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if tied:
            self.lm_head.rules["weight"] = Transpose("@model.embed_tokens.weight")

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        kv_positions: Tensor,
        write_index: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """inputs_embeds: float32 [B, S, E] -> float32 logits [B, V] of the last token, hidden [B, S, E]; caches."""
        x = inputs_embeds.to(self.lm_head.weight.dtype)
        hidden, present = self.model(x, position_ids, kv_positions, write_index, past)
        return self.logits(hidden), hidden.to(torch.float32), *present

    @property
    def depth(self) -> int:
        return self.model.depth

    def enter(self, *inputs: Any) -> tuple[Tensor, Context]:
        """As ``forward``; the context ends with the caches, see ``Decoder.enter``."""
        inputs_embeds, *rest = inputs
        x = inputs_embeds.to(self.lm_head.weight.dtype)
        return self.model.enter(x, *rest)

    def run_layer(self, index: int, x: Tensor, context: Context) -> Tensor:
        return self.model.run_layer(index, x, context)

    def leave(self, x: Tensor, context: Context) -> Tensor:
        """The hidden state after the final norm; ``logits`` takes it on."""
        return self.model.leave(x, context)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [B, S, E] -> float32 logits [B, V] of the last token."""
        return self.lm_head(hidden[:, -1]).float()
