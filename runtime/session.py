"""OmniSession: an open bundle with its conversation; begins live turns and one-off replies."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends import open_backend
from .backends.base import Backend, KvCache
from .backends.checked import CheckedBackend
from .backends.guarded import GuardedBackend
from .bundle.geometry import check_shapes
from .bundle.manifest import Manifest, SamplingConfig
from .bundle.reader import Bundle
from .concurrency.at_exit import close_at_exit
from .concurrency.cancel import CancelToken
from .concurrency.places import Places
from .concurrency.shared import Shared
from .concurrency.timing import StageTimer
from .errors import UsageError
from .events import Event
from .generation.conversation import Conversation
from .items import ConversationItems
from .outside_turns import OutsideTurns
from .pipeline.task import ReplyTask, make_task
from .pipeline.whole_reply import CachePool, WholeReply, read_prompt
from .prompt.speech_prompt import SpeechPrompt
from .prompt.tokenizer import TextCodec
from .reply_options import ReplyOptions
from .session_options import check_run_limit, context_size
from .speech.ode_methods import SolverChoice
from .speech.windows import Window
from .system.path_arguments import paths_checked
from .turn import Turn


class OmniSession:
    """A bundle opened with a backend.

    A session holds one conversation, turn by turn (``turn``), whose KV caches are kept, and answers conversations that
    are given whole (``reply``), each with other caches, which the next uses again when it ends, fails or is abandoned.
    Graphs are loaded when first used and kept; ``fork`` gives another session that shares them.

    One turn is open at a time. Its methods, and ``reply``, may be called from any thread.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        *,
        max_context: int | None = None,
        run_limit: float | None = None,
        codec: TextCodec | None = None,
        shared: Shared | None = None,
    ) -> None:
        check_run_limit(run_limit)
        check_shapes(bundle.manifest, bundle.root)
        self._run_limit = run_limit
        self.bundle = bundle
        exported = bundle.manifest.kv.max_context
        self.max_context = context_size(max_context, min(exported, backend.max_context() or exported))
        self.text_codec = codec or TextCodec.from_file(
            bundle.path(bundle.manifest.tokenizer_file), bundle.manifest.tokens
        )
        self._backend: Backend | None = backend
        self._shared = shared or Shared(Places())
        self._lock = threading.RLock()  # a signal handler may close the session in the thread that holds it
        self._pool = CachePool(self._new_cache, self.max_context)
        self._conversation = Conversation(bundle, self._new_cache, self.max_context)
        self._outside = OutsideTurns(self._conversation, self._guarded, self._alone)
        self._items = ConversationItems(bundle, self.text_codec, self._conversation, self._outside.computing)
        self._speech_prompt = SpeechPrompt(bundle.manifest.chat.system_prompt)
        self._turn: Turn | None = None
        self._replies: weakref.WeakSet[WholeReply] = weakref.WeakSet()
        close_at_exit(self)

    @classmethod
    @paths_checked
    def open(
        cls,
        path: str | os.PathLike[str],
        backend: str = "auto",
        *,
        verify: bool = False,
        threads: int | None = None,
        compute: str | None = None,
        max_context: int | None = None,
        run_limit: float | None = None,
        max_replies: int | None = None,
        max_waiting: int = 4,
    ) -> OmniSession:
        """Open a bundle.

        Args:
            path: bundle folder.
            backend: auto, ort-cpu, ort-cuda, ort-tensorrt-rtx, openvino, tensorrt or tensorrt-rtx.
            verify: also compare every file's sha256.
            threads: CPU threads of one operator; the physical cores if None.
            compute: ``bf16`` has OpenVINO (as the backend, or as ``auto`` takes it on a CPU) compute graphs of float32
                values in bfloat16: faster and less exact, on processors with AVX512-BF16 or AMX. None: as the graphs
                say.
            max_context: tokens that a conversation and its reply may take, at most what the bundle was exported for, or
                its engines were built for, which it is if None. Fewer take less memory.
            run_limit: seconds that one run of a graph may take, for servers that run what others send: a reply with a
                longer run ends with BackendError. None: any time. ONNX Runtime stops such a run at its next operator;
                an engine's run ends by itself, and the reply after it.
            max_replies: replies of this session and its forks that are made at once; None: any number. One more waits
                in its first ``next`` until another ends, fails or is abandoned.
            max_waiting: replies that wait like that; one more is refused with Busy.

        Raises:
            UsageError: ``compute``, ``max_context``, ``run_limit``, ``max_replies`` or ``max_waiting`` is out of range.
            BundleError: the bundle cannot be used. BackendError: the backend cannot run it here.
        """
        bundle = Bundle.open(path, verify=verify)
        context_size(max_context, bundle.manifest.kv.max_context)
        check_run_limit(run_limit)
        shared = Shared(Places(max_replies, max_waiting))
        opened = open_backend(backend, bundle, threads=threads, compute=compute)
        return cls(bundle, opened, max_context=max_context, run_limit=run_limit, shared=shared)

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.bundle.manifest

    @property
    def backend(self) -> Backend:
        """The backend.

        Raises:
            UsageError: the session is closed, or was used in the process that this one is a fork of.
        """
        self._shared.owner.check()
        if self._backend is None:
            raise UsageError("the session is closed; open another one with OmniSession.open(...)")
        return self._backend

    def __enter__(self) -> OmniSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is under way, and release caches, and graphs with the last session that shares them.

        Closing twice does nothing, and so does closing in a fork of the process that used it.
        """
        if self._shared.owner.elsewhere:
            return
        self._outside.cancel()  # first: who computes holds the lock until it sees this
        with self._lock:
            if self._backend is None:
                return
            if self._turn is not None:
                self._turn.cancel()
            for reply in tuple(self._replies):
                reply.cancel()
            backend, self._backend = self._backend, None
            self._conversation.release()
            self._pool.clear()
        if self._shared.leave():
            backend.close()

    def load(self) -> None:
        """Load every graph now. Otherwise each is loaded when it is first used, which the first reply waits for."""
        self._shared.owner.claim()
        for name in self.manifest.graphs:
            self.backend.graph(name)

    def fork(self) -> OmniSession:
        """Another session, with another conversation, over the same graphs and tokenizer, in memory once."""
        self._shared.owner.check()
        with self._lock:
            other = OmniSession(
                self.bundle,
                self.backend,
                max_context=self.max_context,
                run_limit=self._run_limit,
                codec=self.text_codec,
                shared=self._shared,
            )
            self._shared.join()
            return other

    @property
    def items(self) -> ConversationItems:
        """The messages of the session's conversation: to look at, add and change.

        Raises:
            UsageError: the session was used in the process that this one is a fork of.
        """
        self._shared.owner.check()
        return self._items

    def reset(
        self,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        instructions: str | None = None,
    ) -> None:
        """Begin a new conversation.

        Args:
            system: its system message; None is the one that the talker was trained with.
            instructions: text that stands beside it in the same message.
            tools: that the model may call, see docs/tools.md: ``{"type": "function", "function": {"name": ...,
                "description": ..., "parameters": ...}}`` each.

        Raises:
            UsageError: a turn is open, or ``system`` or ``instructions`` is no string. PromptError: malformed
            ``tools``.
        """
        self._shared.owner.check()
        with self._lock:
            self._require_no_turn()
            self._items.begin(system, instructions, tools)

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
        solver: SolverChoice = "rk4",
        exact: bool = False,
        threads: bool = True,
        ignore_stop: bool = False,
        stop: str | Sequence[str] = (),
        say: str | None = None,
    ) -> Turn:
        """Begin the next turn of the session's conversation.

        Args:
            voice, speak, thinker, talker, seed, noise, window, solver, threads, ignore_stop, stop, say: as in
                ``reply``.
            exact: Whisper's log-mel is floored at its loudest moment in the whole clip, which is not known before the
                clip ends. Live sound is floored at the loudest moment so far; True encodes again, on commit, what the
                final floor changes, and prefills again from there on.

        Raises:
            UsageError, UnknownVoice: bad options, or a turn that is still open. PromptError: nothing that can be said.
        """
        options = ReplyOptions(
            voice=voice,
            speak=speak,
            thinker=thinker,
            talker=talker,
            seed=seed,
            noise=noise,
            window=window,
            solver=solver,
            exact=exact,
            threads=threads,
            ignore_stop=ignore_stop,
            stop=stop,
            say=say,
            tools=self._items.tools,
        )
        self._shared.owner.claim()
        with self._lock:
            self._require_no_turn()
            task = self._task(options)
            self._conversation.use(task.backend, task.timer)
            if speak and self._items.system is not None:
                self._speech_prompt.compare(self._items.system)
            self._turn = Turn(task, self._conversation)
            return self._turn

    def say(
        self,
        text: str,
        voice: str | None = None,
        *,
        talker: SamplingConfig | None = None,
        seed: int = 0,
        noise: NDArray[np.float32] | None = None,
        window: Window = "stream",
        solver: SolverChoice = "rk4",
        threads: bool = True,
    ) -> Iterator[Event]:
        """Speak a given text, as if the model had thought of it; it joins the conversation as the assistant's message.

        ``turn(say=text)`` gives the turn, which can be cancelled; ``reply(messages, say=text)`` leaves nothing behind.

        Args:
            text: at most what the KV cache has room for; a long one is better said in parts.
            voice, talker, seed, noise, window, solver, threads: as in ``reply``.

        Yields:
            The events of a reply.

        Raises:
            PromptError: the text is empty, not valid Unicode, or holds a control token. PromptTooLong.
            UsageError, UnknownVoice: bad options, a turn that is still open, or a bundle that cannot speak.
        """
        return self.turn(
            voice,
            talker=talker,
            seed=seed,
            noise=noise,
            window=window,
            solver=solver,
            threads=threads,
            say=text,
        ).commit()

    def reply(
        self,
        messages: Sequence[Mapping[str, Any]],
        speak: bool = True,
        voice: str | None = None,
        *,
        thinker: SamplingConfig | None = None,
        talker: SamplingConfig | None = None,
        seed: int = 0,
        noise: NDArray[np.float32] | None = None,
        window: Window = "stream",
        solver: SolverChoice = "rk4",
        threads: bool = True,
        ignore_stop: bool = False,
        stop: str | Sequence[str] = (),
        say: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
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
                other windows, see ``SpeechWindows``.
            solver: ``rk4`` as the reference does; ``midpoint``, ``fast`` and ``faster`` take a half, a third and a
                quarter of its time, less exactly. ``euler``, as quick as ``faster``, is the least exact.
                ``auto`` takes the most exact of rk4, fast and faster that this machine has the time for while it
                streams; so the same seed may give other sound on another machine.
            threads: thinker, talker and token2wav at once, each in a thread; False runs them one after the other in the
                caller's thread. The result is the same.
            ignore_stop: text and speech go on until their ``max_new_tokens``, for measuring.

            stop: at most 4 strings that end the reply. None is part of it, nor is what the model would write after it.
            say: the reply's text, if it shall not be generated; thinker, stop and tools then have no effect, and
                ``messages`` may be empty.
            tools: that the model may call, as in ``reset``.

        Yields:
            TextDelta, AudioChunk, ToolCallDelta and ToolCall as they come, then one Done. An iterator that is closed or
            dropped stops the work.

        Raises:
            UsageError, UnknownVoice, PromptError, MediaError, Busy: at once, before any computing.
        """
        started = time.perf_counter()
        options = ReplyOptions(
            voice=voice,
            speak=speak,
            thinker=thinker,
            talker=talker,
            seed=seed,
            noise=noise,
            window=window,
            solver=solver,
            threads=threads,
            ignore_stop=ignore_stop,
            stop=stop,
            say=say,
            tools=tools,
        )
        self._shared.owner.claim()
        task = self._task(options)
        task.place.enter()
        try:
            prompt = read_prompt(task, messages, tools, self.max_context)
            if speak and messages and messages[0]["role"] == "system":
                self._speech_prompt.compare(messages[0]["content"])
            reply = WholeReply(task, prompt, self._pool, started)
            with self._lock:
                _ = self.backend  # it may have been closed meanwhile
                self._replies.add(reply)
        except BaseException:
            task.place.leave()
            raise
        return reply.events()

    def _task(self, options: ReplyOptions) -> ReplyTask:
        return make_task(
            self.bundle,
            self.text_codec,
            self.backend,
            options,
            self.max_context,
            self._shared,
            run_limit=self._run_limit,
        )

    def _guarded(self, token: CancelToken, timer: StageTimer) -> GuardedBackend:
        self._shared.owner.claim()
        return GuardedBackend(CheckedBackend(self.backend, self.manifest.graphs, self._run_limit), token, timer)

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        with self._lock:
            yield self._turn is None or self._turn.ended

    def _require_no_turn(self) -> None:
        if self._turn is not None and not self._turn.ended:
            raise UsageError("a turn is still open: take its events to the end, or cancel it, before the next begins")

    def _new_cache(self, name: str) -> KvCache:
        return self.backend.graph(name).new_cache(self.max_context)
