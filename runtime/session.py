"""OmniSession: an open bundle with its conversation; begins live turns and one-off replies."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends import open_backend
from .backends.base import Backend, KvCache, most_context
from .bundle.manifest import Manifest, SamplingConfig
from .bundle.parts import encoder_of, speech_parts
from .bundle.reader import Bundle
from .concurrency.cancel import CancelToken, GuardedBackend
from .concurrency.timing import StageTimer
from .errors import UsageError
from .events import Event, Stats
from .generation.conversation import Conversation
from .generation.sampling import validate_sampling
from .generation.talker import Talker
from .generation.thinker import embed_media, require_room
from .pipeline.reply import Reply, ReplyTask
from .pipeline.workers import SpeechTask
from .prompt.builder import Prompt, build_prompt
from .prompt.positions import Layout, Segment
from .prompt.tokenizer import TextCodec
from .speech.ode import Solver
from .speech.token2wav import NoiseStream, Token2Wav, Window
from .turn import Turn


class OmniSession:
    """A bundle opened with a backend.

    A session holds one conversation, turn by turn (``turn``), whose KV caches are kept, and answers conversations that
    are given whole (``reply``), each with caches of its own that are used again when it ends, fails or is abandoned.
    Graphs are loaded when first used and kept; ``fork`` gives another session that shares them.

    One turn is open at a time. Its methods, and ``reply``, may be called from any thread.
    """

    def __init__(self, bundle: Bundle, backend: Backend, *, max_context: int | None = None) -> None:
        self.bundle = bundle
        self.max_context = _context(max_context, most_context(backend, bundle.manifest.kv.max_context))
        self.text_codec = TextCodec.from_file(bundle.path(bundle.manifest.tokenizer_file), bundle.manifest.tokens)
        self._backend: Backend | None = backend
        self._shared = _Shared()
        self._lock = threading.Lock()
        self._idle: dict[str, list[KvCache]] = {}
        self._conversation: Conversation | None = None
        self._system: str | None = None
        self._turn: Turn | None = None
        self._replies: weakref.WeakSet[Reply] = weakref.WeakSet()

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        backend: str = "auto",
        *,
        verify: bool = False,
        threads: int | None = None,
        max_context: int | None = None,
    ) -> OmniSession:
        """Open a bundle.

        Args:
            path: bundle folder.
            backend: auto, ort-cpu, ort-cuda, ort-tensorrt-rtx, tensorrt or tensorrt-rtx.
            verify: also compare every file's sha256.
            threads: CPU threads of one operator; the physical cores if None.
            max_context: tokens that a conversation and its reply may take, at most what the bundle was exported for, or
                its engines were built for, which it is if None. Fewer take less memory.

        Raises:
            UsageError: ``max_context`` is out of range.
            BundleError: the bundle cannot be used. BackendError: the backend cannot run it here.
        """
        bundle = Bundle.open(path, verify=verify)
        _context(max_context, bundle.manifest.kv.max_context)
        return cls(bundle, open_backend(backend, bundle, threads=threads), max_context=max_context)

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
        """Cancel what is under way, and release caches, and graphs with the last session that shares them.

        Closing twice does nothing.
        """
        if self._backend is None:
            return
        if self._turn is not None:
            self._turn.cancel()
        for reply in tuple(self._replies):
            reply.cancel()
        backend, self._backend, self._conversation = self._backend, None, None
        self._idle.clear()
        if self._shared.leave():
            backend.close()

    def load(self) -> None:
        """Load every graph now. Otherwise each is loaded when it is first used, which the first reply waits for."""
        for name in self.manifest.graphs:
            self.backend.graph(name)

    def fork(self) -> OmniSession:
        """Another session, with a conversation of its own, over the same graphs: weights are in memory once."""
        other = OmniSession(self.bundle, self.backend, max_context=self.max_context)
        other._shared = self._shared.join()
        return other

    def reset(self, system: str | None = None) -> None:
        """Begin a new conversation.

        Args:
            system: its system message; None is the one that the talker was trained with.

        Raises:
            UsageError: a turn is open.
        """
        with self._lock:
            self._require_no_turn()
            if self._conversation is not None:
                self._conversation.clear()
            self._system = system

    def turn(
        self,
        voice: str | None = None,
        speak: bool = True,
        *,
        thinker: SamplingConfig | None = None,
        talker: SamplingConfig | None = None,
        seed: int = 0,
        noise: NDArray[np.float32] | None = None,
        window: Window = "stream",
        solver: Solver = "rk4",
        exact: bool = False,
        threads: bool = True,
    ) -> Turn:
        """Begin the next turn of the session's conversation.

        Args:
            voice, speak, thinker, talker, seed, noise, window, solver, threads: as in ``reply``.
            exact: Whisper's log-mel is floored at its loudest moment in the whole clip, which is not known before the
                clip ends. Live sound is floored at the loudest moment so far; True encodes again, on commit, what the
                final floor changes, and prefills again from there on.

        Raises:
            UsageError, UnknownVoice: bad options, or a turn that is still open.
        """
        with self._lock:
            self._require_no_turn()
            self._require_graph("thinker", "any reply")
            task = self._task(voice, speak, thinker, talker, seed, noise, window, solver, threads)
            conversation = self._conversation or Conversation(self.bundle, self._new_cache, self.max_context)
            self._conversation = conversation
            conversation.use(task.backend, task.timer)
            if not conversation.length:
                conversation.add(self._opening())
            stats = Stats(backend=self.backend.name)
            self._turn = Turn(task, conversation, stats, exact, self._require_encoder, self._turn_ended)
            return self._turn

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
        threads: bool = True,
        solver: Solver = "rk4",
    ) -> Iterator[Event]:
        """Answer a conversation that is given whole, apart from the session's own.

        Everything is checked and all media are read before this returns; computing starts with the first ``next``.
        Thinker, talker and noise draw from separate streams of ``seed``, so one does not change another.

        Args:
            messages: chat messages, see ``build_prompt``.
            speak: also say the reply. False for a bundle that cannot speak.
            voice: a voice of the bundle; None is Chelsie if she is there, else the first.
            thinker, talker: sampling; the bundle's defaults if None.
            noise: float32 [T, 80], the speech's starting noise, T at least 2 for every codec token; drawn if None.
            window: ``stream`` gives sound in small windows, ``whole`` all at once at the end, as the reference does; or
                windows of one's own, see ``SpeechWindows``.
            threads: thinker, talker and token2wav at once, each in a thread; False runs them one after the other in the
                caller's thread. The result is the same.
            solver: ``rk4`` as the reference does; ``midpoint`` takes half the time, ``euler`` a quarter, less exactly.

        Yields:
            TextDelta and AudioChunk as they come, then one Done. An iterator that is closed or dropped stops the work.

        Raises:
            UsageError, UnknownVoice, PromptError, MediaError: at once, before any computing.
        """
        started = time.perf_counter()
        task = self._task(voice, speak, thinker, talker, seed, noise, window, solver, threads)
        with task.timer("preprocess"):
            prompt = build_prompt(messages, self.manifest, self.text_codec)
        # The talker prefills two rows more than the prompt has.
        require_room(len(prompt.token_ids), self.max_context, reply=2 if speak else 1)
        for span in prompt.media:
            self._require_graph(encoder_of(span.kind).name, f"the {span.kind}")
        self._require_graph("thinker", "any reply")
        return self._one_off(task, prompt, started)

    def _one_off(self, task: ReplyTask, prompt: Prompt, started: float) -> Iterator[Event]:
        """Answer with caches that are borrowed for this reply."""
        borrowed: list[tuple[str, KvCache]] = []

        def borrow(name: str) -> KvCache:
            with self._lock:
                idle = self._idle.setdefault(name, [])
                cache = idle.pop() if idle else self._new_cache(name)
            borrowed.append((name, cache))
            return cache

        def give_back() -> None:
            with self._lock:
                for name, cache in borrowed:
                    self._idle.setdefault(name, []).append(cache)
            borrowed.clear()
            self._replies.discard(reply)

        conversation = Conversation(self.bundle, borrow, self.max_context)

        def prepare() -> None:
            conversation.use(task.backend, task.timer)
            conversation.begin_turn()
            rows = [embed_media(span, task.backend, task.timer) for span in prompt.media]
            places = np.concatenate([np.zeros(0, np.int64), *(span.positions for span in prompt.media)])
            order = np.argsort(places)
            conversation.add(
                Segment(
                    prompt.token_ids,
                    prompt.position_ids,
                    prompt.next_position,
                    places[order],
                    np.concatenate(rows)[order] if rows else None,
                )
            )

        reply = Reply(task, conversation, Stats(backend=task.backend.name), started, 0, prepare, give_back)
        self._replies.add(reply)
        return reply.events()

    def _task(
        self,
        voice: str | None,
        speak: bool,
        thinker: SamplingConfig | None,
        talker: SamplingConfig | None,
        seed: int,
        noise: NDArray[np.float32] | None,
        window: Window,
        solver: Solver,
        threads: bool,
    ) -> ReplyTask:
        """Check how a reply is asked for."""
        config = self.manifest.thinker_sampling if thinker is None else thinker
        validate_sampling(config, "thinker")
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise UsageError(f"seed is {seed!r}; a whole number of at least 0 was expected")
        streams = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3)]
        timer, token = StageTimer(), CancelToken()
        backend = GuardedBackend(self.backend, token, timer)
        asked = (voice, talker, streams[1:], noise, window, solver)
        speech = self._speech(backend, timer, *asked) if speak else None
        longest = max(config.max_new_tokens, speech.sampler.config.max_new_tokens if speech else 0)
        reserve = min(longest, self.max_context // 4)
        return ReplyTask(
            self.bundle, self.text_codec, backend, token, config, streams[0], speech, reserve, threads, timer
        )

    def _speech(
        self,
        backend: Backend,
        timer: StageTimer,
        voice: str | None,
        config: SamplingConfig | None,
        streams: list[np.random.Generator],
        noise: NDArray[np.float32] | None,
        window: Window,
        solver: Solver,
    ) -> SpeechTask:
        manifest = self.manifest
        if manifest.dit is None or manifest.vocoder is None or manifest.talker_sampling is None:
            raise UsageError(
                f"{self.bundle.root} cannot speak: it was exported from a checkpoint without talker. Ask for text with "
                "speak=False, or export a checkpoint that has one"
            )
        for part in speech_parts():
            self._require_graph(part.name, "speech")
        config = manifest.talker_sampling if config is None else config
        validate_sampling(config, "talker")
        spec, speaker, reference = self.bundle.voice(voice)
        source = NoiseStream(noise, streams[1], manifest.dit.mel_dim)
        token2wav = Token2Wav(backend, self.bundle, speaker, reference, source, window, timer, solver)
        talker = Talker(self.bundle)
        return SpeechTask(talker, spec, talker.sampler(config, streams[0]), token2wav, manifest.vocoder.sample_rate)

    def _require_graph(self, name: str, purpose: str) -> None:
        if name not in self.manifest.graphs:
            raise UsageError(
                f"{purpose} needs the graph {name!r}, which {self.bundle.root} does not have (it has "
                f"{', '.join(self.manifest.graphs)}): export it again with this graph"
            )

    def _require_encoder(self, kind: str) -> None:
        self._require_graph(encoder_of(kind).name, "sound" if kind == "audio" else "a picture")

    def _require_no_turn(self) -> None:
        if self._turn is not None:
            raise UsageError("a turn is still open: take its events to the end, or cancel it, before the next begins")

    def _turn_ended(self) -> None:
        self._turn = None

    def _new_cache(self, name: str) -> KvCache:
        return self.backend.graph(name).new_cache(self.max_context)

    def _opening(self) -> Segment:
        """The system message."""
        manifest = self.manifest
        layout = Layout(manifest, self.text_codec)
        layout.control(manifest.tokens.im_start)
        layout.text(f"system\n{manifest.chat.system_prompt if self._system is None else self._system}")
        layout.control(manifest.tokens.im_end)
        layout.text("\n")
        layout.flush()
        ids, positions = layout.take()
        return Segment(ids, positions, layout.cursor)


def _context(asked: int | None, exported: int) -> int:
    """Capacity of the KV caches.

    Raises:
        UsageError: more than the bundle was exported or its engines were built for, or no number of tokens.
    """
    if asked is None:
        return exported
    if not isinstance(asked, int) or isinstance(asked, bool) or not 1 <= asked <= exported:
        raise UsageError(
            f"max_context is {asked!r}; 1 to {exported} tokens were expected, what the bundle was exported for or its "
            "engines were built for. Export or build with a larger --max-context for more"
        )
    return asked


class _Shared:
    """Counts the sessions over one backend."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 1

    def join(self) -> _Shared:
        with self._lock:
            self._count += 1
        return self

    def leave(self) -> bool:
        """True for the last one."""
        with self._lock:
            self._count -= 1
            return not self._count
