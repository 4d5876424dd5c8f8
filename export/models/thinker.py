"""Thinker: the language model that hears, sees and writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from omniport.runtime.bundle.manifest import SolverSpec
from omniport.runtime.bundle.parts import PARTS
from torch import Tensor, nn

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.frontends import sampling_defaults
from .decoder_stack import Decoder, LanguageModel, decoder_config, decoder_geometry, define_decoder, prefill_cases
from .module import Linear, Transpose
from .part import DecoderConfig, DecoderPart, GraphDefinition, ModelPart, ReferenceModule, Settings, qwen_module


class Thinker(LanguageModel):
    """Decoder and head over embeddings (transformers: Qwen2_5OmniThinkerForConditionalGeneration, language part).

    The token-embedding table is not part of the graph: the runtime looks rows up in a mapped file.
    """

    prefix = "thinker."
    head = "lm_head"

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
        hidden, present = self.model(self.embed(inputs_embeds), position_ids, kv_positions, write_index, past)
        return self.logits(hidden), hidden.to(torch.float32), *present


_TABLE = "thinker.model.embed_tokens.weight"


def _sizes(config: Any, kv_form: str) -> DecoderConfig:
    text = config.thinker_config.text_config
    return decoder_config(text, kv_form, text.hidden_size)


def _define(config: Any, settings: Settings) -> GraphDefinition:
    sizes = _sizes(config, settings.kv_form)
    return define_decoder(PART.name, settings, sizes, lambda: Thinker(sizes, settings.tied), gives_hidden=True)


def _describe(ckpt: Checkpoint, _solver: SolverSpec) -> Mapping[str, Any]:
    return {"thinker": decoder_geometry(PART, ckpt), "thinker_sampling": sampling_defaults(ckpt)[0]}


def _reference(config: Any) -> nn.Module:
    """transformers' text model with a head, a plain Linear, so that logits can be compared."""
    module = qwen_module("Qwen2_5OmniThinkerTextModel", "thinker_config.text_config")(config)
    text = config.thinker_config.text_config
    module.lm_head = nn.utils.skip_init(nn.Linear, text.hidden_size, text.vocab_size, bias=False)
    return module


PART: ModelPart = ModelPart(
    PARTS["thinker"],
    define=_define,
    reference=ReferenceModule(
        _reference,
        "thinker.model.",
        keys=lambda ckpt: {"lm_head.weight": _TABLE if ckpt.tied_embeddings else "thinker.lm_head.weight"},
    ),
    cases=lambda subject: prefill_cases(PART, subject),
    describe=_describe,
    decoder=DecoderPart(_sizes, _TABLE, head=Thinker.head, gives_hidden=True),
)
