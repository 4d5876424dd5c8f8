"""One reply: runs the pipeline, tracks what was delivered, and updates the conversation at its end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import replace

from ..concurrency.cancel import Cancelled
from ..concurrency.owner import Owner
from ..events import AudioChunk, Done, Event, Stats, TextDelta, TextEvent, ToolCall, TurnsDropped, Usage, underruns
from ..generation.conversation import Conversation, codes_to_tokens
from ..generation.entries import Entry
from ..generation.reply_text import Said
from ..generation.thinker import ThinkerRun
from ..prompt.chat_template import end_of_reply
from ..system.host import peak_memory
from .task import ReplyTask
from .workers import Workers


class Reply:
    """Answers a conversation whose last turn is complete.

    Args:
        started: when the question ended, by ``time.perf_counter``.
        before: what ``conversation.caches.prefilled`` was when the turn began.
        entry: its message in the conversation; None in one that ends with the reply.

    Attributes:
        ended: however it did.
    """

    def __init__(
        self,
        task: ReplyTask,
        conversation: Conversation,
        stats: Stats,
        started: float,
        before: int = 0,
        entry: Entry | None = None,
    ) -> None:
        self.ended = False
        self._task, self._conversation, self._stats, self._started = task, conversation, stats, started
        self._before, self._entry = before, entry
        self._workers: Workers | None = None
        self._done: Done | None = None
        self._undone = False
        self._heard_before: float | None = None
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
            self._stats.queued = self._task.place.wait()
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
            pass  # only this reply's own token raises it; what is given next says "cancelled"
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
        elif heard is not None and not self._undone and self._entry is not None:
            self._conversation.shorten_spoken(self._entry, self._codes(heard))

    def _prepare(self) -> None:
        """Complete the conversation's last turn: before anything else, in the thread that asks for the first event."""

    def _release(self) -> None:
        """Give back what was borrowed: once, at the end."""

    def _prefill(self) -> TurnsDropped | None:
        task, conversation, stats = self._task, self._conversation, self._stats
        task.token.check()
        task.backend.share.ask()
        caches = conversation.caches
        before = caches.prefilled
        self._prepare()
        conversation.prefill(task.reserve, task.least, logits=True)
        prompt, special = caches.held, task.bundle.manifest.tokens
        stats.prompt_tokens, stats.reused_tokens = len(prompt), caches.kept
        stats.usage = Usage(prompt=prompt.count(special), cached=prompt.first(caches.kept).count(special))
        stats.late_tokens = caches.prefilled - before
        stats.prefilled_tokens = caches.prefilled - self._before
        run = ThinkerRun(
            caches.decoder("thinker"),
            task.sampler,
            task.bundle.embedding("thinker"),
            task.timer,
            logits=caches.logits,
            prompt_ids=prompt.ids,
            position=prompt.cursor,
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
            self._undone = undo
            if undo:
                self._conversation.undo_turn()
            else:
                conditioning = self._workers.run.conditioning[: said.first] if self._workers is not None else []
                closing = end_of_reply(self._task.bundle.manifest, self._task.codec)
                if self._entry is not None and self._workers is not None:
                    self._entry.pace, self._entry.said = self._pace, self._ids
                self._conversation.answer(said.ids, conditioning, closing)
            self._release()
            if self._task.speech is not None:
                self._task.speech.token2wav.release()
            self._task.place.leave()
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
        assert self._workers is not None
        texts, pace = self._texts, self._pace
        if pace:
            texts = min(texts, codes_to_tokens(self._codes(heard), pace))
        return self._workers.text.said(texts, self._calls)

    def _ids(self, texts: int) -> list[int]:
        """What counts as said if so many tokens of text do."""
        assert self._workers is not None
        return self._workers.text.said(min(texts, self._texts), self._calls).ids

    @property
    def _pace(self) -> float | None:
        """Codec tokens for each token of text; None of a reply that is only read, 0 of one that has no sound."""
        workers = self._workers
        if workers is None or self._task.speech is None:
            return None
        if {"thinker", "talker"} <= workers.ended.keys() and workers.text.spoken:
            return len(workers.codec_ids) / workers.text.spoken
        return self._conversation.codes_per_token

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
        stats.usage = replace(stats.usage, text=len(said.ids), codec=len(codes))
        stats.audio_seconds = sum(duration for _, duration in self._chunks)
        stats.underruns, stats.underrun_seconds = underruns(self._chunks)
        thought, voiced = workers.ended.get("thinker"), workers.ended.get("talker")
        stats.tokens_per_second = len(workers.text.token_ids) / (thought - stats.queued) if thought else None
        stats.codes_per_second = len(workers.codec_ids) / (voiced - stats.queued) if voiced else None
        if stats.audio_seconds:
            stats.real_time_factor = (stats.total_time - stats.queued) / stats.audio_seconds
        if task.speech is not None:
            stats.solver = task.speech.token2wav.solver
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
