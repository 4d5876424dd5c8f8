"""OmniSession: messages in, a stream of text and speech out.

A reply is a chain of stages that pull from each other: each thinker token that is consumed gives the talker one row,
each row gives at most one codec token, and token2wav turns codec tokens into samples as soon as a window is full. So
text leaves at once, and sound leaves before thinker and talker have finished.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends import open_backend
from .backends.base import Backend, KvCache
from .bundle import Bundle
from .errors import UsageError
from .events import AudioChunk, Done, Event, Stats, TextDelta
from .graphs import SPEECH_GRAPHS
from .manifest import Manifest, SamplingConfig, VoiceSpec
from .prompt import Prompt, build_prompt
from .sampling import validate_sampling
from .talker import Talker
from .text import TextCodec
from .thinker import Thinker, ThinkerRun, require_room
from .timing import StageTimer
from .token2wav import WINDOWS, NoiseStream, Token2Wav, Window

__all__ = ["OmniSession"]


@dataclass(frozen=True)
class _Speech:
    """What a spoken reply needs, checked."""

    voice: VoiceSpec
    config: SamplingConfig
    rng: np.random.Generator
    token2wav: Token2Wav


@dataclass(frozen=True)
class _Plan:
    """A reply whose inputs have been checked and whose prompt is laid out."""

    prompt: Prompt
    config: SamplingConfig
    rng: np.random.Generator
    speech: _Speech | None
    stats: Stats
    timer: StageTimer
    started: float


class OmniSession:
    """A bundle opened with a backend.

    Graphs are loaded when first used and kept. Replies do not share state: a KV cache belongs to one reply at a time,
    and goes back to the session when the reply ends, fails or is abandoned. Not for use from several threads at once.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle = bundle
        self._backend: Backend | None = backend
        self.text_codec = TextCodec.from_file(bundle.path(bundle.manifest.tokenizer_file), bundle.manifest.tokens)
        self._caches: dict[str, list[KvCache]] = {}

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        backend: str = "auto",
        *,
        verify: bool = False,
        threads: int | None = None,
    ) -> OmniSession:
        """Open a bundle.

        Args:
            path: bundle folder.
            backend: auto, ort-cpu, ort-cuda, tensorrt or tensorrt-rtx.
            verify: also compare every file's sha256.
            threads: CPU threads of one operator; the physical cores if None.

        Raises:
            BundleError: the bundle cannot be used. BackendError: the backend cannot run it here.
        """
        bundle = Bundle.open(path, verify=verify)
        return cls(bundle, open_backend(backend, bundle, threads=threads))

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.bundle.manifest

    @property
    def backend(self) -> Backend:
        """The backend.

        Raises:
            UsageError: the session is closed.
        """
        if self._backend is None:
            raise UsageError("the session is closed; open another one with OmniSession.open(...)")
        return self._backend

    def __enter__(self) -> OmniSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release graphs and caches. Closing twice does nothing."""
        self._caches.clear()
        if self._backend is not None:
            self._backend.close()
            self._backend = None

    def reply(
        self,
        messages: Sequence[Mapping[str, Any]],
        speak: bool = True,
        voice: str | None = None,
        thinker: SamplingConfig | None = None,
        talker: SamplingConfig | None = None,
        seed: int = 0,
        noise: NDArray[np.float32] | None = None,
        window: Window = "stream",
    ) -> Iterator[Event]:
        """Answer a conversation.

        Everything is checked and all media are read before this returns; computing starts with the first ``next``.
        Thinker, talker and noise draw from separate streams of ``seed``, so one does not change another.

        Args:
            messages: chat messages, see ``build_prompt``.
            speak: also say the reply. False for a bundle that cannot speak.
            voice: a voice of the bundle; None is Chelsie if she is there, else the first.
            thinker, talker: sampling; the bundle's defaults if None.
            noise: float32 [T, 80], the speech's starting noise, T at least 2 for every codec token; drawn if None.
            window: ``stream`` gives sound in small windows, ``whole`` all at once at the end, as the reference does.

        Yields:
            TextDelta and AudioChunk as they come, then one Done.

        Raises:
            UsageError, UnknownVoice, PromptError, MediaError: at once, before any computing.
        """
        started = time.perf_counter()
        backend, manifest = self.backend, self.manifest
        config = manifest.thinker_sampling if thinker is None else thinker
        validate_sampling(config, "thinker")
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise UsageError(f"seed is {seed!r}; a whole number of at least 0 was expected")
        streams = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3)]
        timer = StageTimer()
        speech = self._plan_speech(voice, talker, streams, noise, window, timer) if speak else None
        with timer("preprocess"):
            prompt = build_prompt(messages, manifest, self.text_codec)
        # The talker prefills two rows more than the prompt has.
        require_room(len(prompt.token_ids), manifest.kv.max_context, reply=2 if speak else 1)
        for span in prompt.media:
            self._require_graph("audio_encoder" if span.kind == "audio" else "vision_encoder", f"the {span.kind}")
        self._require_graph("thinker", "any reply")
        stats = Stats(backend=backend.name, prompt_tokens=len(prompt.token_ids), busy=timer.busy)
        return _Reply(self, _Plan(prompt, config, streams[0], speech, stats, timer, started)).events()

    def _plan_speech(
        self,
        voice: str | None,
        config: SamplingConfig | None,
        streams: list[np.random.Generator],
        noise: NDArray[np.float32] | None,
        window: Window,
        timer: StageTimer,
    ) -> _Speech:
        manifest, backend = self.manifest, self.backend
        if manifest.talker is None or manifest.dit is None or manifest.talker_sampling is None:
            raise UsageError(
                f"{self.bundle.root} cannot speak: it was exported from a checkpoint without talker. Ask for text with "
                "speak=False, or export a checkpoint that has one"
            )
        for name in SPEECH_GRAPHS:
            self._require_graph(name, "speech")
        if window not in WINDOWS:
            raise UsageError(f"window is {window!r}; one of {', '.join(WINDOWS)} was expected")
        config = manifest.talker_sampling if config is None else config
        validate_sampling(config, "talker")
        spec, speaker, reference = self.bundle.voice(voice)
        source = NoiseStream(noise, streams[2], manifest.dit.mel_dim)
        token2wav = Token2Wav(backend, self.bundle, speaker, reference, source, window, timer)
        return _Speech(spec, config, streams[1], token2wav)

    def _require_graph(self, name: str, purpose: str) -> None:
        if name not in self.manifest.graphs:
            raise UsageError(
                f"{purpose} needs the graph {name!r}, which {self.bundle.root} does not have (it has "
                f"{', '.join(self.manifest.graphs)}): export it again with this graph"
            )

    @contextmanager
    def cache(self, name: str) -> Iterator[KvCache]:
        """A KV cache of graph ``name`` for one reply, from the session's idle ones where there is one."""
        idle = self._caches.setdefault(name, [])
        cache = idle.pop() if idle else self.backend.graph(name).new_cache(self.manifest.kv.max_context)
        try:
            yield cache
        finally:
            idle.append(cache)


class _Rows(Iterator[NDArray[np.float32]]):
    """Reply rows on their way from thinker to talker."""

    def __init__(self) -> None:
        self.waiting: deque[NDArray[np.float32]] = deque()
        self.closed = False

    def __next__(self) -> NDArray[np.float32]:
        if self.waiting:
            return self.waiting.popleft()
        assert self.closed, "the talker runs only when a row waits or no more will come"
        raise StopIteration


class _Reply:
    """One reply in progress."""

    def __init__(self, session: OmniSession, plan: _Plan) -> None:
        self._session = session
        self._plan = plan
        self._stats = plan.stats
        self._token_ids: list[int] = []
        self._codec_ids: list[int] = []
        self._rows = _Rows()
        self._codes: Iterator[int] | None = None  # None before the talker starts and after it has ended
        self._chunks = 0
        self._samples = 0

    def events(self) -> Iterator[Event]:
        """Run to the end, yielding events."""
        session, plan = self._session, self._plan
        text: list[str] = []
        spoken = False
        stream = session.text_codec.stream()
        with ExitStack() as stack:
            thinker = Thinker(session.backend, session.bundle)
            cache = self._cache("thinker", stack)
            run = thinker.start(plan.prompt, plan.config, plan.rng, cache, plan.timer)
            for step in run.steps():
                if not step.stop:
                    self._token_ids.append(step.token_id)
                delta = "" if step.stop else stream.push(step.token_id)
                if step.last:  # a character that is left unfinished comes out as U+FFFD
                    delta += stream.flush()
                if delta or not step.stop:
                    text.append(delta)
                    yield self._text(delta, step.token_id)
                if step.row is not None and plan.speech is not None:
                    self._rows.waiting.append(step.row)
                    if not spoken:
                        spoken, self._codes = True, self._start_talker(run, plan.speech, stack)
                    if self._codes is not None:
                        yield from self._next_code()
            self._rows.closed = True
            while self._codes is not None:
                yield from self._next_code()
        yield self._done("".join(text))

    def _start_talker(self, run: ThinkerRun, speech: _Speech, stack: ExitStack) -> Iterator[int]:
        session, plan = self._session, self._plan
        return Talker(session.backend, session.bundle).codes(
            run.prompt_rows,
            plan.prompt.position_ids,
            self._rows,
            speech.voice,
            speech.config,
            speech.rng,
            self._cache("talker", stack),
            plan.timer,
        )

    def _cache(self, name: str, stack: ExitStack) -> KvCache:
        with self._plan.timer("load"):
            return stack.enter_context(self._session.cache(name))

    def _next_code(self) -> Iterator[AudioChunk]:
        assert self._codes is not None
        assert self._plan.speech is not None
        code = next(self._codes, None)
        if code is None:
            self._codes = None
            ready = self._plan.speech.token2wav.finish()
        else:
            self._codec_ids.append(code)
            ready = self._plan.speech.token2wav.push(code)
        for samples in ready:
            yield self._audio(samples)

    def _text(self, delta: str, token_id: int) -> TextDelta:
        if self._stats.time_to_first_token is None:
            self._stats.time_to_first_token = self._elapsed()
        return TextDelta(delta, token_id)

    def _audio(self, samples: NDArray[np.float32]) -> AudioChunk:
        vocoder = self._session.manifest.vocoder
        assert vocoder is not None
        if self._stats.time_to_first_audio is None:
            self._stats.time_to_first_audio = self._elapsed()
        self._samples += len(samples)
        self._stats.audio_seconds = self._samples / vocoder.sample_rate
        self._chunks += 1
        return AudioChunk(samples, vocoder.sample_rate, self._chunks - 1)

    def _done(self, text: str) -> Done:
        stats = self._stats
        stats.text_tokens, stats.codec_tokens = len(self._token_ids), len(self._codec_ids)
        stats.total_time = self._elapsed()
        if stats.audio_seconds:
            computing = sum(seconds for stage, seconds in stats.busy.items() if stage != "load")
            stats.real_time_factor = computing / stats.audio_seconds
        return Done(text, self._token_ids, self._codec_ids, stats)

    def _elapsed(self) -> float:
        return time.perf_counter() - self._plan.started
