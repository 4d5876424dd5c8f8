"""One turn of a live conversation: takes media while they arrive, then replies."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Real
from typing import Any, Literal

from numpy.typing import NDArray

from .bundle.parts import encoder_of
from .concurrency.cancel import Cancelled
from .errors import MediaError, PromptError, TurnEnded, UsageError
from .events import Done, Event, Stats
from .generation.conversation import Conversation
from .media.audio import check_level, pcm
from .media.image import ImageSource, load_image
from .pipeline.reply import Reply
from .pipeline.task import ReplyTask
from .prompt import chat_template
from .prompt.live_clip import LiveClip
from .prompt.messages import Part, check_content
from .prompt.positions import Layout
from .turn_media import TurnMedia

_ENDED = "this turn was cancelled or ended by an error; session.turn() begins another"
#: tokens around a message, or around what a tool call gave, at most
_TAGS = 48


class Turn:
    """What a user says, shows and writes until the reply; made by ``OmniSession.turn``.

    Sound and pictures are encoded and prefilled every 2 s, in the thread that pushes: at ``commit`` only the last piece
    and the prompt's tail are left to compute. Text closes the clip before it, so a turn may hold several. Pushes may
    come from several threads. A push that is refused (MediaError, PromptError) has taken nothing and leaves the turn
    open; any other error discards the turn.
    """

    def __init__(self, task: ReplyTask, conversation: Conversation) -> None:
        """For ``OmniSession``."""
        self._task, self._conversation = task, conversation
        self._lock = threading.RLock()
        self._state: Literal["open", "kept", "committed", "ended"] = "open"
        self._reply: Reply | None = None
        self._anything = False
        self._results = False  # what was pushed last is what a tool call gave
        self._entries = [conversation.begin_turn()]
        self._stats = Stats(backend=task.backend.name)
        self._prefilled = conversation.caches.prefilled
        self._layout = Layout(task.bundle.manifest, task.codec)
        self._media = TurnMedia(task, self._layout, conversation)
        chat_template.begin_message(self._layout, "user")

    @property
    def ended(self) -> bool:
        """Whether the turn was discarded or kept, or its reply has ended."""
        return self._state in ("kept", "ended") or (self._reply is not None and self._reply.ended)

    @property
    def item_ids(self) -> list[str]:
        """Of its messages in ``OmniSession.items``, each there once it is complete: the user's, then the reply's."""
        return [entry.id for entry in self._entries]

    def push_audio(self, samples: NDArray[Any], sample_rate: float) -> None:
        """Take the next samples of a recording.

        Args:
            samples: any number of them, [n], [n, channels] or [channels, n]: floats in -1..1, or int8, int16, int32,
                uint8. They follow on what was pushed before without a gap: push silence as zeros.
            sample_rate: Hz, the same throughout a clip.

        Raises:
            MediaError, TurnEnded, PromptTooLong.
        """
        self._require("audio")
        self._task.owner.check()
        values, rate = pcm((samples, sample_rate))
        check_level(values, rate, "this sound")
        if len(values):
            with self._lock:
                self._require_open()
                clip = self._media.clip_for("audio")
                clip.require_sound(len(values), rate)
                with self._push(clip.waiting(len(values), rate), clip):
                    self._media.sound(values, rate)

    def push_frame(self, image: ImageSource, time_s: float) -> None:
        """Take the next frame of a video.

        Pictures and sound of a clip are set side by side in pieces of 2 s. The model sees ``video_fps`` frames a second
        (2), the one on show at each instant; others are not kept.

        Args:
            image: a path, bytes, a PIL image, or uint8 or float array [H, W, 3]; one size throughout a clip.
            time_s: seconds from the start of the turn, on the clock of its sound; more than the last frame's.

        Raises:
            MediaError, TurnEnded, PromptTooLong.
        """
        self._require("image")
        self._task.owner.check()
        if not isinstance(time_s, Real) or isinstance(time_s, bool) or not abs(time_s) <= sys.float_info.max:
            raise MediaError(f"the frame's time is {time_s!r}; seconds from the start of the turn were expected")
        pixels = load_image(image)
        with self._lock:
            self._require_open()
            clip, time_s = self._media.clip_for("video"), float(time_s)
            clip.require_picture(pixels, time_s)
            with self._push(clip.waiting(frame=(pixels, time_s)), clip):
                self._media.picture(pixels, time_s)

    def push_image(self, image: ImageSource) -> None:
        """Take a still picture. It closes the clip before it.

        Raises:
            MediaError, TurnEnded, PromptTooLong.
        """
        self._require("image")
        lay, tokens = self._media.read([Part("image", image, "the picture")])
        with self._push(tokens):
            self._media.whole(lay)

    def push_text(self, text: str) -> None:
        """Take text. It closes the clip before it, and follows on text before it without a space.

        Raises:
            PromptError: not a string, or not valid Unicode. MediaError: the sound before it is too short. TurnEnded.
        """
        if not isinstance(text, str):
            raise PromptError(f"the text is a {type(text).__name__}; a string was expected")
        ids = self._task.codec.encode(text)
        if text:
            with self._push(len(ids)):
                self._media.close_clip()
                self._layout.text(text)

    def push_tool_result(self, content: str) -> None:
        """Take what a tool call of the last reply gave; of several calls in their order. It closes the clip before it.

        Raises:
            PromptError: not a string, or not valid Unicode. MediaError: the sound before it is too short. TurnEnded.
        """
        if not isinstance(content, str):
            raise PromptError(f"the tool's result is a {type(content).__name__}; a string was expected")
        tokens = len(self._task.codec.encode(content))
        with self._lock:
            follows = self._anything and self._results
            with self._push(tokens + _TAGS, results=True):
                self._media.close_clip()
                chat_template.tool_result(self._layout, content, follows)

    def push(self, content: str | Sequence[Mapping[str, Any]]) -> None:
        """Take content that is complete: what a message holds, text, audio, image and video files or arrays.

        It closes the clip before it. All of it is read before any of it is taken.

        Raises:
            PromptError, MediaError, TurnEnded, PromptTooLong.
        """
        self._require_open()
        parts = check_content(content, "content")
        for part in parts:
            if part.kind != "text":
                self._require(part.kind)
        lay, tokens = self._media.read(parts)
        if tokens:
            with self._push(tokens):
                self._media.whole(lay)

    def commit(self) -> Iterator[Event]:
        """The turn is complete: answer it, or say what was given to say, for which nothing need have been pushed.

        What is left of its media is encoded before this returns; everything else begins with the first ``next``.

        Yields:
            TurnsDropped first if the conversation has outgrown the KV cache, TextDelta and AudioChunk as they come,
            then one Done. An iterator that is closed or dropped cancels the reply.

        Raises:
            PromptError: nothing was pushed. MediaError: the last sound is too short. Busy: no place among the replies
            that are made at once. All three leave the turn open. TurnEnded. PromptTooLong.
        """
        started = time.perf_counter()
        self._task.owner.check()
        with self._lock:
            self._require_open()
            if self._task.given and not self._anything:
                return self._answer(self._task, started)
            self._require_content("reply to")
            self._task.place.enter()
            try:
                self._end_message()
                self._conversation.end_turn()
                return self._answer(self._task, started)
            except Cancelled:
                self._abort()
                return iter([Done("", [], [], self._stats, "cancelled")])
            except BaseException:
                self._abort()
                raise

    def answer(self, *, drop: bool = True) -> Iterator[Event]:
        """Answer the conversation as it stands, without another message of the user.

        Args:
            drop: the oldest turns may be dropped so that the reply has room. False: it takes what is left.

        Yields:
            As ``commit``.

        Raises:
            UsageError: something was pushed; ``commit`` answers that. Busy leaves the turn open, too. TurnEnded.
            PromptTooLong.
        """
        started = time.perf_counter()
        self._task.owner.check()
        with self._lock:
            self._require_open()
            if self._anything:
                raise UsageError("something was pushed in this turn, which commit() answers; answer() is for none")
            return self._answer(self._task if drop else replace(self._task, reserve=None), started)

    def keep(self) -> None:
        """The turn is complete, and is not answered now: its message stays in the conversation, prefilled.

        ``session.turn(...).answer()`` may answer it later.

        Raises:
            PromptError: nothing was pushed. MediaError: the last sound is too short. Both leave the turn open.
            TurnEnded. PromptTooLong.
        """
        self._task.owner.check()
        with self._lock:
            self._require_content("keep")
            try:
                self._end_message()
                self._conversation.end_turn()
                self._conversation.prefill()
                if self._task.speech is not None:
                    self._conversation.catch_up()
            except Cancelled:
                self._abort()
                raise TurnEnded(_ENDED) from None
            except BaseException:
                self._abort()
                raise
            self._state = "kept"

    def cancel(self, heard: float | None = None) -> None:
        """End the turn now; from any thread, at any time, as often as wanted.

        Before ``commit`` the turn is discarded, as if it had never begun. During the reply all workers stop within one
        step; what was said stays in the conversation, what was not is forgotten. Of a reply that is read, the text that
        was delivered counts as said. Of one that is spoken, the text whose sound was delivered: the model does not tell
        which word a sound belongs to, so this is estimated from the pace of the speech.

        Args:
            heard: seconds of the speech that were played, where the caller knows; all that was delivered if None. With
                it, a reply that has ended can be cut back too, while it is still being played or later: a turn that
                has begun meanwhile goes on, and what follows the cut is prefilled again before the next reply.

        Raises:
            UsageError: ``heard`` is no number of seconds.
        """
        if heard is not None and not (isinstance(heard, Real) and heard >= 0):
            raise UsageError(f"heard is {heard!r}; seconds of speech, 0 or more, were expected")
        if self._task.owner.elsewhere:  # nothing of it runs in a fork
            return
        self._task.token.cancel()  # first: a push in another thread holds the lock until it sees this
        with self._lock:
            if self._state == "open":
                self._abort()
            elif self._reply is not None:
                self._reply.cancel(heard)

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    @contextmanager
    def _push(self, tokens: int, clip: LiveClip | None = None, results: bool = False) -> Iterator[None]:
        """Around what takes something: prefills what it completed, or ends the turn if that fails.

        Args:
            tokens: of it at most; PromptTooLong before anything is taken if there is no room.
            clip: that it belongs to, whose waiting tokens are among them; another one ends before.
            results: it is what a tool call gave, which stands in a message without anything else.
        """
        self._task.owner.check()
        with self._lock:
            self._require_open()
            if self._media.clip is not None and self._media.clip is not clip:
                tokens += self._media.clip.waiting()
            self._task.backend.share.ask()
            other = self._anything and results != self._results
            self._conversation.require_room(self._layout.pending + tokens + other * _TAGS)
            try:
                if other:
                    self._end_message()
                    self._entries.append(self._conversation.begin_message("user"))
                    chat_template.begin_message(self._layout, "user")
                self._results = results
                yield
                self._advance()
            except MediaError:  # raised before anything is taken
                raise
            except Cancelled:
                self._abort()
                raise TurnEnded(_ENDED) from None
            except BaseException:
                self._abort()
                raise
            self._anything = True

    def _require_open(self) -> None:
        if self._state in ("committed", "kept"):
            raise TurnEnded(f"this turn was {self._state}; session.turn() begins the next")
        if self._state == "ended":
            raise TurnEnded(_ENDED)

    def _require(self, kind: str) -> None:
        """UsageError if the bundle cannot take such media."""
        self._task.bundle.require_graph(encoder_of(kind).name, "sound" if kind == "audio" else "a picture")

    def _abort(self) -> None:
        """Discard the turn."""
        if self._state == "open":
            self._state = "ended"
            self._task.place.leave()
            self._conversation.undo_turn()

    def _advance(self) -> None:
        """Prefill what new media have completed, and, once a clip has begun, what came before this turn."""
        conversation = self._conversation
        if self._layout.filled:
            conversation.add(self._layout.segment())
        elif self._media.clip is None or not conversation.behind:
            return
        conversation.prefill(self._task.reserve)
        if self._task.speech is not None:
            conversation.catch_up()

    def _require_content(self, purpose: str) -> None:
        self._require_open()
        if not self._anything:
            raise PromptError(f"nothing was pushed in this turn, so there is nothing to {purpose}; push something")
        if self._media.clip is not None:
            self._media.clip.require_tokens()

    def _end_message(self) -> None:
        """Lay out the rest of the message that is open."""
        self._media.close_clip()
        chat_template.end_message(self._layout)
        self._layout.flush()
        self._conversation.add(self._layout.segment())

    def _answer(self, task: ReplyTask, started: float) -> Iterator[Event]:
        """Begin the reply."""
        conversation = self._conversation
        task.place.enter()
        if not self._anything:  # nobody has asked: the reply stands alone
            conversation.undo_turn()
            self._entries.clear()
        header = Layout(task.bundle.manifest, task.codec)
        chat_template.begin_reply(header)
        alone = bool(task.given) and not self._anything
        self._entries.append(conversation.begin_message("assistant", header.segment(), begins=alone))
        try:
            conversation.require_room(least=task.least)
        except PromptError:
            self._abort()
            raise
        self._state = "committed"
        self._reply = Reply(task, conversation, self._stats, started, self._prefilled, self._entries[-1])
        return self._reply.events()
