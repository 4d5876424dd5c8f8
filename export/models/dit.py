"""Flow-matching DiT: computes the velocity of a noisy mel from codec tokens and a voice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from omniport.runtime.backends.base import Graph
from omniport.runtime.bundle.graph_spec import DimRange
from omniport.runtime.bundle.manifest import DitGeometry, SolverSpec
from omniport.runtime.bundle.parts import PARTS
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.speech.kept_blocks import KeptBlocks, nothing_before
from torch import Tensor, nn

from ..checkpoint.checkpoint import Checkpoint
from .dit_blocks import EPS, DitBlock, DitConfig, Frames
from .dit_tables import final_table, table_keys
from .layers import inverse_frequencies
from .module import Compute, Context, ExportModule, Linear, Rule, Stack
from .ops import pad_to_blocks
from .part import (
    Array,
    Asked,
    Case,
    GraphDefinition,
    ModelPart,
    ReferenceModule,
    Settings,
    Subject,
    f32,
    i64,
    largest,
    qwen_module,
)
from .signals import generator
from .speakers import Speaker, load_speakers, null_reference, speaker_keys, spoken_mel


class _Table(ExportModule):
    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))


class _CodecEmbedding(ExportModule):
    """Codec tokens to vectors, each repeated for the mel frames it covers."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.codec_embed = _Table(config.num_embeds + 1, config.code_width)
        self.repeats = config.repeats

    def forward(self, codes: Tensor) -> Tensor:
        # [B, T/2] -> [B, T, E]
        code = F.embedding(codes, self.codec_embed.weight).float()
        return code.unsqueeze(2).expand(-1, -1, self.repeats, -1).flatten(1, 2)


class _InputEmbedding(ExportModule):
    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        inputs = config.mel_dim + config.reference_dim + config.code_width + config.speaker_dim
        self.proj = Linear(inputs, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Dit(Stack):
    """Velocity at one time point, classifier-free guidance included (transformers: Qwen2_5OmniToken2WavDiTModel).

    Constants leave the loop: the voice's ECAPA vector is an input computed once per voice, and time embedding and
    AdaLN modulations are tables indexed by ``step``, so their projections are not in the graph at all.
    """

    prefix = "token2wav.code2wav_dit_model."
    final_modulation: Tensor
    null_reference: Tensor
    inv_freq: Tensor

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.config = config
        self.text_embed = _CodecEmbedding(config)
        self.input_embed = _InputEmbedding(config)
        self.transformer_blocks = nn.ModuleList([DitBlock(config, i, self.prefix) for i in range(config.num_layers)])
        self.proj_out = Linear(config.width, config.mel_dim)
        final: Rule = Compute(
            table_keys(self.prefix, "norm_out.linear"), partial(final_table, prefix=self.prefix, times=config.times)
        )
        self.computed("final_modulation", (len(config.times), 2, config.width), final)
        self.computed(
            "null_reference",
            (1, config.reference_dim),
            Compute((), lambda reader: null_reference(cast(Checkpoint, reader))[None]),
        )
        self.constant("inv_freq", inverse_frequencies(config.head_dim, config.rope_theta))

    def forward(
        self,
        x: Tensor,
        codes: Tensor,
        speaker: Tensor,
        reference: Tensor,
        step: Tensor,
        has_past: Tensor,
        keep_block: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """x: float32 [B, T, 80], codes: int64 [B, T/2], speaker: float32 [B, 192], reference: float32 [B, 128],
        step: int64 [1]; has_past: int64 [1], 1 if ``past`` is what was computed for the block before the first, 0 if
        there is none; keep_block: int64 [1], the block whose keys and values are given; past: key and value of every
        layer that looks back, float32 [2B, block, E] -> velocity float32 [B, T, 80], and as ``past``."""
        x, context = self.enter(x, codes, speaker, reference, step, has_past, keep_block, past)
        velocity = self.leave(self.run_layers(x, context), context)
        return velocity, *(tensor.float() for tensor in context[-1])

    @property
    def depth(self) -> int:
        return len(self.transformer_blocks)

    def enter(self, *inputs: Any) -> tuple[Tensor, Context]:
        """As ``forward``; the context ends with ``past``: a layer's key and value are replaced when it has run."""
        x, codes, speaker, reference, step, has_past, keep_block, past = inputs
        config, frames = self.config, x.shape[1]
        block, dtype = config.block_size, self.proj_out.weight.dtype
        h = pad_to_blocks(self.input_embed(self._embed(x, codes, speaker, reference).to(dtype)), block)
        frame = torch.arange(block + h.shape[1], device=x.device) - block
        angle = (frame.float().unsqueeze(-1) * self.inv_freq).unsqueeze(0).expand(h.shape[0], -1, -1)
        before = has_past.expand(block)
        real = torch.cat((before, (frame[block:] < frames).to(before.dtype)))
        valid = real.to(dtype)[None, :, None].expand(h.shape[0], -1, -1)
        led: Frames = (angle.cos().to(dtype), angle.sin().to(dtype), valid)
        own = tuple(tensor[:, block:] for tensor in led)
        return h, (step, own, led, keep_block, frames, [tensor.to(dtype) for tensor in past])

    def run_layer(self, index: int, x: Tensor, context: Context) -> Tensor:
        step, own, led, keep, _, caches = context
        layer = self.transformer_blocks[index]
        if index not in self.config.past_layers:
            return cast(Tensor, layer(x, step, own, led, keep, ())[0])
        place = 2 * self.config.past_layers.index(index)
        x, caches[place], caches[place + 1] = layer(x, step, own, led, keep, caches[place : place + 2])
        return x

    def leave(self, x: Tensor, context: Context) -> Tensor:
        step, frames, dtype = context[0], context[4], self.proj_out.weight.dtype
        scale, shift = self.final_modulation.index_select(0, step)[0].to(dtype).unbind(0)
        x = self.proj_out(F.layer_norm(x, (self.config.width,), scale, shift, EPS))[:, :frames].float()
        guided, null = x[: x.shape[0] // 2], x[x.shape[0] // 2 :]
        return guided + (guided - null) * self.config.guidance_scale

    def _embed(self, x: Tensor, codes: Tensor, speaker: Tensor, reference: Tensor) -> Tensor:
        """Concatenated inputs [2B, T, mel+reference+code+speaker]: first half with the voice, second half without."""
        batch, frames = x.shape[0], x.shape[1]
        code = self.text_embed(torch.cat((codes, torch.zeros_like(codes)), dim=0))
        voice = torch.cat((speaker, torch.zeros_like(speaker)), dim=0).unsqueeze(1).expand(-1, frames, -1)
        timbre = torch.cat((reference, self.null_reference.expand(batch, -1)), dim=0)
        timbre = timbre.unsqueeze(1).expand(-1, frames, -1)
        return torch.cat((torch.cat((x, x), dim=0), timbre, code, voice), dim=-1)


def _define(config: Any, settings: Settings) -> GraphDefinition:
    c, solver = config.token2wav_config.dit_config, settings.solver
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
    frames, inner = f"{sizes.repeats}*codes", sizes.num_heads * sizes.head_dim
    kept = [f"{part}_{layer}" for layer in sizes.past_layers for part in ("key", "value")]
    return GraphDefinition(
        name=PART.name,
        precision=settings.precision,
        geometry=repr(sizes),
        build=lambda: Dit(sizes),
        inputs=(
            f32("x", "batch", frames, sizes.mel_dim),
            i64("codes", "batch", "codes"),
            f32("speaker", "batch", sizes.speaker_dim),
            f32("reference", "batch", sizes.reference_dim),
            i64("step", 1),
            i64("has_past", 1),
            i64("keep_block", 1),
            *(f32(f"past_{name}", "2*batch", sizes.block_size, inner) for name in kept),
        ),
        outputs=(
            f32("velocity", "batch", frames, sizes.mel_dim),
            *(f32(f"present_{name}", "2*batch", sizes.block_size, inner) for name in kept),
        ),
        past=len(kept),
        dims={"batch": DimRange(1, 1, 1), "codes": DimRange(1, 60, 4096)},
    )


def _describe(ckpt: Checkpoint, solver: SolverSpec) -> Mapping[str, Any]:
    c = ckpt.config.token2wav_config.dit_config
    geometry = DitGeometry(
        mel_dim=c.mel_dim,
        repeats=c.repeats,
        block_size=c.block_size,
        look_back_blocks=max(1, len(c.look_backward_layers)),
        look_ahead_blocks=max(1, len(c.look_ahead_layers)),
        num_embeds=c.num_embeds,
        speaker_dim=c.enc_emb_dim,
        reference_dim=c.enc_dim,
        past_layers=tuple(sorted(set(c.look_backward_layers))),
        past_width=c.num_attention_heads * c.head_dim,
    )
    return {"dit": geometry, "solver": solver}


def _case(
    subject: Subject, what: str, x: NDArray[np.float32], codes: Array, step: int, voice: str, windows: bool = False
) -> Case:
    """Guided velocity at one time point of the schedule; the voice's vectors are the bundle's.

    Args:
        x: [1, T, mel]. codes: int64 [1, T/2]. step: index into the solver's table.
        windows: as streamed speech has it, each window on what the one before left.
    """
    speaker, solver, geometry = _speaker(subject.checkpoint, voice), _solver(subject.bundle), _geometry(subject.bundle)
    feeds: dict[str, Array] = {
        "x": x,
        "codes": codes,
        "step": np.array([step], np.int64),
        **subject.bundle.voice(voice).feeds(),
        **nothing_before(geometry),
    }

    name = f"{codes.shape[1]} codes, {voice}, step {step}, {what}"
    settings = np.array([solver.table[step], solver.guidance_scale])
    inputs = (x, codes, speaker.ref_mel, speaker.cond, settings)

    def ours(graph: Graph) -> Array:
        return _by_windows(graph, feeds, geometry) if windows else graph.run(feeds)["velocity"]

    return Case(PART.name, name, ours, _asked(feeds, solver, speaker), inputs)


def _by_windows(graph: Graph, feeds: Mapping[str, Array], geometry: DitGeometry) -> Array:
    """Velocities in windows of two blocks and their look-ahead."""
    kept, size = KeptBlocks(geometry), 2 * geometry.block_codes
    count, repeats = feeds["codes"].shape[1], geometry.repeats
    pieces = []
    for start in range(0, count, size):
        last = min(count, start + size + geometry.look_ahead_codes)
        cut = {"x": feeds["x"][:, repeats * start : repeats * last], "codes": feeds["codes"][:, start:last]}
        keep_block = (min(size, last - start) - 1) // geometry.block_codes
        outputs = graph.run({**feeds, **cut, **kept.feeds(0, keep_block)})
        kept.take(0, outputs)
        pieces.append(outputs["velocity"][:, : repeats * size])
    return np.concatenate(pieces, axis=1)


def _asked(feeds: Mapping[str, Array], solver: SolverSpec, speaker: Speaker) -> Asked:
    """The reference's guided velocity for what the graph is fed, with the voice as the checkpoint stores it."""

    def run(module: nn.Module) -> Tensor:
        output = module(
            hidden_states=torch.from_numpy(feeds["x"]),
            condition_vector=torch.from_numpy(speaker.ref_mel)[None],
            speaker_embedding=torch.from_numpy(speaker.cond)[None, None].expand(-1, feeds["x"].shape[1], -1),
            quantized_code=torch.from_numpy(feeds["codes"]),
            time_step=torch.tensor(solver.table[int(feeds["step"][0])]),
        )
        guided, null = output.chunk(2, dim=0)
        return torch.as_tensor(guided + (guided - null) * solver.guidance_scale)

    return run


def _cases(subject: Subject) -> Iterator[Case]:
    geometry, dim = _geometry(subject.bundle), subject.bundle.manifest.graphs[PART.name].dims["codes"]
    names, last = sorted(load_speakers(subject.checkpoint.path / "spk_dict.pt")), len(_solver(subject.bundle).table) - 1
    plan = [(dim.min, 0), (12, last // 3), (13, last // 2), (dim.opt, last - 1), (61, last)]
    plan += [(36, step) for step in range(last + 1)] * subject.full
    plan += [(length, last // 4) for length in largest(subject, PART.name, "codes", 300)]
    for i, (length, step) in enumerate(plan):
        rng = generator(f"codes {length} {step}")
        codes = rng.integers(0, geometry.num_embeds, (1, length))
        x = rng.standard_normal((1, length * geometry.repeats, geometry.mel_dim), np.float32)
        yield _case(subject, "noise", x, codes, step, names[i % len(names)])
    if geometry.past_layers:
        length, step = 67, last // 3
        rng = generator(f"windows {length} {step}")
        codes = rng.integers(0, geometry.num_embeds, (1, length))
        x = rng.standard_normal((1, length * geometry.repeats, geometry.mel_dim), np.float32)
        yield _case(subject, "in windows", x, codes, step, names[0], windows=True)
    # half way between noise and a mel, with codes that are held as speech holds them
    length, step = 30, last // 2
    rng = generator("codes, real")
    codes = np.repeat(rng.integers(0, geometry.num_embeds, (1, length // 3)), 3, axis=1)
    mel = spoken_mel(_speaker(subject.checkpoint, names[-1]), length * geometry.repeats)[None]
    time = _solver(subject.bundle).table[step]
    x = ((1 - time) * rng.standard_normal(mel.shape) + time * mel).astype(np.float32)
    yield _case(subject, "mel", x, codes, step, names[-1])


def _geometry(bundle: Bundle) -> DitGeometry:
    assert bundle.manifest.dit is not None
    return bundle.manifest.dit


def _solver(bundle: Bundle) -> SolverSpec:
    assert bundle.manifest.solver is not None
    return bundle.manifest.solver


def _speaker(ckpt: Checkpoint, voice: str) -> Speaker:
    return load_speakers(ckpt.path / "spk_dict.pt")[voice]


PART: ModelPart = ModelPart(
    PARTS["dit"],
    define=_define,
    reference=ReferenceModule(qwen_module("Qwen2_5OmniToken2WavDiTModel", "token2wav_config.dit_config"), Dit.prefix),
    cases=_cases,
    describe=_describe,
    also_reads=speaker_keys,
    ask=lambda given, bundle, ckpt: _asked(given["feeds"], _solver(bundle), _speaker(ckpt, given["voice"])),
)
