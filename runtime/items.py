"""The items of a session's conversation: look at them, add some, take some away."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

from .bundle.parts import encoder_of
from .bundle.reader import Bundle
from .errors import UsageError
from .generation.conversation import Conversation
from .generation.encoders import Encoders
from .generation.entries import Entry, Tokens
from .prompt import chat_template
from .prompt.builder import LaidMessage, read_messages, require_fit
from .prompt.contents import content_of
from .prompt.messages import Message, Part, check_message, check_messages, open_conversation
from .prompt.positions import Layout
from .prompt.room import Room
from .prompt.tokenizer import TextCodec
from .prompt.tools import RoleParts, check_tools, joined_results, lay_out, result_text

_WHERE = "the system message"

Computing = Callable[[bool], AbstractContextManager[Encoders | None]]
"""around work outside turns; True: work that needs the KV caches, None if a turn has them"""


@dataclass(frozen=True)
class ConversationItem:
    """One message of a conversation.

    Attributes:
        role: system, user, assistant or tool.
        content: ``{"type": "text", "text": T}`` for text; of media what they take, ``{"type": "audio", "tokens": N}``,
            also image and video.
        start: which of the conversation's tokens is its first.
        tokens: how many it has.
        cached: how many of them, from the first on, are in the KV cache.
    """

    id: str
    role: str
    content: list[dict[str, Any]]
    start: int
    tokens: int
    cached: int


class ConversationItems:
    """The complete messages of a session's conversation, in order; ``OmniSession.items``.

    They may be changed from any thread at any time, also while a turn is open or a reply is made, which go on. The KV
    cache is cut back to the first token that differs, and what follows is prefilled before the next reply. The result
    is the same as if the conversation had been given like that at once.
    """

    def __init__(self, bundle: Bundle, codec: TextCodec, conversation: Conversation, computing: Computing) -> None:
        """For ``OmniSession``."""
        self.system: str | None = None
        self.tools: Sequence[Mapping[str, Any]] = ()
        self._bundle, self._codec, self._conversation, self._computing = bundle, codec, conversation, computing
        self._opening: Entry | None = None
        self._called = False  # a message holds a tool call
        conversation.entries.lay_results = partial(joined_results, manifest=bundle.manifest, codec=codec)
        self.begin(None, None, ())

    def __iter__(self) -> Iterator[ConversationItem]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def __getitem__(self, item_id: str) -> ConversationItem:
        """The item of that id.

        Raises:
            UsageError: there is none.
        """
        with self._conversation.entries.lock:
            entry = self._conversation.entries.find(item_id)
            return next(item for item in self._all() if item.id == entry.id)

    def append(self, message: Mapping[str, Any], *, before: str | None = None) -> ConversationItem:
        """Add a message without answering it. It is prefilled at once, or with the next piece of an open turn.

        Results of tools that follow one another are items of their own, and one message to the model.

        Args:
            message: as in ``OmniSession.reply``; of a user, an assistant, a tool, ``system`` or ``developer``, which
                are the same here.
            before: id of the item that it shall stand before. At the end if None, but before a turn that is open.

        Raises:
            PromptError, MediaError: it cannot be used. PromptTooLong: it does not fit the KV cache.
            UsageError: there is no such item, or the session is closed.
        """
        entries, checked = self._conversation.entries, check_message(message, "the message")
        place = None if before is None else entries.find(before)
        checked = open_conversation([checked], "")[0]
        self._called = self._called or bool(checked.calls)
        turns = entries.turns()
        beside = sum(map(len, turns[0])) + (sum(map(len, turns[-1])) if checked.role != "user" and turns[1:] else 0)
        tooled = bool(self.tools) or self._called
        (laid,) = self._read(lay_out([checked], tooled=tooled), beside)
        with self._computing(False) as encoders:
            assert encoders is not None
            entry = self._conversation.add_message(laid, encoders, place, result_text(checked) if tooled else None)
        with self._computing(True) as encoders:
            if encoders is not None:
                self._prefill(entry)
        there = next((item for item in self._all() if item.id == entry.id), None)
        return there or self._described(entry, 0, 0)  # dropped at once, with the old turn that it was put in

    def delete(self, item_id: str) -> None:
        """Take an item away.

        Raises:
            UsageError: there is none of that id.
        """
        entries = self._conversation.entries
        with entries.lock:
            entries.remove([entries.find(item_id)])

    def rewind(self, item_id: str | None) -> None:
        """Take away every item after this one; after the first system message if None.

        Raises:
            UsageError: there is none of that id.
        """
        entries = self._conversation.entries
        with entries.lock:
            last = self._opening if item_id is None else entries.find(item_id)
            listed = list(entries)
            after = listed[listed.index(last) + 1 :] if last in listed else listed
            entries.remove([entry for entry in after if not entry.open])

    def truncate(self, item_id: str, *, heard: float | None = None, tokens: int | None = None) -> bool:
        """Cut an assistant's item back: of what it says, the rest is forgotten.

        Args:
            heard: seconds of the reply's speech that were played; more than it has cut nothing.
            tokens: of its text, in place of ``heard``. Tool calls that were made stay.

        Returns:
            Whether it is shorter now.

        Raises:
            UsageError: there is no such item, or it is none that can be cut so.
        """
        entry = self._conversation.entries.find(item_id)
        if (heard is None) == (tokens is None):
            raise UsageError("truncate takes one of heard and tokens")
        for name, value in (("heard", heard), ("tokens", tokens)):
            if value is not None and not (isinstance(value, Real) and value >= 0):
                raise UsageError(f"{name} is {value!r}; a number of 0 or more was expected")
        if entry.said is None:
            raise UsageError(f"item {item_id!r} is no reply of the model; only its replies can be cut")
        if tokens is not None:
            return self._conversation.shorten(entry, tokens)
        dit = self._bundle.manifest.dit
        if dit is None or heard is None or entry.pace is None:
            raise UsageError(f"item {item_id!r} was not spoken; cut it with tokens=")
        return self._conversation.shorten_spoken(entry, round(min(heard, 1e9) * dit.codec_hz))

    def replace(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> None:
        """Have this conversation instead of the session's own.

        The items that both have stay, with what their media were encoded to. The next reply prefills from the first
        token that differs from what the KV cache holds: ``session.turn(...).answer(drop=False)``.

        Args:
            messages, tools: as in ``OmniSession.reply``, but no message has to hold a question.

        Raises:
            UsageError: a turn is open, or the session is closed. PromptError, MediaError, PromptTooLong: nothing has
            changed.
        """
        checked, signatures = check_messages(messages, asked=False), check_tools(tools)
        opened = open_conversation(checked, self._bundle.manifest.chat.system_prompt, always=bool(signatures))
        laid = self._read(lay_out(opened, signatures), 0)
        with self._computing(True) as encoders:
            if encoders is None:
                raise UsageError(
                    "a turn is still open: take its events to the end, or cancel it, before the next begins"
                )
            given = checked[0] if checked and checked[0].role == "system" else None
            self.system = None if given is None else "".join(str(part.value) for part in given.parts)
            self.tools, self._called = tools, any(message.calls for message in checked)
            self._conversation.replace(laid)
            first = next(iter(self._conversation.entries), None)
            self._opening = first if first is not None and first.role == "system" else None

    def instruct(self, instructions: str | None, tools: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Have other instructions beside the speech prompt, or none; the rest of the conversation stays.

        Args:
            tools: that the model may call from now on, in turns that begin now; None: those that it has.

        Raises:
            UsageError: no string. PromptError: malformed ``tools``.
        """
        tools = self.tools if tools is None else tools
        opening = self._open(self.system, instructions, tools)
        self.tools = tools
        self._put_opening(opening)

    def begin(self, system: str | None, instructions: str | None, tools: Sequence[Mapping[str, Any]]) -> None:
        """For ``OmniSession.reset``: another conversation."""
        opening = self._open(system, instructions, tools)
        self._conversation.clear()
        self.system, self.tools, self._called = system, tools, False
        self._put_opening(opening)

    def _open(
        self, system: str | None, instructions: str | None, tools: Sequence[Mapping[str, Any]]
    ) -> LaidMessage | None:
        """The system message; None where the user gave none, and the bundle has none."""
        for name, text in (("system message", system), ("text of the instructions", instructions)):
            if text is not None and not isinstance(text, str):
                raise UsageError(f"the {name} is a {type(text).__name__}; a string was expected")
        own = self._bundle.manifest.chat.system_prompt if system is None else system
        given = [Message("developer", [Part("text", instructions, _WHERE)], _WHERE)] if instructions else []
        signatures = check_tools(tools)
        opened = open_conversation(given, own, always=system is not None or bool(signatures))
        layout = Layout(self._bundle.manifest, self._codec)
        laid = read_messages(lay_out(opened, signatures), layout, self._codec, Room(1 << 40))
        return laid[0] if laid else None

    def _put_opening(self, laid: LaidMessage | None) -> None:
        entries = self._conversation.entries
        with entries.lock:
            entries.remove([self._opening] if self._opening is not None else [])
            self._opening = None
            if laid is not None:
                self._opening = entries.make(laid.role, [laid.tokens])
                entries.insert(self._opening, next(iter(entries), None))

    def _prefill(self, entry: Entry) -> None:
        """Prefill what was appended; if that fails, it was not."""
        try:
            self._conversation.prefill()
            if self._conversation.caches.talks:
                self._conversation.catch_up()
        except BaseException:
            self._conversation.entries.remove([entry])
            raise

    def _read(self, messages: Sequence[RoleParts], beside: int) -> list[LaidMessage]:
        """Read messages that must fit the KV cache beside so many tokens."""
        for _, parts in messages:
            for part in parts:
                if part.kind != "text":
                    self._bundle.require_graph(encoder_of(part.kind).name, f"the {part.kind}")
        layout = Layout(self._bundle.manifest, self._codec)
        capacity = self._conversation.capacity
        laid = read_messages(messages, layout, self._codec, Room(capacity, beside))
        require_fit(laid, beside + layout.length + 1, capacity)
        return laid

    def _all(self) -> list[ConversationItem]:
        conversation, start, items = self._conversation, 0, []
        with conversation.entries.lock:
            entries, segments = list(conversation.entries), conversation.entries.segments()
            held = conversation.caches.held.common(Tokens.of(segments))
            for entry in entries:
                if not entry.open:
                    items.append(self._described(entry, start, held))
                start += len(entry)
        return items

    def _described(self, entry: Entry, start: int, held: int) -> ConversationItem:
        ids = Tokens.of(entry.segments).ids
        if entry.result is None:
            content = content_of(ids, entry.role, self._bundle.manifest, self._codec)
        else:
            content = [{"type": "text", "text": entry.result.join(chat_template.TOOL_RESPONSE)}]
        cached = max(0, min(len(ids), held - start))
        return ConversationItem(entry.id, entry.role, content, start, len(ids), cached)
