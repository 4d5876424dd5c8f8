"""Check graphs on the reference's tokens and codes (teacher forcing), and compare replies token by token.

With teacher forcing one difference does not cause others: every step is compared on the same past.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray
from omniport.runtime.bundle.manifest import SamplingConfig
from omniport.runtime.bundle.parts import decoders, giving
from omniport.runtime.generation.decoder import Decoder
from omniport.runtime.generation.sampling import Sampler
from omniport.runtime.prompt.tokenizer import TextCodec
from omniport.runtime.speech.token2wav import NoiseStream, Token2Wav

from ...evaluation.metrics import MIN_ENERGY, energy
from ...evaluation.recording import RecordingBackend
from ..comparison import Comparison, array_check
from ..context import Context
from ..reference_reply import StagedReply
from ..reference_speech import Floats
from ..tolerances import limit
from ..types import FAIL, NOT_RUN, Check
from .solver import blame_mel, whole_feeds

#: tokens shown on each side of the first difference
_SHOWN = 6


def thinker_checks(context: Context, name: str, reply: StagedReply) -> Iterator[Check]:
    """Hidden states of prompt and reply, and the logits of every step."""
    part = decoders()[0].name
    trace, precision = reply.thinker, context.precision[part]
    assert trace is not None
    prompt = len(reply.inputs.token_ids)
    logits, hidden = _forced(context, part, trace.embeds, trace.positions, prompt)
    yield array_check(part, f"{name}: hidden states", hidden, trace.hidden, precision)
    check = array_check(part, f"{name}: logits step by step", logits, trace.logits, precision, logits=True)
    yield _judge_choices(check, logits.argmax(-1), trace.tokens, trace.logits, precision)


def talker_check(context: Context, name: str, reply: StagedReply, config: SamplingConfig) -> Iterator[Check]:
    """Logits of every step over the reference's rows, and what the runtime's sampler picks from them."""
    part = decoders()[1].name
    trace, precision = reply.talker, context.precision[part]
    codec = context.bundle.manifest.codec
    assert trace is not None
    assert codec is not None
    prompt = len(trace.history)
    logits, _ = _forced(context, part, trace.embeds, trace.positions, prompt)
    check = array_check(part, f"{name}: logits step by step", logits, trace.logits, precision, logits=True)
    if not np.isfinite(logits).all():
        yield check
        return
    sampler = Sampler(config, None, codec.suppress)
    seen = np.concatenate([trace.history, trace.codes])
    picks = [sampler.pick(row, seen[: prompt + k]) for k, row in enumerate(logits)]
    yield _judge_choices(check, np.asarray(picks), trace.codes, trace.scores, precision)


def _forced(
    context: Context, name: str, embeds: Floats, positions: NDArray[np.int64], prompt: int
) -> tuple[Floats, Floats]:
    """Prefill of ``prompt`` rows, then one row at a time: logits [n, V] and hidden [prompt + n - 1, H]."""
    graph = context.backend.graph(name)
    decoder = Decoder(graph, graph.new_cache(context.max_context))
    bounds = [0, *range(prompt, len(embeds) + 1)]
    steps = [decoder.forward(embeds[a:b], positions[:, a:b]) for a, b in itertools.pairwise(bounds)]
    hidden = [part for _, part in steps if part is not None]
    return np.stack([logits for logits, _ in steps]), np.concatenate(hidden) if hidden else np.zeros((0, 0), np.float32)


def _gap(scores: Floats, wanted: int, got: int) -> float:
    """By how many nats the reference prefers its own choice: the logarithm of how many times likelier it is.

    In standard deviations of the logits it would depend on how many tokens there are that are never said.
    """
    difference = float(scores[wanted]) - float(scores[got])
    return difference if np.isfinite(difference) else float("inf")


def _judge_choices(
    check: Check, got: NDArray[np.int64], wanted: NDArray[np.int64], scores: Floats, precision: str
) -> Check:
    """Add to a check how often the choice is the reference's, and the widest gap at which it is not."""
    gaps = [_gap(row, int(b), int(a)) for row, a, b in zip(scores, got, wanted, strict=True) if a != b]
    worst, allowed = max(gaps, default=0.0), limit("choice.gap", precision)
    check.figures |= {"choice_agreement": 1 - len(gaps) / len(wanted), "choice_gap": worst}
    check.limits["choice_gap"], check.reasons["choice_gap"] = allowed.value, allowed.reason
    if worst > allowed.value:
        check.status = FAIL
        said = f"the choice differs where the reference prefers its own by {worst:.3g} nats"
        check.message = "; ".join(filter(None, [check.message, f"{said}, at most {allowed.value:g} is allowed"]))
    return check


def decisions_check(name: str, pairs: Mapping[str, tuple[list[int], list[int]]]) -> Check:
    """Stop ids, penalty, suppression and choice over the very same logits: ids must be equal."""
    if not any(ids for pair in pairs.values() for ids in pair):
        return Check.not_run("end_to_end", name, "the reference's reply is empty: there is nothing to compare")
    found = Comparison("end_to_end", name)
    for kind, (got, wanted) in pairs.items():
        at = _parting(got, wanted)
        found.figures[f"{kind}_ids_equal"] = got == wanted
        if got != wanted:
            found.fault(
                f"{kind} ids differ from number {at} on: {got[at : at + 4]}, the reference {wanted[at : at + 4]}"
            )
    return found.check()


def _parting(got: Sequence[int], wanted: Sequence[int]) -> int:
    """Number of leading ids that are equal."""
    pairs = zip(got, wanted, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(got), len(wanted)))


def ids_check(
    name: str,
    got: list[int],
    wanted: list[int],
    scores: Floats,
    stop: Sequence[int],
    precision: str,
    codec: TextCodec | None = None,
) -> Check:
    """A greedy reply against the reference's: equal, or parted where the reference was undecided.

    Args:
        got, wanted: ids without stop ids. scores: the reference's [n, V], one row for each id and for its stop id.
        codec: to show the ids as text.
    """
    found = Comparison("end_to_end", name)
    at, allowed = _parting(got, wanted), found.bound("choice_gap", limit("choice.gap", precision))
    level = energy(scores[np.isfinite(scores)])
    figures = found.figures = {
        "energy": level,
        "count": len(wanted),
        "equal": at,
        "distinct": len(set(wanted)),
        "choice_gap": 0.0,
    }
    if not level > MIN_ENERGY:
        found.fault(f"the reference's logits are silent (RMS {level:.1e}), so they prove nothing")
    elif not got and not wanted:
        nothing = "the reference's reply is empty: there is nothing to compare"
        return msgspec.structs.replace(found.check(), status=NOT_RUN, message=nothing)
    elif got != wanted and at < len(scores):
        ends = max(stop, key=lambda token: float(scores[at][token]))
        theirs, ours = (ids[at] if at < len(ids) else ends for ids in (wanted, got))
        gap = _gap(scores[at], theirs, ours)
        figures |= {"choice_gap": gap, "first_difference": at}
        figures["tokens of the reference"] = _shown(wanted, at, codec)
        figures["tokens of the bundle"] = _shown(got, at, codec)
        if not gap <= allowed.value:
            found.fault(
                f"id number {at} is {ours}, the reference has {theirs} and prefers it by {gap:.3g} nats; "
                f"at most {allowed.value:g} is allowed"
            )
    elif got != wanted:
        found.fault(f"{len(got)} ids; the reference ends after {len(wanted)}")
    return found.check()


def _shown(ids: Sequence[int], at: int, codec: TextCodec | None) -> str:
    """Ids around the first difference, which is in brackets, with their text."""
    first = max(0, at - _SHOWN)
    parts = []
    for i, token in enumerate(ids[first : at + _SHOWN], first):
        part = str(token) if codec is None else f"{token} {codec.decode([token])!r}"
        parts.append(f"[{part}]" if i == at else part)
    return ("... " if first else "") + "  ".join(parts) + ("" if at < len(ids) else "  [end]")


def speech_parts(context: Context, name: str, reply: StagedReply, noise: Floats, own: Floats | None) -> Iterator[Check]:
    """DiT and solver over the reference's codes, the vocoder over its mel, and the waveform.

    Args:
        own: the reply's waveform, if its codes are the reference's; else the waveform is made of the reference's codes.
    """
    solve, wave = reply.solve, reply.waveform
    assert solve is not None
    assert wave is not None
    mel, forced = _to_sound(context, reply.codec_ids, noise)
    flow, vocoder = giving("velocity"), giving("wav")
    coarse = context.precision[flow.name]
    check = array_check(flow.name, f"{name}: mel", mel, solve.mel, coarse, rule="speech.mel.rel_rms")
    if check.status == FAIL and mel.shape == solve.mel.shape:
        check.stage = _blame(context, reply, noise, check.limits["rel_rms"])
    yield check
    feeds = {"mel": np.ascontiguousarray(solve.mel[None])}
    voiced = context.backend.graph(vocoder.name).run(feeds)[vocoder.output].reshape(-1)
    title, precision = f"{name}: waveform of the reference's mel", context.precision[vocoder.name]
    yield array_check(vocoder.name, title, voiced, wave, precision, rule="speech.wave.rel_rms")
    found = Comparison("end_to_end", f"{name}: waveform", context.coarsest((flow, vocoder)))
    found.require_signal(wave, "the reference's waveform")
    found.figures["codes"] = "the reference's" if own is None else "its own, which are equal"
    got = forced if own is None else own
    found.compare_waves(got, wave, "speech.wave")
    context.artifacts |= {f"{name}/reference": wave, f"{name}/whole": got}
    yield found.check({"reference": f"{name}/reference", "whole": f"{name}/whole"})


def _to_sound(context: Context, codes: Sequence[int], noise: Floats) -> tuple[Floats, Floats]:
    """Mel [80, T] and waveform of codes, in one window."""
    bundle, recording = context.bundle, RecordingBackend(context.backend)
    stream = NoiseStream(noise, np.random.default_rng(0), noise.shape[1])
    vocal = Token2Wav(recording, bundle, bundle.voice(), stream, window="whole")
    chunks = [samples for code in codes for samples in vocal.push(code)] + vocal.finish()
    mel: Floats = np.concatenate([call["mel"][0] for call in recording.graph(giving("wav").name).calls], axis=1)
    return mel, np.concatenate(chunks)


def _blame(context: Context, reply: StagedReply, noise: Floats, allowed: float) -> str:
    """The stage at fault for a wrong mel."""
    solver, solve = context.bundle.manifest.solver, reply.solve
    assert solver is not None
    assert solve is not None
    feeds = whole_feeds(context.bundle, reply.codec_ids)
    wanted = np.ascontiguousarray(solve.mel.T[None])
    stage = blame_mel(context.backend, solver, feeds, noise[None, : wanted.shape[1]], wanted, allowed)
    return "end_to_end" if stage == "speech" else stage
