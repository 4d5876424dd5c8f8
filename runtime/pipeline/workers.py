"""The workers of a reply: thinker, talker and token2wav, a thread each, joined by bounded queues.

The thinker sends the talker a vector of conditioning for every token that is to be spoken, the talker sends codec
tokens to token2wav, whose vocoder runs beside the next window's DiT, and what is to be read or heard leaves through
one queue to the caller. A full queue holds its sender back. Under greedy sampling, or with the same seed, the result
is that of the workers one after the other: each draws from its own stream, and none looks at the time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.parts import decoders
from ..concurrency.cancel import Cancelled
from ..concurrency.channel import Channel
from ..concurrency.pace import Pace
from ..concurrency.schedule import READING
from ..events import AudioChunk, TextEvent, WorkerTime
from ..generation.conversation import Conversation
from ..generation.reply_text import ReplyText
from ..generation.thinker import ThinkerRun
from ..speech.token2wav import MelPiece
from .task import ReplyTask

#: tokens that the thinker is ahead of the talker at most: some seconds of speech
_TOKENS_AHEAD = 64
#: events that the caller has not taken at most
_EVENTS = 256

_Body = tuple[str, Callable[[], float], tuple[Channel[Any], ...]]
"""name, function that gives the seconds it waited, and the channels that end with it"""


class Workers:
    """One reply at work.

    Thinker and talker do no more than the first sound takes until it is out, where they would delay it.

    Args:
        run: the thinker, after prefill.
        conversation: holds the prompt; the talker catches up with it.
        clock: seconds since the question ended.

    Attributes:
        text: what the thinker has written so far.
        codec_ids: generated so far.
        times: of each worker that has ended.
        ended: seconds at which each worker ended, of those that came to their end.
        error: what ended a worker before its time.
    """

    def __init__(
        self, task: ReplyTask, run: ThinkerRun, conversation: Conversation, clock: Callable[[], float]
    ) -> None:
        self.text = ReplyText(task.codec, task.stop_strings, task.tools)
        self.codec_ids: list[int] = []
        self.times: dict[str, WorkerTime] = {}
        self.ended: dict[str, float] = {}
        self.error: BaseException | None = None
        self.run = run
        self._speech, self._conversation = task.speech, conversation
        self._token, self._timer, self._clock = task.token, task.timer, clock
        self._share = task.backend.share
        speech, token, threads = task.speech, task.token, task.threads
        # The talker is a window ahead of token2wav, no more: what it does sooner delays the sound that is due.
        codes = 1 if speech is None else speech.token2wav.longest
        bounds = (_TOKENS_AHEAD, codes, _EVENTS) if threads else (None, None, None)
        self._held = [part.name for part in decoders() if task.backend.delays_sound(part.name)]
        first = speech.token2wav.first_window if speech is not None and threads and self._held else None
        self._pace = None if first is None else Pace(*first, clock, token)
        self._conditioning: Channel[NDArray[np.float32]] = Channel(bounds[0], token)
        self._conditioned = 0  # vectors that were sent
        self._codes: Channel[int] = Channel(bounds[1], token)
        self._mels: Channel[MelPiece] = Channel(1 if threads else None, token)
        self._events: Channel[TextEvent | AudioChunk] = Channel(bounds[2], token, senders=1 if speech is None else 2)
        self._bodies: list[_Body] = [("thinker", self._think, (self._conditioning, self._events))]
        if speech is not None:
            self._bodies += [
                ("talker", self._talk, (self._codes,)),
                ("token2wav", self._solve, (self._mels,)),
                ("vocoder", self._voice, (self._events,)),
            ]
        self._threads = [
            threading.Thread(target=self._work, args=body, name=f"omniport-{body[0]}", daemon=True)
            for body in (self._bodies if threads else ())
        ]
        self._state = threading.Condition()
        self._joined = False  # nothing begins any more
        self._inside: threading.Thread | None = None  # the caller's thread, while it runs the bodies itself

    @property
    def inside(self) -> bool:
        """Whether the thread that asks is the one that runs the bodies, which cannot wait for itself."""
        return self._inside is threading.current_thread()

    def events(self) -> Iterator[TextEvent | AudioChunk]:
        """Start, and give what comes.

        Raises:
            Cancelled: the token was set. Whatever a worker raised.
        """
        if self._pace is not None:
            self._pace.begin()
        self._run()
        try:
            yield from self._events
        except Cancelled:
            self.join()
            if self.error is not None:
                raise self.error from None
            raise
        self.join()

    def _run(self) -> None:
        """Start the threads, or do their work in this one. Raises Cancelled if ``join`` came first."""
        with self._state:
            if self._joined:
                raise Cancelled
            for thread in self._threads:
                thread.start()
            if self._threads:
                return
            self._inside = threading.current_thread()
        try:
            for body in self._bodies:
                self._work(*body)
        finally:
            with self._state:
                self._inside = None
                self._state.notify_all()

    def join(self) -> None:
        """Wait until every worker has ended, which they do by themselves or once the token is set; none begins later.

        In whichever thread they work: what they use may be changed afterwards.
        """
        with self._state:
            self._joined = True
            self._state.wait_for(lambda: self._inside is None)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _work(self, name: str, body: Callable[[], float], outputs: tuple[Channel[Any], ...]) -> None:
        start, before = time.perf_counter(), self._timer.left_out
        waited = 0.0
        try:
            waited = body()
            self.ended[name] = self._clock()
        except Cancelled:
            pass  # the token is set: by the caller, or for an error, which `events` raises
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            self.error = self.error or error
            self._token.cancel()
        finally:
            waited += self._timer.left_out - before
            self.times[name] = WorkerTime(time.perf_counter() - start - waited, waited)
            for channel in outputs:
                channel.close()

    def _think(self) -> float:
        waited = 0.0
        for step in self.run.steps():
            events = self.text.take(step, self._clock())
            if self.text.cut is not None:
                self.run.end_with(self.text.cut, self.text.token_ids[self.text.cut :])
            if self._speech is None:
                self._share.give(READING)
            before = self._conditioned
            waited += self._condition()
            for event in events:
                waited += self._events.send(event)
            if self.text.cut is not None:
                break
            if not step.last:
                waited += sum(self._hold("thinker", made + 1) for made in range(before, self._conditioned))
        return waited

    def _condition(self) -> float:
        """Send the talker what is to be spoken of the tokens so far."""
        waited = 0.0
        if self._speech is not None:
            for vector in self.run.conditioning[self._conditioned : self.text.spoken]:
                waited += self._conditioning.send(vector)
                self._conditioned += 1
            if self.text.silent:  # the talker need not wait for the end of the text
                self._conditioning.close()
        return waited

    def _talk(self) -> float:
        speech, conversation = self._speech, self._conversation
        assert speech is not None
        conversation.catch_up()  # while the thinker writes its first words
        decoder, prompt = conversation.caches.decoder("talker"), conversation.caches.held
        waited = 0.0
        for code in speech.talker.codes(
            decoder,
            self._conditioning,
            speech.voice,
            speech.sampler,
            self._timer,
            tail=prompt.cursor,
            highest=int(prompt.positions.max()),
        ):
            self.codec_ids.append(code)
            waited += self._codes.send(code)
            waited += self._hold("talker", len(self.codec_ids))
        self._release()  # speech that ends before the text must not hold the thinker back
        for _ in self._conditioning:
            pass
        return waited + self._conditioning.waited

    def _solve(self) -> float:
        speech, waited = self._speech, 0.0
        assert speech is not None
        for code in self._codes:
            for piece in speech.token2wav.mels(code):
                waited += self._mels.send(piece)
        for piece in speech.token2wav.last_mels():
            waited += self._mels.send(piece)
        return waited + self._codes.waited

    def _voice(self) -> float:
        speech, waited = self._speech, 0.0
        assert speech is not None
        try:
            for index, piece in enumerate(self._mels):
                samples = speech.token2wav.vocode(piece)
                self._share.give(len(samples) / speech.sample_rate)
                waited += self._events.send(AudioChunk(samples, speech.sample_rate, index, self._clock()))
                self._release()
        finally:
            self._release()
        return waited + self._mels.waited

    def _hold(self, worker: str, made: int) -> float:
        return self._pace.hold(made) if self._pace is not None and worker in self._held else 0.0

    def _release(self) -> None:
        if self._pace is not None:
            self._pace.release()
