"""One reply: runs the pipeline, tracks what was delivered, and updates the conversation at its end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress

from ..concurrency.cancel import Cancelled
from ..concurrency.owner import Owner
from ..events import AudioChunk, Done, Event, Stats, TextDelta, TextEvent, ToolCall, TurnsDropped, underruns
from ..generation.conversation import Conversation
from ..generation.reply_text import Said
from ..generation.thinker import ThinkerRun
from ..prompt.chat_template import end_of_reply
from ..prompt.positions import Segment
from ..system.host import peak_memory
from .task import ReplyTask
from .workers import Workers


class Reply:
    """Answers a conversation whose last turn is complete.

    Args:
        started: when the question ended, by ``time.perf_counter``.
        before: what ``conversation.prefilled`` was when the turn began.

    Attributes:
        ended: however it did.
    """

    def __init__(
        self, task: ReplyTask, conversation: Conversation, stats: Stats, started: float, before: int = 0
    ) -> None:
        self.ended = False
        self._task, self._conversation, self._stats, self._started = task, conversation, stats, started
        self._before = before
        self._workers: Workers | None = None
        self._done: Done | None = None
        self._turn: list[Segment] | None = None
        self._undone = False
        self._heard_before: float | None = None
        self._kept = 0
        self._setup = threading.Lock()  # held while the caller's thread uses the conversation
        self._delivery = threading.Lock()
        self._chunks: list[tuple[float, float]] = []
        self._texts = self._calls = 0
        self._samples = 0

    def events(self) -> Iterator[Event]:
        """Run to the end, or until cancelled, giving events."""
        return _Events(self._run(), self.cancel, self._task.owner)

    def _run(self) -> Iterator[Event]:
        try:
            with self._setup:
                dropped = self._prefill()
            if dropped is not None:
                yield dropped
            assert self._workers is not None
            for event in self._workers.events():
                if not self._delivered(event):
                    break
                yield event
        except Cancelled:
            pass
        except GeneratorExit:  # the caller has lost interest
            if not self._task.owner.elsewhere:
                self.cancel()
            raise
        except BaseException:
            self._task.token.cancel()
            self._end(undo=True)
            raise
        yield self._end()

    def cancel(self, heard: float | None = None) -> None:
        """Stop the workers and cut the conversation back to what counts as said; see ``Turn.cancel``."""
        self._task.token.cancel()
        if self._workers is not None and self._workers.inside:
            self._heard_before = heard  # a signal handler: the reply that it interrupts ends by itself
            return
        with self._setup:
            ended = self._done
        if ended is None:
            self._end(heard=heard)
        elif heard is not None and not self._undone and self._workers is not None:
            self._shorten(self._heard(heard))

    def _shorten(self, said: Said) -> None:
        """The reply is complete, but was not heard to its end."""
        if len(said.ids) < self._kept and self._conversation.shorten_answer(self._turn, said.ids, said.first):
            self._kept = len(said.ids)

    def _prepare(self) -> None:
        """Complete the conversation's last turn: before anything else, in the thread that asks for the first event."""

    def _release(self) -> None:
        """Give back what was borrowed: once, at the end."""

    def _prefill(self) -> TurnsDropped | None:
        task, conversation, stats = self._task, self._conversation, self._stats
        task.token.check()
        before = conversation.prefilled
        self._prepare()
        conversation.prefill(task.reserve, task.least)
        stats.prompt_tokens = conversation.length
        stats.late_tokens = conversation.prefilled - before
        stats.prefilled_tokens = conversation.prefilled - self._before
        run = ThinkerRun(
            conversation.decoder("thinker"),
            task.sampler,
            task.bundle.embedding("thinker"),
            task.timer,
            logits=conversation.logits,
            prompt_ids=conversation.ids,
            position=conversation.cursor,
            stop=task.stop,
            given=task.given,
        )
        self._workers = Workers(task, run, conversation, self._elapsed)
        return conversation.take_dropped()

    def _delivered(self, event: TextEvent | AudioChunk) -> bool:
        """Note that the caller gets an event; False if the reply was cancelled before."""
        stats = self._stats
        with self._delivery:
            if self._task.token.cancelled:
                return False
            if not isinstance(event, AudioChunk):
                self._texts += isinstance(event, TextDelta) and event.token_id not in self._task.stop
                self._calls += isinstance(event, ToolCall)
                stats.time_to_first_token = (
                    event.time if stats.time_to_first_token is None else stats.time_to_first_token
                )
                return True
            if stats.time_to_first_audio is None:
                stats.time_to_first_audio = event.time
            self._samples += len(event.samples)
            self._chunks.append((event.time, len(event.samples) / event.sample_rate))
            return True

    def _end(self, undo: bool = False, heard: float | None = None) -> Done:
        """Once the workers have ended: set the conversation right, and sum up. Ending twice gives the same."""
        with self._setup, self._delivery:
            if self._done is not None:
                return self._done
            if self._workers is not None:
                self._workers.join()
            said = self._said(self._heard_before if heard is None else heard)
            self._done = self._sum_up(said)
            self._undone, self._turn = undo, self._conversation.turns[-1]
            if undo:
                self._conversation.undo_turn()
            else:
                conditioning = self._workers.run.conditioning[: said.first] if self._workers is not None else []
                closing = end_of_reply(self._task.bundle.manifest, self._task.codec)
                self._conversation.answer(said.ids, conditioning, closing)
                self._kept = len(said.ids)
            self._release()
            self.ended = True
            return self._done

    def _said(self, heard: float | None) -> Said:
        """What counts as said."""
        workers = self._workers
        if workers is None:
            return Said([], 0, "", [])
        if self._task.token.cancelled:
            return self._heard(heard)
        if workers.text.spoken and workers.codec_ids:
            self._conversation.codes_per_token = len(workers.codec_ids) / workers.text.spoken
        return workers.text.said()

    def _heard(self, heard: float | None) -> Said:
        """What was read, or heard, by the pace of the speech."""
        workers = self._workers
        assert workers is not None
        texts, spoken = self._texts, workers.text.spoken
        if self._task.speech is not None:
            complete = {"thinker", "talker"} <= workers.ended.keys()
            pace = len(workers.codec_ids) / spoken if complete and spoken else self._conversation.codes_per_token
            texts = min(texts, int(self._codes(heard) / pace + 1e-6))
        return workers.text.said(texts, self._calls)

    def _codes(self, heard: float | None = None) -> int:
        """Codec tokens whose sound was delivered, or heard if the caller knows for how many seconds it was."""
        dit, speech = self._task.bundle.manifest.dit, self._task.speech
        if dit is None or speech is None:
            return 0
        seconds = self._samples / speech.sample_rate
        return round((seconds if heard is None else min(seconds, heard)) * dit.codec_hz)

    def _sum_up(self, said: Said) -> Done:
        stats, workers, task = self._stats, self._workers, self._task
        stats.total_time = self._elapsed()
        stats.busy, stats.run_seconds = task.timer.busy, task.backend.seconds
        stats.peak_memory_bytes = peak_memory()
        if workers is None:
            return Done("", [], [], stats, "cancelled", None if task.speech is None else "cancelled")
        cancelled = task.token.cancelled
        stats.workers = workers.times
        codes = workers.codec_ids[: self._codes()] if cancelled else workers.codec_ids
        stats.text_tokens, stats.codec_tokens = len(said.ids), len(codes)
        stats.audio_seconds = sum(duration for _, duration in self._chunks)
        stats.underruns, stats.underrun_seconds = underruns(self._chunks)
        thought, voiced = workers.ended.get("thinker"), workers.ended.get("talker")
        stats.tokens_per_second = len(workers.text.token_ids) / thought if thought else None
        stats.codes_per_second = len(workers.codec_ids) / voiced if voiced else None
        if stats.audio_seconds:
            stats.real_time_factor = stats.total_time / stats.audio_seconds
        reason = "cancelled" if cancelled else workers.run.finish_reason
        if said.calls and reason == "stop":
            reason = "tool_calls"
        speech = None if task.speech is None else "cancelled" if cancelled else task.speech.talker.finish_reason
        return Done(said.text, said.ids, codes, stats, reason, speech, tool_calls=said.calls)

    def _elapsed(self) -> float:
        return time.perf_counter() - self._started


class _Events:
    """What a reply gives. A generator that is dropped before its first event would never know that it was."""

    def __init__(self, events: Iterator[Event], abandon: Callable[[], None], owner: Owner) -> None:
        self._events, self._abandon, self._owner = events, abandon, owner

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        self._owner.check()
        return next(self._events)

    def close(self) -> None:
        """Cancel the reply, if it has not ended; from any thread, while another waits for an event too."""
        if self._owner.elsewhere:
            return
        self._abandon()
        if isinstance(self._events, Generator):
            with suppress(ValueError):  # it is executing: the thread in it sees that the reply has ended
                self._events.close()

    def __del__(self) -> None:
        with suppress(Exception):  # at the interpreter's end anything may be gone
            self.close()
