"""Lead a spoken conversation: one turn after another, each reply in its own thread, with interruptions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..events import AudioChunk, Event
from ..session import OmniSession
from ..turn import Turn

#: seconds; a reply whose sound was played but for this was heard to its end
_REST = 0.05


@dataclass(frozen=True)
class TurnBegan:
    """The user speaks.

    Attributes:
        time: seconds of the sound that came in so far.
        interrupted: a reply was under way, or still being played, and is cut off.
    """

    time: float
    interrupted: bool


@dataclass(frozen=True)
class TurnCommitted:
    """The user has spoken; a reply is on its way.

    Attributes:
        time: seconds of the sound that came in so far.
        seconds: of them in this turn.
    """

    time: float
    seconds: float


DialogueEvent = TurnBegan | TurnCommitted | Event


class Dialogue:
    """Leads a session's conversation for a caller that has a microphone and, perhaps, a loudspeaker.

    ``begin``, ``push`` and ``commit`` belong to one thread, the one that reads the microphone; they compute, so a
    driver's callback should hand sound over through a queue. ``close`` may be called from any thread.

    Args:
        on_event: gets TurnBegan and TurnCommitted in the caller's thread, and each reply's events in the reply's. After
            TurnBegan with ``interrupted`` no more of the cut reply shall be played; its Done still comes, before any
            event of the next. It may block, to hold a reply back, but not past ``interrupted``, and must not call
            methods of this object.
        heard: seconds of the current reply's sound that were played, where the caller knows.
        shown: content that the first turn begins with, before its sound, as in ``Turn.push``.
        options: of every turn, as in ``OmniSession.turn``: voice, speak, thinker, talker, seed, exact and others.

    Attributes:
        time: seconds of sound that came in so far, kept by whoever reads the microphone.
        seconds: of them in the turn that is open, or was last.

    Raises:
        UsageError, UnknownVoice: bad options, or a bundle that does not hear.
        PromptError, MediaError, PromptTooLong: ``shown`` cannot be shown.
    """

    def __init__(
        self,
        session: OmniSession,
        on_event: Callable[[DialogueEvent], None],
        *,
        heard: Callable[[], float] | None = None,
        shown: Sequence[Mapping[str, Any]] = (),
        **options: Any,
    ) -> None:
        with session.turn(**options) as trial:  # discarded: options are refused now, not when somebody has spoken
            trial.push_audio(np.zeros(0, np.float32), 16000)
            if shown:
                trial.push(shown)
        self._shown = shown
        self.time = self.seconds = 0.0
        self._new_turn, self._on_event, self._heard = partial(session.turn, **options), on_event, heard
        self._lock = threading.RLock()
        self._open: Turn | None = None
        self._answered: Turn | None = None
        self._thread: threading.Thread | None = None
        self._delivered = 0.0
        self._error: BaseException | None = None
        self._closed = False

    def __enter__(self) -> Dialogue:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stop()
        if kind is None:
            self._check()

    @property
    def turn(self) -> Turn | None:
        """The turn that is open, for frames of a camera."""
        return self._open

    @property
    def state(self) -> Literal["waiting", "listening", "replying"]:
        """``replying`` until the reply's sound was played, where the caller says so."""
        if self._open is not None:
            return "listening"
        return "replying" if self._thread_runs() or self._playing() else "waiting"

    def begin(self) -> None:
        """Begin a turn; a reply that is under way is cut off, and what of it was heard counts as said.

        Raises:
            UsageError: closed, or a turn is open. Whatever ended the reply before.
        """
        with self._lock:
            self.ready()
            if self._open is not None:
                raise UsageError("a turn is open; commit() it, or drop() it, before the next begins")
            interrupted = self.state == "replying"
            self._on_event(TurnBegan(self.time, interrupted))
            self._cut_reply(interrupted)
            self._check()  # it may have failed just now
            self._open, self.seconds = self._new_turn(), 0.0
            if self._shown:
                self._open.push(self._shown)
                self._shown = ()

    def push(self, samples: NDArray[Any], sample_rate: float) -> None:
        """Sound of the open turn, see ``Turn.push_audio``; an error other than MediaError discards the turn."""
        with self._lock:
            self.ready()
            if self._open is None:
                raise UsageError("no turn is open: begin() comes before push()")
            self._open.push_audio(samples, sample_rate)
            self.seconds += len(samples) / sample_rate

    def commit(self) -> None:
        """The open turn is complete: answer it. Without one, nothing happens.

        Raises:
            PromptError, MediaError, PromptTooLong: nothing that could be answered. Busy: too many replies. The turn
            is discarded.
        """
        with self._lock:
            self.ready()
            if self._open is None:
                return
            turn, self._open = self._open, None
            self._on_event(TurnCommitted(self.time, self.seconds))
            try:
                events = turn.commit()
            except BaseException:
                turn.cancel()
                raise
            self._answered, self._delivered = turn, 0.0
            self._thread = threading.Thread(target=self._reply, args=(events,), name="omniport-reply", daemon=True)
            self._thread.start()

    def drop(self) -> None:
        """Discard the open turn, if there is one."""
        with self._lock:
            turn, self._open = self._open, None
            if turn is not None:
                turn.cancel()

    def ready(self) -> None:
        """Raise what ended the last reply, once, and UsageError if closed."""
        self._check()
        if self._closed:
            raise UsageError("this dialogue is closed; make another one over the session")

    def wait(self) -> None:
        """Wait for the end of the reply, not of its sound. Raises what ended it."""
        thread = self._thread
        if thread is not None:
            thread.join()
        self._check()

    def close(self) -> None:
        """Discard the open turn, interrupt the reply, and wait for its threads. Raises what had ended it before."""
        self._stop()
        self._check()

    def _stop(self) -> None:
        self._closed = True
        for turn in (self._open, self._answered):  # first: a push in another thread holds the lock until it sees this
            if turn is not None:
                turn.cancel(self._played() if turn is self._answered else None)
        with self._lock:
            self.drop()
            self._cut_reply(True)

    def _check(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _thread_runs(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _played(self) -> float | None:
        return None if self._heard is None else self._heard()

    def _playing(self) -> bool:
        played = self._played()
        return played is not None and played + _REST < self._delivered

    def _cut_reply(self, interrupted: bool) -> None:
        if interrupted and self._answered is not None:
            self._answered.cancel(self._played())
        if self._thread is not None:
            self._thread.join()
        self._answered, self._thread, self._delivered = None, None, 0.0

    def _reply(self, events: Iterator[Event]) -> None:
        try:
            for event in events:
                if isinstance(event, AudioChunk):
                    self._delivered += len(event.samples) / event.sample_rate
                self._on_event(event)
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            self._error = error
            turn = self._answered
            if turn is not None:  # on_event failed: the workers do not know yet
                turn.cancel()
