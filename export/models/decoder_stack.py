"""Shared by thinker and talker: a decoder stack over a KV cache, its graph, its reference and cases.

Shapes: B batch, S new tokens, L live cache length, M cache capacity, H heads, D head width, E width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from omniport.runtime.backends.base import Graph
from omniport.runtime.bundle.graph_spec import DimRange, TensorSpec
from omniport.runtime.bundle.manifest import DecoderGeometry
from torch import Tensor, nn

from ..checkpoint.checkpoint import Checkpoint
from .layers import GatedMlp, RmsNorm, inverse_frequencies
from .module import Context, ExportModule, Linear, Stack
from .ops import attention, merge_heads, rotary_embedding, split_heads, tensor_scatter
from .part import (
    Array,
    Case,
    DecoderConfig,
    DecoderPart,
    GraphDefinition,
    ModelPart,
    Settings,
    Subject,
    f32,
    i64,
    largest,
)
from .signals import generator, prompt_inputs, random_positions, random_tokens


class _CachedAttention(ExportModule):
    """Grouped-query self-attention over a cache. q, k, v have biases, the output has none (Qwen2)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.scale = config.head_dim**-0.5
        self.grows = config.kv_form == "concat"
        self.q_proj = Linear(config.hidden_size, config.num_heads * config.head_dim)
        self.k_proj = Linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.v_proj = Linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.o_proj = Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, write_index: Tensor, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        # q: [B, H, S, D]; k, v: [B, Hkv, S, D]
        q = rotary_embedding(split_heads(self.q_proj(x), self.heads), *rope)
        k = rotary_embedding(split_heads(self.k_proj(x), self.kv_heads), *rope)
        v = split_heads(self.v_proj(x), self.kv_heads)
        if self.grows:
            key, value = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
            return self.o_proj(merge_heads(attention(q, key, value, mask, self.scale))), key, value
        key = tensor_scatter(past[0], k, write_index)
        value = tensor_scatter(past[1], v, write_index)
        # Attention must not see the cache's unused slots: the live length is the mask's last dimension.
        live = mask.shape[-1]
        y = attention(q, key[:, :, :live], value[:, :, :live], mask, self.scale)
        return self.o_proj(merge_heads(y)), key, value


class _DecoderLayer(ExportModule):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = _CachedAttention(config)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMlp(config.hidden_size, config.intermediate_size, bias=False)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, write_index: Tensor, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, key, value = self.self_attn(self.input_layernorm(x), rope, mask, write_index, past)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), key, value


class _MultimodalRope(ExportModule):
    """cos and sin of TMRoPE: frequency i turns with the time, height or width position that its section names."""

    inv_freq: Tensor
    axis: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        axis = [i % 3 for i, n in enumerate(config.mrope_section) for _ in range(n)]
        self.constant("inv_freq", inverse_frequencies(config.head_dim, config.rope_theta))
        self.constant("axis", torch.tensor(axis, dtype=torch.int64, device="cpu"))

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # position_ids: [3, B, S] -> angle: [B, S, D/2]
        position = position_ids.float().index_select(0, self.axis)
        angle = position.permute(1, 2, 0) * self.inv_freq
        return angle.cos().to(dtype), angle.sin().to(dtype)


class Decoder(Stack):
    """Qwen2 decoder stack with TMRoPE over KV caches (transformers: Qwen2_5OmniThinkerTextModel, TalkerModel)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_DecoderLayer(config) for _ in range(config.num_layers)])
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.rope = _MultimodalRope(config)

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        kv_positions: Tensor,
        write_index: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """x: [B, S, E], past: key and value of every layer [B, Hkv, M, D] -> hidden
        after the final norm [B, S, E], and the caches with the new tokens written.

        In the concat form, past is [B, Hkv, L - S, D] and comes back as [B, Hkv, L, D]."""
        x, context = self.enter(x, position_ids, kv_positions, write_index, past)
        x = self.run_layers(x, context)
        return self.leave(x, context), context[-1]

    @property
    def depth(self) -> int:
        return len(self.layers)

    def enter(self, *inputs: Any) -> tuple[Tensor, Context]:
        """As ``forward``; the context ends with the caches: those of a layer are replaced when it has run."""
        x, position_ids, kv_positions, write_index, past = inputs
        rope = self.rope(position_ids, x.dtype)
        row = write_index[:, None] + torch.arange(x.shape[1], device=x.device)
        mask = (kv_positions[None, None, :] <= row[:, :, None]).unsqueeze(1)  # [B, 1, S, L]
        return x, (rope, mask, write_index, list(past))

    def run_layer(self, index: int, x: Tensor, context: Context) -> Tensor:
        rope, mask, write_index, caches = context
        past = (caches[2 * index], caches[2 * index + 1])
        x, caches[2 * index], caches[2 * index + 1] = self.layers[index](x, rope, mask, write_index, past)
        return x

    def leave(self, x: Tensor, context: Context) -> Tensor:
        return self.norm(x)


class LanguageModel(Stack):
    """A decoder with a head: what thinker and talker share.

    A subclass makes its submodules, for their order is that of the weights in the file.

    Attributes:
        head: name of the submodule that gives logits.
    """

    model: Decoder
    head: str

    @property
    def _head(self) -> Linear:
        return cast(Linear, self.get_submodule(self.head))

    def embed(self, inputs_embeds: Tensor) -> Tensor:
        """What the decoder is fed for embeddings float32 [B, S, E], in the dtype of the weights."""
        return inputs_embeds.to(self._head.weight.dtype)

    @property
    def depth(self) -> int:
        return self.model.depth

    def enter(self, *inputs: Any) -> tuple[Tensor, Context]:
        """As ``forward``; the context ends with the caches, see ``Decoder.enter``."""
        inputs_embeds, *rest = inputs
        return self.model.enter(self.embed(inputs_embeds), *rest)

    def run_layer(self, index: int, x: Tensor, context: Context) -> Tensor:
        return self.model.run_layer(index, x, context)

    def leave(self, x: Tensor, context: Context) -> Tensor:
        """The hidden state after the final norm; ``logits`` takes it on."""
        return self.model.leave(x, context)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [B, S, E] -> float32 logits [B, V] of the last token."""
        return self._head(hidden[:, -1]).float()


def decoder_config(config: Any, kv_form: str, embedding_size: int) -> DecoderConfig:
    """Sizes from transformers' text or talker configuration."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return DecoderConfig(
        hidden_size=config.hidden_size,
        embedding_size=embedding_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        rope_theta=float(config.rope_parameters["rope_theta"]),
        mrope_section=tuple(config.rope_parameters.get("mrope_section", (16, 24, 24))),
        rms_norm_eps=config.rms_norm_eps,
        kv_form=kv_form,
    )


def decoder_geometry(part: ModelPart, ckpt: Checkpoint) -> DecoderGeometry:
    """What the manifest says of a language model."""
    decoder = decoder_of(part)
    sizes = asdict(decoder.sizes(ckpt.config, "static"))
    del sizes["kv_form"]
    return DecoderGeometry(
        **sizes,
        embedding_file=f"embeddings/{part.name}.npy",
        embedding_dtype=ckpt.dtype(decoder.table),
    )


def define_decoder(
    name: str, settings: Settings, sizes: DecoderConfig, build: Callable[[], ExportModule], gives_hidden: bool = False
) -> GraphDefinition:
    """The graph of a language model."""
    outputs = [f32("logits", "batch", sizes.vocab_size)]
    if gives_hidden:
        outputs.append(f32("hidden", "batch", "new_tokens", sizes.hidden_size))
    inputs, past, present = _borders(sizes, settings.precision)
    grows, max_context = sizes.kv_form == "concat", settings.max_context
    pairs = {after.name: before.name for before, after in zip(past, present, strict=True)}
    held = DimRange(0, min(1024, max_context) - 1, max_context - 1)
    return GraphDefinition(
        name=name,
        precision=settings.precision,
        geometry=repr(sizes),
        build=build,
        inputs=inputs + past,
        outputs=(*outputs, *present),
        dims={
            "batch": DimRange(1, 1, 1),
            "new_tokens": DimRange(1, 1, 512),
            "live": DimRange(1, min(1024, max_context), max_context),
            **({"past": held} if grows else {"capacity": DimRange(max_context, max_context, max_context)}),
        },
        past=len(past),
        aliases={} if grows else pairs,
        grows=pairs if grows else {},
    )


def _borders(sizes: DecoderConfig, precision: str) -> tuple[tuple[TensorSpec, ...], ...]:
    """Inputs, past inputs and present outputs."""
    before, after = ("past", "live") if sizes.kv_form == "concat" else ("capacity", "capacity")
    names = [f"{part}_{i}" for i in range(sizes.num_layers) for part in ("key", "value")]
    inputs = (
        f32("inputs_embeds", "batch", "new_tokens", sizes.embedding_size),
        i64("position_ids", 3, "batch", "new_tokens"),
        i64("kv_positions", "live"),
        i64("write_index", "batch"),
    )
    heads, width = sizes.num_kv_heads, sizes.head_dim
    past = tuple(TensorSpec(f"past_{name}", precision, ("batch", heads, before, width)) for name in names)
    present = tuple(TensorSpec(f"present_{name}", precision, ("batch", heads, after, width)) for name in names)
    return inputs, past, present


def prefill_cases(part: ModelPart, subject: Subject) -> Iterator[Case]:
    """Prefill of random tokens at several lengths, and of a multimodal prompt, each in one piece."""
    dim = subject.bundle.manifest.graphs[part.name].dims["new_tokens"]
    lengths = {dim.min, dim.opt, 17, 130, *largest(subject, part.name, "new_tokens", 512)}
    lengths |= {31, 257} if subject.full else set()
    for length in sorted(n for n in lengths if n <= min(subject.max_context, dim.max)):
        rng = generator(f"{part.name} {length}")
        rows, positions = random_tokens(subject.bundle, part.name, length, rng), random_positions(length, rng)
        yield from decoder_cases(part, f"{length} tokens", rows[None], positions[:, None], subject.max_context)
    rows, positions = prompt_inputs(subject, part.name)
    yield from decoder_cases(part, "multimodal prompt", rows[None], positions[:, None], subject.max_context)


def decoder_cases(
    part: ModelPart, name: str, embeds: NDArray[np.float32], positions: NDArray[np.int64], capacity: int
) -> Iterator[Case]:
    """Prefill of given embeddings, in one piece: hidden states where the graph gives them, the last token's logits.

    Args:
        embeds: [1, S, E]. positions: int64 [3, 1, S]. capacity: of the KV cache, in tokens.
    """
    decoder, inputs = decoder_of(part), (embeds, positions)
    feeds: dict[str, Array] = {
        "inputs_embeds": embeds,
        "position_ids": positions,
        "kv_positions": np.arange(embeds.shape[1], dtype=np.int64),
        "write_index": np.zeros(1, np.int64),
    }

    def ours(output: str) -> Callable[[Graph], Array]:
        return lambda graph: graph.run(feeds, graph.new_cache(capacity))[output]

    def hidden(module: nn.Module) -> Tensor:
        return reference_hidden(module, part, embeds, positions)

    def logits(module: nn.Module) -> Tensor:
        return reference_logits(module, part, hidden(module)[:, -1])

    if decoder.gives_hidden:
        yield Case(part.name, f"{name}, hidden", ours("hidden"), hidden, inputs)
    yield Case(part.name, f"{name}, logits", ours("logits"), logits, inputs, logits=True)


def reference_hidden(
    module: nn.Module, part: ModelPart, embeds: NDArray[np.float32], positions: NDArray[np.int64]
) -> Tensor:
    """States after the final norm [1, S, H] of the reference; arguments as for `decoder_cases`."""
    output = reference_stack(module, part)(
        inputs_embeds=reference_input(module, part, torch.from_numpy(embeds)), position_ids=torch.from_numpy(positions)
    )
    return torch.as_tensor(output.last_hidden_state)


def reference_stack(module: nn.Module, part: ModelPart) -> nn.Module:
    """The reference's decoder."""
    return module.get_submodule(decoder_of(part).stack)


def reference_input(module: nn.Module, part: ModelPart, embeds: Tensor) -> Tensor:
    """What the reference's decoder is fed for embeddings."""
    projection = decoder_of(part).projection
    return torch.as_tensor(module.get_submodule(projection)(embeds)) if projection else embeds


def reference_logits(module: nn.Module, part: ModelPart, hidden: Tensor) -> Tensor:
    """[..., H] -> [..., V]."""
    return torch.as_tensor(module.get_submodule(decoder_of(part).head)(hidden))


def decoder_of(part: ModelPart) -> DecoderPart:
    """What a language model says of itself."""
    assert part.decoder is not None, f"{part.name} is no language model"
    return part.decoder
