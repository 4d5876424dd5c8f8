"""Check whole greedy conversations against the reference's, computed part by part.

Each conversation runs twice. First the session runs with the reference's results in place of every graph, so any
difference comes from the host code (stages ``positions``, ``conditioning``, ``solver``). Then the backend runs: each
decoder over the reference's tokens (teacher forcing), the DiT and the vocoder over the reference's codes, and last the
complete reply that a user gets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from omniport.runtime.backends.base import Backend
from omniport.runtime.bundle.manifest import Manifest, SamplingConfig
from omniport.runtime.bundle.parts import PARTS, decoders, encoder_of, giving
from omniport.runtime.errors import BackendError, OmniportError
from omniport.runtime.events import AudioChunk, Done
from omniport.runtime.prompt.tokenizer import TextCodec
from omniport.runtime.session import OmniSession
from omniport.runtime.system.files import scratch_folder

from ...evaluation.conversations import Conversation, read_conversations, standard_conversations
from ...evaluation.recording import RecordingBackend, ReplayBackend, consumed
from ..comparison import array_check, equal_check
from ..context import Context
from ..reference_inputs import Inputs, open_processor
from ..reference_reply import ReplyLimits, StagedReply, staged_replies
from ..reference_speech import Floats
from ..types import PASS, Check
from .forced import decisions_check, ids_check, speech_parts, talker_check, thinker_checks
from .preprocessing import prompt_checks
from .solver import known_flow_check, trajectory_checks

_QUICK = ("text", "audio and image")
_FULL = ("text", "audio", "image", "video", "video with sound", "mixed")
#: text and codec tokens of a reply
_LENGTHS = {"quick": (6, 18), "full": (12, 36)}
#: what broken host code raises: our own errors, and numpy's when arrays do not fit together
_HOST_ERRORS = (OmniportError, ValueError, IndexError, RuntimeError, AssertionError)


@dataclass(frozen=True)
class _Settings:
    """How the replies are made. ``voice`` is None for a bundle that cannot speak."""

    voice: str | None
    noise: Floats
    thinker: SamplingConfig
    talker: SamplingConfig


@dataclass(frozen=True)
class _Said:
    done: Done
    wave: Floats


def end_to_end_checks(context: Context, data: Path | None = None) -> Iterator[Check]:
    """Replies to conversations of every modality.

    Args:
        data: the user's conversations (see ``read_conversations``), checked like the built-in ones.

    Raises:
        UsageError: ``data`` cannot be used; names the line.
    """
    manifest = context.bundle.manifest
    settings = _settings(context)
    codec = TextCodec.from_file(context.bundle.path(manifest.tokenizer_file), manifest.tokens)
    own = [] if data is None else read_conversations(data, manifest, codec)
    processor = open_processor(context.checkpoint, context.bundle.manifest.vision)
    with scratch_folder() as folder:
        conversations = [*standard_conversations(folder, _FULL if context.full else _QUICK), *own]
        able, inputs = [], []
        for conversation in conversations:
            given = None if conversation.unsupported else processor.inputs(conversation)
            reason = conversation.unsupported if given is None else _no_room(context, given, settings)
            if given is None or reason:
                yield Check.not_run("end_to_end", conversation.name, reason)
            else:
                able.append(conversation)
                inputs.append(given)
        limits = ReplyLimits(
            settings.thinker.max_new_tokens,
            settings.talker.max_new_tokens,
            manifest.chat.stop,
            voice=settings.voice,
            repetition_penalty=settings.talker.repetition_penalty,
        )
        replies = staged_replies(context.reference, inputs, limits, settings.noise, context.progress)
        if settings.voice is not None:
            yield known_flow_check(context.bundle)
        for conversation, reply in zip(able, replies, strict=True):
            if conversation.where:
                yield from prompt_checks(context, conversation, reply.inputs)
            context.progress(f"end to end: {conversation.name}, host code")
            yield from _replayed(context, conversation, reply, settings)
        missing = _unavailable(context, settings)
        if missing is not None:
            yield missing
            return
        for conversation, reply in zip(able, replies, strict=True):
            context.progress(f"end to end: {conversation.name}")
            yield from _answered(context, conversation, reply, settings)


def _settings(context: Context) -> _Settings:
    manifest = context.bundle.manifest
    text, codes = _LENGTHS[context.suite]
    speaks = manifest.speaks and bool(manifest.voices)
    voice = context.bundle.find_voice().name if speaks else None
    shape = (0, 0) if manifest.dit is None else (codes * manifest.dit.repeats, manifest.dit.mel_dim)
    return _Settings(
        voice,
        np.random.default_rng(7).standard_normal(shape).astype(np.float32),
        SamplingConfig(max_new_tokens=text),
        SamplingConfig(max_new_tokens=codes, repetition_penalty=1.05),
    )


def _no_room(context: Context, inputs: Inputs, settings: _Settings) -> str:
    """Why the bundle's KV cache cannot take a conversation and its reply; empty if it can."""
    reply = max(settings.thinker.max_new_tokens, settings.talker.max_new_tokens) + 2
    needed, capacity = len(inputs.token_ids) + reply, context.max_context
    return "" if needed <= capacity else f"prompt and reply take {needed} tokens, the KV cache holds {capacity}"


def _unavailable(context: Context, settings: _Settings) -> Check | None:
    """Load every graph that a reply needs; the check that says why one cannot be had."""
    wanted = [name for name in context.bundle.manifest.graphs if settings.voice or not PARTS[name].speaks]
    for name in wanted:
        try:
            context.backend.graph(name)
        except BackendError as error:
            return Check.not_run("end_to_end", "replies", f"{name}: {error}")
        except OmniportError as error:
            return Check.failed(name, "load", str(error))
    return None


def _say(context: Context, backend: Backend, conversation: Conversation, settings: _Settings) -> _Said:
    """The reply that the runtime gives over a backend; codes to sound in one window, as the reference does."""
    session = OmniSession(context.bundle, backend)
    events = list(
        session.reply(
            conversation.messages(),
            speak=settings.voice is not None,
            voice=settings.voice,
            thinker=settings.thinker,
            talker=settings.talker,
            noise=settings.noise if settings.voice is not None else None,
            window="whole",
            threads=False,  # graphs take turns in memory
        )
    )
    done = events[-1]
    assert isinstance(done, Done)
    sound = [event.samples for event in events if isinstance(event, AudioChunk)]
    return _Said(done, np.concatenate(sound) if sound else np.zeros(0, np.float32))


def _replayed(context: Context, conversation: Conversation, reply: StagedReply, settings: _Settings) -> Iterator[Check]:
    """The host code between the graphs, fed with the reference's results."""
    name, manifest = conversation.name, context.bundle.manifest
    backend = ReplayBackend(reply, manifest)
    try:
        said = _say(context, backend, conversation, settings)
    except _HOST_ERRORS as error:
        message = f"the runtime broke down over the reference's own results: {type(error).__name__}: {error}"
        yield Check.failed("conditioning", f"{name}: host code", message)
        return
    for graph, trace in zip((part.name for part in decoders()), (reply.thinker, reply.talker), strict=True):
        if trace is None:
            continue
        if not backend.graph(graph).calls:
            yield Check.failed("conditioning", f"{name}: rows into the {graph}", f"the {graph} was never run")
            continue
        rows, positions = consumed(backend.graph(graph))
        yield equal_check("positions", f"{name}: every step of the {graph}", positions, trace.positions)
        title = f"{name}: rows into the {graph}"
        yield _with_place(
            array_check("conditioning", title, rows, trace.embeds, rule="conditioning.rel_rms"),
            rows,
            trace.embeds,
            reply,
        )
    yield decisions_check(
        f"{name}: choices from the reference's logits",
        {"token": (said.done.token_ids, reply.token_ids), "codec": (said.done.codec_ids, reply.codec_ids)},
    )
    vocoder = backend.graph(giving("wav").name)
    if reply.solve is not None and vocoder.calls:
        flow = backend.graph(giving("velocity").name)
        yield from trajectory_checks(name, flow, vocoder.calls[0]["mel"][0], reply.solve, manifest)


def _with_place(check: Check, rows: Floats, wanted: Floats, reply: StagedReply) -> Check:
    """Say which rows of a failed check differ: those of media, of other prompt tokens, or of the reply."""
    if check.status == PASS or rows.shape != wanted.shape:
        return check
    prompt = len(reply.inputs.token_ids)
    off = np.abs(rows - wanted).max(axis=1) > 1e-4 * np.abs(wanted).max()
    media = np.zeros(len(off), np.bool_)
    media[:prompt] = np.isin(reply.inputs.token_ids, reply.inputs.media_ids)
    inside = np.arange(len(off)) < prompt
    counts = {"of media": media, "of other prompt tokens": inside & ~media, "of the reply": ~inside}
    found = [f"{int((off & mask).sum())} of {int(mask.sum())} rows {what}" for what, mask in counts.items()]
    check.message += f"; {', '.join(found)} differ"
    return check


def _answered(context: Context, conversation: Conversation, reply: StagedReply, settings: _Settings) -> Iterator[Check]:
    """The backend's graphs over the reference's tokens, then the reply as it is."""
    name = conversation.name
    try:
        yield from thinker_checks(context, name, reply)
        if reply.talker is not None:
            yield from talker_check(context, name, reply, settings.talker)
        recording = RecordingBackend(context.backend)
        said = _say(context, recording, conversation, settings)
    except _HOST_ERRORS as error:
        yield Check.failed("end_to_end", f"{name}: reply", f"the runtime gave no reply: {error}")
        return
    yield from _media_rows(context, name, recording, reply)
    yield from _reply_ids(context, name, said, reply)
    if reply.waveform is not None:
        own = said.wave if said.done.codec_ids == reply.codec_ids else None
        yield from speech_parts(context, name, reply, settings.noise, own)


def _reply_ids(context: Context, name: str, said: _Said, reply: StagedReply) -> Iterator[Check]:
    trace, codec = reply.thinker, _codec(context)
    assert trace is not None
    text = context.coarsest([part for part in PARTS.values() if not part.speaks])
    got, wanted = said.done.token_ids, reply.token_ids
    yield ids_check(f"{name}: token ids", got, wanted, trace.logits, context.bundle.manifest.chat.stop, text, codec)
    if reply.talker is None:
        return
    if got != wanted and text != "float32":
        message = "the text differs, as its precision allows, so the speech does; see the talker over the same rows"
        yield Check.not_run("end_to_end", f"{name}: codec ids", message)
        return
    precision = context.coarsest([part for part in PARTS.values() if part.decodes or not part.speaks])
    manifest: Manifest = context.bundle.manifest
    stop = () if manifest.codec is None else manifest.codec.stop
    codes = said.done.codec_ids, reply.codec_ids
    yield ids_check(f"{name}: codec ids", *codes, reply.talker.scores, stop, precision)


def _media_rows(context: Context, name: str, recording: RecordingBackend, reply: StagedReply) -> Iterator[Check]:
    """The encoders' rows in the prompt, as the backend made them."""
    trace = reply.thinker
    assert trace is not None
    rows, _ = consumed(recording.graph(decoders()[0].name))
    prompt = len(reply.inputs.token_ids)
    for kind, token in zip(("audio", "image", "video"), reply.inputs.media_ids, strict=True):
        graph = encoder_of(kind).name
        mask: NDArray[np.bool_] = reply.inputs.token_ids == token
        if mask.any() and len(rows) >= prompt:
            pair = rows[:prompt][mask], trace.embeds[:prompt][mask]
            yield array_check(graph, f"{name}: rows of {kind}", *pair, context.precision[graph])


def _codec(context: Context) -> TextCodec:
    manifest = context.bundle.manifest
    return TextCodec.from_file(context.bundle.path(manifest.tokenizer_file), manifest.tokens)
