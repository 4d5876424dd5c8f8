"""Talker: the language model that turns the thinker's states into codec tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omniport.runtime.bundle.manifest import SolverSpec
from omniport.runtime.bundle.parts import PARTS
from torch import Tensor

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.frontends import codec_tokens, sampling_defaults, text_tokens
from .decoder_stack import Decoder, LanguageModel, decoder_config, decoder_geometry, define_decoder, prefill_cases
from .module import Linear
from .part import DecoderConfig, DecoderPart, GraphDefinition, ModelPart, ReferenceModule, Settings, qwen_module


class Talker(LanguageModel):
    """Projection, decoder and codec head (transformers: Qwen2_5OmniTalkerForConditionalGeneration)."""

    prefix = "talker."
    head = "codec_head"

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.thinker_to_talker_proj = Linear(config.embedding_size, config.hidden_size)
        self.model = Decoder(config)
        self.codec_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        kv_positions: Tensor,
        write_index: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """inputs_embeds: float32 [B, S, thinker width] -> logits float32 [B, codec vocabulary], caches."""
        hidden, present = self.model(self.embed(inputs_embeds), position_ids, kv_positions, write_index, past)
        return self.logits(hidden), *present

    def embed(self, inputs_embeds: Tensor) -> Tensor:
        """inputs_embeds: float32 [B, S, thinker width], projected."""
        return self.thinker_to_talker_proj(super().embed(inputs_embeds))


def _sizes(config: Any, kv_form: str) -> DecoderConfig:
    return decoder_config(config.talker_config, kv_form, config.talker_config.embedding_size)


def _define(config: Any, settings: Settings) -> GraphDefinition:
    sizes = _sizes(config, settings.kv_form)
    return define_decoder(PART.name, settings, sizes, lambda: Talker(sizes))


def _describe(ckpt: Checkpoint, _solver: SolverSpec) -> Mapping[str, Any]:
    return {
        "talker": decoder_geometry(PART, ckpt),
        "talker_sampling": sampling_defaults(ckpt)[1],
        "text_tokens": text_tokens(ckpt),
        "codec": codec_tokens(ckpt),
    }


PART: ModelPart = ModelPart(
    PARTS["talker"],
    define=_define,
    reference=ReferenceModule(qwen_module("Qwen2_5OmniTalkerForConditionalGeneration", "talker_config"), Talker.prefix),
    cases=lambda subject: prefill_cases(PART, subject),
    describe=_describe,
    decoder=DecoderPart(
        _sizes,
        "talker.model.embed_tokens.weight",
        head=Talker.head,
        stack="model",
        projection="thinker_to_talker_proj",
    ),
)
