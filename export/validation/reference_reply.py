"""Compute the reference's replies part by part, one transformers module in memory at a time.

Follows ``Qwen2_5OmniForConditionalGeneration.generate`` with greedy thinker and talker: encoders, placeholder
embeddings, thinker, the talker's conditioning, talker, DiT, vocoder. What passes between the parts is kept, so that a
runtime can be checked at every seam with the reference's own data. All conversations go through one part before the
next is loaded.

transformers 5.23 drops an attention mask that is all ones before the talker's forward, which then leaves out the
codec-pad and codec-bos embeddings and 3-D positions. The talker's forward is given its mask here, as padded prompts and
earlier releases do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omniport.runtime.bundle.parts import Part, decoders, encoder_of, giving
from omniport.runtime.system.progress import Say
from torch import nn

from ..evaluation.reference_modules import cache_keyword
from ..models.speakers import Speaker
from .reference import Reference, array_key
from .reference_inputs import Inputs
from .reference_speech import Floats, Solve, solve_flow, sound_of, speaker_of


@dataclass(frozen=True)
class ReplyLimits:
    """How long a reply may be, which ids end it, and who speaks.

    Attributes:
        codec_stop: the talker's pad and end ids, which ``generate`` stops on, if None.
        voice: None for text alone.
    """

    text_tokens: int
    codec_tokens: int
    stop: tuple[int, ...]
    codec_stop: tuple[int, ...] | None = None
    voice: str | None = None
    repetition_penalty: float = 1.05


@dataclass(frozen=True, eq=False)
class ThinkerTrace:
    """S prompt tokens, n generated ones (a stop token among them).

    Attributes:
        embeds: float32 [S + n - 1, H]: what was consumed. hidden: after the final norm, of the same tokens.
        positions: int64 [3, S + n - 1]. logits: [n, V]. tokens: int64 [n].
    """

    embeds: Floats
    positions: NDArray[np.int64]
    hidden: Floats
    logits: Floats
    tokens: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TalkerTrace:
    """P = S + 2 rows of prefill, m picked codes (a stop code among them).

    Attributes:
        embeds: float32 [P + m - 1, E] into the projection. positions: int64 [3, P + m - 1].
        logits, scores: [m, V] before and after repetition penalty and suppression. codes: int64 [m].
        history: int64 [P], ids that the penalty sees before the first code.
    """

    embeds: Floats
    positions: NDArray[np.int64]
    logits: Floats
    scores: Floats
    codes: NDArray[np.int64]
    history: NDArray[np.int64]


@dataclass(eq=False)
class StagedReply:
    """One conversation. ``features`` are the encoders' outputs by kind: audio, image, video, float32 [n, H]."""

    inputs: Inputs
    features: dict[str, Floats] = field(default_factory=dict)
    thinker: ThinkerTrace | None = None
    talker: TalkerTrace | None = None
    token_ids: list[int] = field(default_factory=list)
    """without the stop token"""
    codec_ids: list[int] = field(default_factory=list)
    """without the stop code"""
    solve: Solve | None = None
    waveform: Floats | None = None


def staged_replies(
    reference: Reference,
    inputs: Sequence[Inputs],
    limits: ReplyLimits,
    noise: Floats,
    progress: Say = lambda _: None,
) -> list[StagedReply]:
    """Greedy replies to prompts.

    Args:
        noise: float32 [T, 80], the ODE's start, T at least 2 for every codec token.

    Raises:
        UnknownVoice: the checkpoint has no voice of that name.
    """
    replies = [StagedReply(given) for given in inputs]
    checkpoint = reference.checkpoint
    speaker = None if limits.voice is None else speaker_of(checkpoint, limits.voice)

    def stage(part: Part, run: Callable[[StagedReply], None], wanted: Sequence[StagedReply]) -> None:
        if wanted:
            progress(f"reference: {part.name}")
        for reply in wanted:
            run(reply)

    heard = [reply for reply in replies if "input_features" in reply.inputs.features]
    seen = [reply for reply in replies if any("pixel" in name for name in reply.inputs.features)]
    stage(encoder_of("audio"), lambda reply: _listen(reference, reply), heard)
    stage(encoder_of("image"), lambda reply: _look(reference, reply), seen)
    stage(decoders()[0], lambda reply: _think(reference, reply, limits), replies)
    if speaker is not None:
        special = _special_rows(reference, speaker)  # before another part takes the place of the thinker
        # Without a consumed token generate has no row to speak from.
        talking = [reply for reply in replies if reply.thinker is not None and len(reply.thinker.tokens) > 1]
        stage(decoders()[1], lambda reply: _talk(reference, reply, limits, speaker, special), talking)
        sounding = [reply for reply in talking if reply.codec_ids]
        stage(giving("velocity"), lambda reply: _flow(reference, reply, speaker, noise), sounding)
        stage(giving("wav"), lambda reply: _vocode(reference, reply), sounding)
    reference.release()
    return replies


def _listen(reference: Reference, reply: StagedReply) -> None:
    """As ``get_audio_features``: all clips in one call, padding frames cut off."""
    mel, mask = reply.inputs.features["input_features"], reply.inputs.features["feature_attention_mask"]
    frames, lengths = mel.permute(0, 2, 1)[mask.bool()].permute(1, 0), mask.sum(dim=1)

    def run(module: Any) -> dict[str, torch.Tensor]:
        after, _ = module._get_feat_extract_output_lengths(lengths)
        return {"embeds": module(frames, feature_lens=lengths, aftercnn_lens=after).last_hidden_state}

    case = f"reply {array_key(frames.numpy(), lengths.numpy())}"
    reply.features["audio"] = reference.result(encoder_of("audio").name, case, run)["embeds"]


def _look(reference: Reference, reply: StagedReply) -> None:
    for kind, suffix in (("image", ""), ("video", "_videos")):
        pixels, grid = (reply.inputs.features.get(n) for n in (f"pixel_values{suffix}", f"{kind}_grid_thw"))
        if pixels is None or grid is None:
            continue

        def run(module: Any, pixels: torch.Tensor = pixels, grid: torch.Tensor = grid) -> dict[str, torch.Tensor]:
            return {"embeds": module(pixels, grid_thw=grid).pooler_output}

        case = f"reply {array_key(pixels.numpy(), grid.numpy())}"
        reply.features[kind] = reference.result(encoder_of(kind).name, case, run)["embeds"]


def _rows(reference: Reference, ids: NDArray[np.int64]) -> Floats:
    """Rows of the thinker's embedding table, float32 [n, H]."""

    def run(module: Any) -> dict[str, torch.Tensor]:
        return {"rows": module.embed_tokens(torch.from_numpy(ids))}

    rows: Floats = reference.result(decoders()[0].name, f"rows {array_key(ids)}", run)["rows"]
    return rows


def _special_rows(reference: Reference, speaker: Speaker) -> Floats:
    """Embeddings that frame the talker's text: the voice's token, the text's end, and padding, float32 [3, H]."""
    config = reference.checkpoint.config.talker_config
    ids = [speaker.bos_token, config.tts_text_end_token_id, config.tts_text_pad_token_id]
    return _rows(reference, np.asarray(ids))


def _media_mask(reference: Reference, reply: StagedReply, kind: str) -> NDArray[np.bool_]:
    config = reference.checkpoint.config.thinker_config
    mask: NDArray[np.bool_] = reply.inputs.token_ids == getattr(config, f"{kind}_token_id")
    return mask


def _think(reference: Reference, reply: StagedReply, limits: ReplyLimits) -> None:
    embeds = torch.from_numpy(_rows(reference, reply.inputs.token_ids))
    for kind, features in reply.features.items():
        mask = torch.from_numpy(_media_mask(reference, reply, kind))[:, None]
        embeds = embeds.masked_scatter(mask, torch.from_numpy(features))
    start = torch.from_numpy(reply.inputs.positions)

    def run(module: Any) -> dict[str, torch.Tensor]:
        cached = {cache_keyword(module): _dynamic_cache()}
        x, positions = embeds[None], start[:, None]
        kept: dict[str, list[torch.Tensor]] = {"embeds": [], "positions": [], "hidden": [], "logits": [], "tokens": []}
        while True:
            hidden = module(inputs_embeds=x, position_ids=positions, use_cache=True, **cached).last_hidden_state
            logits = module.lm_head(hidden[:, -1])
            token = logits.argmax(-1)
            for name, value in zip(kept, (x[0], positions[:, 0].T, hidden[0], logits, token), strict=True):
                kept[name].append(value)
            count = len(kept["tokens"])
            if int(token) in limits.stop or count == limits.text_tokens:
                return {name: torch.cat(values) for name, values in kept.items()}
            x = module.embed_tokens(token[None])
            positions = torch.full((3, 1, 1), reply.inputs.next_position + count - 1)

    arrays = [embeds.numpy(), start.numpy()]
    case = f"reply {array_key(*arrays)} {reply.inputs.next_position} {limits.stop} {limits.text_tokens}"
    kept = reference.result(decoders()[0].name, case, run)
    reply.thinker = ThinkerTrace(
        kept["embeds"], np.ascontiguousarray(kept["positions"].T), kept["hidden"], kept["logits"], kept["tokens"]
    )
    reply.token_ids = [int(token) for token in kept["tokens"] if token not in limits.stop]


def _conditioning(reference: Reference, reply: StagedReply, special: Floats) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``generate`` hands to the talker: prefill rows [1, S + 2, E], and the rest of the reply [1, k, E]."""
    trace = reply.thinker
    assert trace is not None
    prompt = len(reply.inputs.token_ids)
    embeds = trace.embeds.copy()
    for kind in reply.features:
        embeds[:prompt][_media_mask(reference, reply, kind)] = 0
    rows = trace.hidden + embeds
    bos, eos, pad = special[:, None]
    prefill = np.concatenate([rows[:prompt], bos, rows[prompt : prompt + 1]])
    return torch.from_numpy(prefill)[None], torch.from_numpy(np.concatenate([rows[prompt + 1 :], eos, pad]))[None]


def _talk(reference: Reference, reply: StagedReply, limits: ReplyLimits, speaker: Speaker, special: Floats) -> None:
    trace, features = reply.thinker, reply.inputs.features
    assert trace is not None
    prefill, rest = _conditioning(reference, reply, special)
    spoken = np.concatenate([reply.inputs.token_ids, [speaker.bos_token], trace.tokens[:1]])
    config = reference.checkpoint.config.talker_config
    end = limits.codec_stop or (config.tts_codec_pad_token_id, config.tts_codec_end_token_id)
    history = np.full(len(spoken), config.tts_codec_mask_token_id, np.int64)
    history[-2:] = config.tts_codec_pad_token_id, config.tts_codec_start_token_id
    heard, lengths, seconds = reply.inputs.rope_arguments()
    positioning = {
        "input_text_ids": torch.from_numpy(spoken)[None],
        "image_grid_thw": features.get("image_grid_thw"),
        "video_grid_thw": features.get("video_grid_thw"),
        "use_audio_in_video": heard,
        "audio_feature_lengths": lengths,
        "video_second_per_grid": seconds,
    }

    def run(module: Any) -> dict[str, torch.Tensor]:
        return _generate_codes(module, prefill, rest, positioning, torch.from_numpy(history), end, limits)

    arrays = array_key(prefill.numpy(), rest.numpy(), trace.positions, spoken)
    case = f"reply {arrays} {heard} {end} {limits.codec_tokens} {limits.repetition_penalty}"
    kept = reference.result(decoders()[1].name, case, run)
    positions = np.ascontiguousarray(kept["positions"].T)
    reply.talker = TalkerTrace(kept["embeds"], positions, kept["logits"], kept["scores"], kept["codes"], history)
    reply.codec_ids = [int(code) for code in kept["codes"] if code not in end]


def _generate_codes(
    module: Any,
    prefill: torch.Tensor,
    rest: torch.Tensor,
    positioning: dict[str, Any],
    history: torch.Tensor,
    end: tuple[int, ...],
    limits: ReplyLimits,
) -> dict[str, torch.Tensor]:
    """The talker's greedy loop, recording what goes into its projection and its decoder."""
    from transformers.generation.logits_process import (
        RepetitionPenaltyLogitsProcessor,
        SuppressTokensLogitsProcessor,
    )

    penalty = RepetitionPenaltyLogitsProcessor(limits.repetition_penalty)
    suppress = SuppressTokensLogitsProcessor([module.codec_bos_token])
    kept: dict[str, list[torch.Tensor]] = {"embeds": [], "positions": [], "logits": [], "scores": [], "codes": []}

    def into_projection(_module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        kept["embeds"].append(arguments[0][0].clone())

    def into_decoder(_module: nn.Module, _arguments: object, given: dict[str, Any]) -> None:
        kept["positions"].append(given["position_ids"][-3:, 0].T.clone())

    hooks = [
        module.thinker_to_talker_proj.register_forward_pre_hook(into_projection),
        module.model.register_forward_pre_hook(into_decoder, with_kwargs=True),
    ]
    try:
        module.rope_deltas = None
        cache, ids = _dynamic_cache(), history[None]
        common: dict[str, Any] = {cache_keyword(module): cache, "use_cache": True, **positioning}
        given: dict[str, Any] = {"inputs_embeds": prefill.clone()}  # forward adds to it in place
        while True:
            out = module(attention_mask=torch.ones_like(ids), thinker_reply_part=rest, **given, **common)
            rest, logits = out.thinker_reply_part, out.logits[:, -1]
            scores = suppress(ids, penalty(ids, logits.clone()))
            code = scores.argmax(-1)
            for name, value in (("logits", logits), ("scores", scores), ("codes", code)):
                kept[name].append(value)
            if int(code) in end or len(kept["codes"]) == limits.codec_tokens:
                return {name: torch.cat(values) for name, values in kept.items()}
            ids, given = torch.cat([ids, code[None]], dim=1), {"input_ids": code[None]}
    finally:
        for hook in hooks:
            hook.remove()


def _flow(reference: Reference, reply: StagedReply, speaker: Speaker, noise: Floats) -> None:
    reply.solve = solve_flow(reference, reply.codec_ids, speaker, noise)


def _vocode(reference: Reference, reply: StagedReply) -> None:
    assert reply.solve is not None
    reply.waveform = sound_of(reference, reply.solve.mel)


def _dynamic_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()
