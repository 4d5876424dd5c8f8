"""Sort a reply's tokens while the thinker writes them: text, tool calls, and the stop string that ends it.

All matching is on bytes: a token may end in the middle of a character. A token is held back, and with it what the
talker would be given of it, while its bytes may still be the beginning of a tool call or of a stop string.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..events import TextDelta, TextEvent, ToolCall
from ..prompt.chat_template import TOOL_CALL
from ..prompt.tokenizer import TextCodec
from .thinker import ThinkerStep
from .tool_calls import CallReader

_BEGIN, _END = (tag.encode() for tag in TOOL_CALL)
#: bytes that go on with a character in UTF-8
_CONTINUED = frozenset(bytes([byte]) for byte in range(0x80, 0xC0))


@dataclass(frozen=True)
class Said:
    """What of a reply counts as said.

    Attributes:
        ids: its tokens.
        first: so many of them are the first ones of the reply.
    """

    ids: list[int]
    first: int
    text: str
    calls: list[ToolCall]


class ReplyText:
    """The text of one reply.

    Nothing from the first tool call on is spoken. What stands between tags and is no call is text.

    Args:
        stop: strings that end the reply and are not part of it.
        tools: look for tool calls.

    Attributes:
        token_ids: of the reply so far.
        spoken: so many of them, the first ones, are text to be shown and spoken.
        silent: nothing more is spoken.
        cut: a stop string was found: so many of the tokens are as the thinker wrote them. Those behind, which spell the
            rest of the text before the stop string, stand in the place of what it did write.
    """

    def __init__(self, codec: TextCodec, stop: Sequence[str] = (), tools: bool = False) -> None:
        self.token_ids: list[int] = []
        self.spoken = 0
        self.silent = False
        self.cut: int | None = None
        self._codec, self._stream = codec, codec.stream()
        self._stop, self._tools = [text.encode() for text in stop], tools
        self._held: list[tuple[int, bytes]] = []  # tokens that are not sorted yet
        self._call: CallReader | None = None
        self._within: list[tuple[int, bytes]] = []  # tokens from the call's tag on
        self._body, self._read = b"", 0  # what follows its tag, and how much of it was read
        self._calls: list[ToolCall] = []
        self._ends: list[int] = []  # tokens up to each call's end
        self._later = ""  # text from the first call on

    def take(self, step: ThinkerStep, time: float) -> list[TextEvent]:
        """Take the next token; gives what is known now."""
        events: list[TextEvent] = []
        if not step.stop:
            self.token_ids.append(step.token_id)
            self._held.append((step.token_id, self._codec.token_bytes(step.token_id)))
            while self._sort(events, time):
                pass
        if step.last or self.cut is not None:
            self._finish(events, step, time)
        return events

    def said(self, texts: int | None = None, calls: int = 0) -> Said:
        """All of it, once it is complete; or its first ``texts`` tokens of text and ``calls`` calls.

        A call stays although text before it was not said: whoever was told of it may be at work.
        """
        if texts is None:
            text = self._codec.decode(self.token_ids[: self.spoken]) + self._later
            return Said(list(self.token_ids), len(self.token_ids), text, self._calls)
        spoken = min(texts, self.spoken)
        ids, later = self.token_ids[:spoken], self.token_ids[self.spoken : self._ends[calls - 1]] if calls else []
        first = spoken + (len(later) if spoken == self.spoken else 0)
        return Said([*ids, *later], first, self._codec.decode(ids), self._calls[:calls])

    def _sort(self, events: list[TextEvent], time: float) -> bool:
        """Sort what is held; whether more of it can be sorted."""
        if self._call is not None:
            return self._read_call(events, time)
        data = b"".join(part for _, part in self._held)
        found = self._find(data)
        start, end, stop = found or (len(data) - self._undecided(data), 0, False)
        rest = data[self._release(self._whole(data, start), events, time) : start]
        if found is None:
            return False
        if stop:
            self._stop_at(rest, events, time)
            return False
        self._begin_call(rest, data[end:], events, time)
        return True

    def _whole(self, data: bytes, start: int) -> int:
        """The last place up to ``start`` where a token ends; with stop strings, one where a character ends too."""
        ends = (end for end in itertools.accumulate(len(part) for _, part in self._held) if end <= start)
        return max((end for end in ends if not self._stop or data[end : end + 1] not in _CONTINUED), default=0)

    def _find(self, data: bytes) -> tuple[int, int, bool] | None:
        """(start, end, whether it is a stop string) of the first tag or stop string."""
        found = [(at, at + len(stop), True) for stop in self._stop if (at := data.find(stop)) >= 0]
        if self._tools and (at := data.find(_BEGIN)) >= 0:
            found.append((len(data[:at].rstrip()), at + len(_BEGIN), False))
        return min(found, default=None)

    def _undecided(self, data: bytes) -> int:
        """How many bytes at the end may be the beginning of a tag, with the white space before it, or a stop string.

        A stop string may follow in the token that ends a character: that is spelled anew with all tokens it is made of.
        """
        most = max((_overlap(data, stop) for stop in self._stop), default=0)
        if self._stop:
            most = max(most, _unfinished(data))
        if self._tools:
            before = data[: len(data) - _overlap(data, _BEGIN)]
            most = max(most, len(data) - len(before.rstrip()))
        return most

    def _release(self, end: int, events: list[TextEvent], time: float) -> int:
        """Tokens that end there or before are text; gives the bytes that they are."""
        done = 0
        while self._held and done + len(self._held[0][1]) <= end:
            token_id, part = self._held.pop(0)
            done += len(part)
            self.spoken += not self.silent
            events.append(self._text(token_id, part, time))
        return done

    def _text(self, token_id: int, part: bytes, time: float) -> TextDelta:
        text = self._stream.take(part)
        if self.silent:
            self._later += text
        return TextDelta(text, token_id, time)

    def _stop_at(self, rest: bytes, events: list[TextEvent], time: float) -> None:
        """The reply ends after ``rest``, the beginning of a token, which is spelled anew."""
        self.cut = len(self.token_ids) - len(self._held)
        del self.token_ids[self.cut :]
        try:
            spelled = self._codec.encode(rest.decode())
        except UnicodeDecodeError:  # no text anyway
            spelled = []
        self._held = [(token_id, self._codec.token_bytes(token_id)) for token_id in spelled]
        self.token_ids += spelled
        self._release(sum(len(part) for _, part in self._held), events, time)

    def _begin_call(self, rest: bytes, body: bytes, events: list[TextEvent], time: float) -> None:
        """A call begins in the tokens that are held, after ``rest``; ``body`` follows its tag, in the last of them."""
        self.silent = True
        if rest:  # shown, but its token holds more than that, so it is not spoken
            events.append(self._text(self._held[0][0], rest, time))
        self._within = [(token_id, part) for token_id, part in self._held]
        self._within[0] = (self._held[0][0], self._held[0][1][len(rest) :])
        last, part = self._within[-1]
        self._within[-1] = (last, part[: len(part) - len(body)])
        self._held = [(last, body)] if body else []
        self._call, self._body, self._read = CallReader(), b"", 0

    def _read_call(self, events: list[TextEvent], time: float) -> bool:
        assert self._call is not None
        if not self._held:
            return False
        self._body += b"".join(part for _, part in self._held)
        self._within += self._held
        last = self._held[-1][0]
        end = self._body.find(_END, self._read)
        until = end if end >= 0 else len(self._body) - _overlap(self._body, _END)
        if until > self._read:
            events += self._call.feed(self._body[self._read : until], time)
            self._read = until
        self._held = []
        if end < 0:
            return False
        rest = self._body[end + len(_END) :]
        if rest:
            token_id, part = self._within[-1]
            self._within[-1] = (token_id, part[: len(part) - len(rest)])
            self._held = [(last, rest)]
        self._end_call(events, time)
        return bool(rest)

    def _end_call(self, events: list[TextEvent], time: float) -> None:
        assert self._call is not None
        call = self._call.call(time)
        if call is None:
            events += [self._text(token_id, part, time) for token_id, part in self._within]
        else:
            events.append(call)
            self._calls.append(call)
            self._ends.append(len(self.token_ids))
        self._call = None

    def _finish(self, events: list[TextEvent], step: ThinkerStep, time: float) -> None:
        """The reply has ended: nothing that is held becomes more than it is."""
        if self._call is not None:
            self._end_call(events, time)
        data = b"".join(part for _, part in self._held)
        if self.silent and not data.strip():  # line breaks around calls
            self._held = []
        self._release(len(data), events, time)
        rest = self._stream.flush()
        if not rest:
            return
        self._later += rest if self.silent else ""
        if events and isinstance(events[-1], TextDelta) and not step.stop:
            events[-1] = replace(events[-1], text=events[-1].text + rest)
        else:
            events.append(TextDelta(rest, step.token_id, time))


def _overlap(data: bytes, wanted: bytes) -> int:
    """The longest beginning of ``wanted``, not all of it, that ``data`` ends with."""
    return next((n for n in range(min(len(data), len(wanted) - 1), 0, -1) if data.endswith(wanted[:n])), 0)


def _unfinished(data: bytes) -> int:
    """Bytes at the end that begin a character in UTF-8 and do not end it."""
    for n, byte in enumerate(reversed(data[-3:]), 1):
        if byte >= 0xC0:
            return n if n < 2 + (byte >= 0xE0) + (byte >= 0xF0) else 0
        if byte < 0x80:
            return 0
    return 0
