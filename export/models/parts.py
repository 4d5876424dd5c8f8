"""The six graphs of a checkpoint: module, inputs and outputs, dimension ranges.

One `GraphDefinition` per graph is all that `onnx_export` needs to trace it and all that the bundle says about it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from omniport.runtime.bundle.graph_spec import DimRange, TensorSpec
from omniport.runtime.bundle.manifest import SolverSpec

from .audio_encoder import AudioEncoder, AudioEncoderConfig
from .bigvgan import BigVgan, BigVganConfig
from .dit import Dit, DitConfig
from .layers import DecoderConfig
from .module import ExportModule
from .talker import Talker
from .thinker import Thinker
from .vision_encoder import VisionEncoder, VisionEncoderConfig

#: precision of each graph under --precision. Token2wav stays float32 under bf16: eight bits of mantissa are too few for
#: an ODE state and no runtime has BF16 transposed convolutions.
PRECISIONS: dict[str, dict[str, str]] = {
    "fp32": {},
    "fp16": dict.fromkeys(("audio_encoder", "vision_encoder", "thinker", "talker", "dit", "bigvgan"), "float16"),
    "bf16": dict.fromkeys(("audio_encoder", "vision_encoder", "thinker", "talker"), "bfloat16"),
}


@dataclass(frozen=True)
class GraphDefinition:
    """What to trace.

    Attributes:
        build: makes the module; called with the meta device as default.
        geometry: every size and constant of the architecture, as text.
        inputs: as in the GraphSpec. A symbolic dimension may be ``"<k>*<name>"``: k times another one.
        past: trailing inputs that the module takes as one list (KV cache).
        ops: ``native``, or ``decomposed`` for nodes that older parsers know (`omniport.export.graphs.lowering`).
    """

    name: str
    precision: str
    geometry: str
    build: Callable[[], ExportModule]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: dict[str, DimRange]
    past: int = 0
    aliases: dict[str, str] = field(default_factory=dict)
    grows: dict[str, str] = field(default_factory=dict)
    ops: str = "native"

    def module(self) -> ExportModule:
        """The module on the meta device, in its precision, with nothing loaded."""
        with torch.device("meta"):
            module = self.build()
        module.set_precision(getattr(torch, self.precision))
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        return module.eval()


def decoder_config(config: Any, kv_form: str = "static") -> DecoderConfig:
    """Sizes of a decoder from transformers' text or talker configuration."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return DecoderConfig(
        hidden_size=config.hidden_size,
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


def graph_definitions(
    config: Any,
    precision: str,
    max_context: int,
    solver: SolverSpec,
    tied: bool,
    *,
    ops: str = "native",
    kv_form: str = "static",
) -> dict[str, GraphDefinition]:
    """The graphs of a checkpoint: three without speech, six with it.

    Args:
        config: ``transformers.Qwen2_5OmniConfig``.
        precision: fp32, fp16 or bf16.
        max_context: largest KV-cache capacity.
        solver: the schedule that the DiT's tables are folded for.
        tied: the thinker's head is its embedding table.
        ops: as in `GraphDefinition`.
        kv_form: ``static`` or ``concat`` (`KvSpec.form`).
    """
    thinker = config.thinker_config
    graphs = [
        _audio_encoder(thinker.audio_config),
        _vision_encoder(thinker.vision_config),
        _thinker(thinker.text_config, max_context, tied, kv_form),
    ]
    if config.enable_audio_output:
        token2wav = config.token2wav_config
        graphs += [
            _talker(config.talker_config, max_context, kv_form),
            _dit(token2wav.dit_config, solver),
            _bigvgan(token2wav.bigvgan_config),
        ]
    chosen = PRECISIONS[precision]
    return {name: replace(make(chosen.get(name, "float32")), ops=ops) for name, make in graphs}


_Named = tuple[str, Callable[[str], GraphDefinition]]


def _audio_encoder(c: Any) -> _Named:
    sizes = AudioEncoderConfig(
        n_mels=c.num_mel_bins,
        width=c.d_model,
        num_layers=c.encoder_layers,
        num_heads=c.encoder_attention_heads,
        ffn=c.encoder_ffn_dim,
        output_size=c.output_dim,
        chunk_frames=c.n_window * 2,
    )
    frames = sizes.chunk_frames
    return "audio_encoder", lambda precision: GraphDefinition(
        name="audio_encoder",
        precision=precision,
        geometry=repr(sizes),
        build=lambda: AudioEncoder(sizes),
        inputs=(_f32("mel", "chunks", sizes.n_mels, frames), _i64("frames", "chunks")),
        outputs=(_f32("embeds", "chunks", frames // 4, sizes.output_size),),
        dims={"chunks": DimRange(1, 1, 150)},
    )


def _vision_encoder(c: Any) -> _Named:
    window = c.window_size // c.patch_size // c.spatial_merge_size * c.spatial_merge_size
    sizes = VisionEncoderConfig(
        patch_values=c.in_channels * c.temporal_patch_size * c.patch_size**2,
        width=c.hidden_size,
        num_layers=c.depth,
        num_heads=c.num_heads,
        ffn=c.intermediate_size,
        output_size=c.out_hidden_size,
        merge=c.spatial_merge_size,
        window_patches=window**2,
        full_attention_layers=tuple(c.fullatt_block_indexes),
        rope_theta=float(c.rope_parameters["rope_theta"]),
    )
    unit, slots = sizes.merge**2, sizes.window_patches
    return "vision_encoder", lambda precision: GraphDefinition(
        name="vision_encoder",
        precision=precision,
        geometry=repr(sizes),
        build=lambda: VisionEncoder(sizes),
        inputs=(
            _f32("patches", "frames", f"{unit}*units", sizes.patch_values),
            _i64("grid_hw", f"{unit}*units", 2),
            _i64("window_index", f"{slots}*windows"),
            TensorSpec("window_valid", "bool", ("windows", slots)),
        ),
        outputs=(_f32("embeds", "tokens", sizes.output_size),),
        dims={
            "frames": DimRange(1, 1, 384),
            "units": DimRange(1, 256, 16384),
            "windows": DimRange(1, 16, 1200),
            "tokens": DimRange(1, 256, 32768),
        },
    )


def _decoder_borders(sizes: DecoderConfig, width: int, precision: str) -> tuple[tuple[TensorSpec, ...], ...]:
    """Inputs, past inputs and present outputs of a decoder graph."""
    before, after = ("past", "live") if sizes.kv_form == "concat" else ("capacity", "capacity")
    names = [f"{part}_{i}" for i in range(sizes.num_layers) for part in ("key", "value")]
    inputs = (
        _f32("inputs_embeds", "batch", "new_tokens", width),
        _i64("position_ids", 3, "batch", "new_tokens"),
        _i64("kv_positions", "live"),
        _i64("write_index", "batch"),
    )
    heads, width = sizes.num_kv_heads, sizes.head_dim
    past = tuple(TensorSpec(f"past_{name}", precision, ("batch", heads, before, width)) for name in names)
    present = tuple(TensorSpec(f"present_{name}", precision, ("batch", heads, after, width)) for name in names)
    return inputs, past, present


def _decoder(
    name: str,
    precision: str,
    build: Callable[[], ExportModule],
    sizes: DecoderConfig,
    width: int,
    outputs: tuple[TensorSpec, ...],
    max_context: int,
) -> GraphDefinition:
    inputs, past, present = _decoder_borders(sizes, width, precision)
    grows = sizes.kv_form == "concat"
    pairs = {after.name: before.name for before, after in zip(past, present, strict=True)}
    held = DimRange(0, min(1024, max_context) - 1, max_context - 1)
    return GraphDefinition(
        name=name,
        precision=precision,
        geometry=repr((sizes, width)),
        build=build,
        inputs=inputs + past,
        outputs=outputs + present,
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


def _thinker(c: Any, max_context: int, tied: bool, kv_form: str) -> _Named:
    sizes = decoder_config(c, kv_form)
    outputs = (
        _f32("logits", "batch", sizes.vocab_size),
        _f32("hidden", "batch", "new_tokens", sizes.hidden_size),
    )
    return "thinker", lambda precision: _decoder(
        "thinker", precision, lambda: Thinker(sizes, tied), sizes, sizes.hidden_size, outputs, max_context
    )


def _talker(c: Any, max_context: int, kv_form: str) -> _Named:
    sizes, width = decoder_config(c, kv_form), c.embedding_size
    outputs = (_f32("logits", "batch", sizes.vocab_size),)
    return "talker", lambda precision: _decoder(
        "talker", precision, lambda: Talker(sizes, width), sizes, width, outputs, max_context
    )


def _dit(c: Any, solver: SolverSpec) -> _Named:
    sizes = DitConfig(
        mel_dim=c.mel_dim,
        width=c.hidden_size,
        num_layers=c.num_hidden_layers,
        num_heads=c.num_attention_heads,
        head_dim=c.head_dim,
        ff_mult=c.ff_mult,
        block_size=c.block_size,
        look_ahead_layers=tuple(c.look_ahead_layers),
        look_backward_layers=tuple(c.look_backward_layers),
        repeats=c.repeats,
        num_embeds=c.num_embeds,
        code_width=c.emb_dim,
        speaker_dim=c.enc_emb_dim,
        reference_dim=c.enc_dim,
        rope_theta=float(c.rope_parameters["rope_theta"]),
        times=solver.table,
        guidance_scale=solver.guidance_scale,
    )
    frames = f"{sizes.repeats}*codes"
    return "dit", lambda precision: GraphDefinition(
        name="dit",
        precision=precision,
        geometry=repr(sizes),
        build=lambda: Dit(sizes),
        inputs=(
            _f32("x", "batch", frames, sizes.mel_dim),
            _i64("codes", "batch", "codes"),
            _f32("speaker", "batch", sizes.speaker_dim),
            _f32("reference", "batch", sizes.reference_dim),
            _i64("step", 1),
        ),
        outputs=(_f32("velocity", "batch", frames, sizes.mel_dim),),
        dims={"batch": DimRange(1, 1, 1), "codes": DimRange(1, 60, 4096)},
    )


def _bigvgan(c: Any) -> _Named:
    sizes = BigVganConfig(
        mel_dim=c.mel_dim,
        channels=c.upsample_initial_channel,
        upsample_rates=tuple(c.upsample_rates),
        upsample_kernel_sizes=tuple(c.upsample_kernel_sizes),
        resblock_kernel_sizes=tuple(c.resblock_kernel_sizes),
        resblock_dilation_sizes=tuple(tuple(d) for d in c.resblock_dilation_sizes),
    )
    hop = 1
    for rate in sizes.upsample_rates:
        hop *= rate
    return "bigvgan", lambda precision: GraphDefinition(
        name="bigvgan",
        precision=precision,
        geometry=repr(sizes),
        build=lambda: BigVgan(sizes),
        inputs=(_f32("mel", "batch", sizes.mel_dim, "frames"),),
        outputs=(_f32("wav", "batch", f"{hop}*frames"),),
        dims={"batch": DimRange(1, 1, 1), "frames": DimRange(2, 116, 8192)},
    )


def _f32(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, "float32", shape)


def _i64(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, "int64", shape)
