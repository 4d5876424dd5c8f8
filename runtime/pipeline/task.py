"""Check a reply's options against the bundle, and make everything that its workers share."""

from __future__ import annotations

from dataclasses import dataclass

from ..backends.base import Backend
from ..backends.checked import CheckedBackend
from ..backends.guarded import GuardedBackend
from ..bundle.manifest import VoiceSpec
from ..bundle.parts import decoders, speech_parts
from ..bundle.reader import Bundle
from ..concurrency.cancel import CancelToken
from ..concurrency.owner import Owner
from ..concurrency.places import Place
from ..concurrency.shared import Shared
from ..concurrency.timing import Pace, StageTimer
from ..errors import UsageError
from ..generation.sampling import Sampler, validate_sampling
from ..generation.talker import Talker
from ..prompt.given_text import ids_to_say
from ..prompt.tokenizer import TextCodec
from ..reply_options import ReplyOptions
from ..speech.token2wav import NoiseStream, Token2Wav


@dataclass(frozen=True)
class SpeechTask:
    """What a spoken reply needs, checked."""

    talker: Talker
    voice: VoiceSpec
    sampler: Sampler
    token2wav: Token2Wav
    sample_rate: int


@dataclass(frozen=True, kw_only=True)
class ReplyTask:
    """How to reply, checked.

    Attributes:
        sampler: the thinker's.
        stop: thinker ids that end the reply. stop_strings: texts that do.
        tools: the reply may call some.
        given: the reply's tokens, where it is given and not generated.
        speech: None for a reply that is only read.
        reserve: tokens of the KV cache that shall be free for the reply; None: what the prompt leaves is enough.
        least: tokens without which there is no reply.
        threads: workers at once, each in its thread; False: one after the other in the caller's.
        owner: the process that works on it. place: among the replies that are made at once.
        exact: of a live turn, see `OmniSession.turn`.
    """

    bundle: Bundle
    codec: TextCodec
    backend: GuardedBackend
    token: CancelToken
    timer: StageTimer
    sampler: Sampler
    stop: tuple[int, ...]
    stop_strings: tuple[str, ...]
    tools: bool
    given: list[int]
    speech: SpeechTask | None
    reserve: int | None
    least: int
    threads: bool
    exact: bool
    owner: Owner
    place: Place


def make_task(
    bundle: Bundle,
    codec: TextCodec,
    backend: Backend,
    options: ReplyOptions,
    capacity: int,
    shared: Shared,
    *,
    run_limit: float | None = None,
) -> ReplyTask:
    """Check how a reply is asked for, and make what it takes.

    Args:
        capacity: tokens of the KV caches.
        run_limit: seconds that one run of a graph may take.

    Raises:
        UsageError, UnknownVoice: the bundle cannot reply like that. PromptError: nothing that can be said.
    """
    writer = decoders()[0].name
    bundle.require_graph(writer, "any reply")
    config = bundle.manifest.thinker_sampling if options.thinker is None else options.thinker
    validate_sampling(config, writer)
    timer, token = StageTimer(), CancelToken()
    guarded = GuardedBackend(CheckedBackend(backend, bundle.manifest.graphs, run_limit), token, timer)
    speech = _speech_task(bundle, guarded, options, timer, shared.pace) if options.speak else None
    given = [] if options.say is None else ids_to_say(options.say, codec)
    longest = max(len(given) or config.max_new_tokens, speech.sampler.config.max_new_tokens if speech else 0)
    least = max(len(given), 2 if speech else 1)  # the talker prefills two tokens more than the prompt has
    return ReplyTask(
        bundle=bundle,
        codec=codec,
        backend=guarded,
        token=token,
        timer=timer,
        sampler=Sampler(config, options.generators()[0]),
        stop=() if options.ignore_stop else bundle.manifest.chat.stop,
        stop_strings=() if given else options.stop_strings(),
        tools=bool(options.tools) and not given,
        given=given,
        speech=speech,
        reserve=max(least, min(longest, capacity // 4)),
        least=least,
        threads=options.threads,
        exact=options.exact,
        owner=shared.owner,
        place=Place(shared.places, token),
    )


def _speech_task(
    bundle: Bundle, backend: GuardedBackend, options: ReplyOptions, timer: StageTimer, pace: Pace
) -> SpeechTask:
    manifest = bundle.manifest
    if manifest.dit is None or manifest.vocoder is None or manifest.talker_sampling is None:
        raise UsageError(
            f"{bundle.root} cannot speak: it was exported from a checkpoint without talker. Ask for text with "
            "speak=False, or export a checkpoint that has one"
        )
    for part in speech_parts():
        bundle.require_graph(part.name, "speech")
    config = manifest.talker_sampling if options.talker is None else options.talker
    validate_sampling(config, "talker")
    voice = bundle.voice(options.voice)
    _, sampling, drawn = options.generators()
    noise = NoiseStream(options.noise, drawn, manifest.dit.mel_dim)
    token2wav = Token2Wav(
        backend, bundle, voice, noise, window=options.window, solver=options.solver, timer=timer, pace=pace
    )
    talker = Talker(bundle, ignore_stop=options.ignore_stop)
    return SpeechTask(talker, voice.spec, talker.sampler(config, sampling), token2wav, manifest.vocoder.sample_rate)
