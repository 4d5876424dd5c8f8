"""One response: its events in the order that clients expect, and what it was in the end."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from omniport.runtime import AudioChunk, Done, TextDelta, ToolCall, Turn

from ...http.api_errors import told_late
from ..item_list import Item, ItemList, new_id
from ..session_settings import SessionSettings
from ..wire.outbox import Outbox
from ..wire.wire_sound import OutgoingSound
from .heard_sound import Playback
from .response_usage import response_usage

_TEXTS = {"audio": "output_audio_transcript", "text": "output_text"}
Reason = Literal["turn_detected", "client_cancelled"]


@dataclass(frozen=True)
class Question:
    """What was said, and is not answered yet.

    Attributes:
        sound: samples and their rate. turn: of the runtime, with all of it.
    """

    item: Item
    sound: tuple[NDArray[np.float32], int]
    turn: Turn


class Response:
    """A response that is made.

    Args:
        conversation: id of the conversation that it belongs to; None for one that stands apart.
        rate: of the speech, Hz.

    Attributes:
        message: the assistant's item; None as long as nothing was said.
        reason: why it is stopped.
        question: that it answers; None: the conversation as it stands, or these ``messages`` instead.
        turn: of the runtime; None before it has begun. task: what makes it.
        runtime_id: of the message that it is in the runtime's conversation, once it has ended.
        playback: how much of it was heard.
    """

    def __init__(
        self,
        outbox: Outbox,
        items: ItemList,
        settings: SessionSettings,
        *,
        conversation: str | None,
        metadata: dict[str, Any] | None,
        rate: int,
    ) -> None:
        self.id = new_id("resp")
        self.settings, self.conversation, self.metadata = settings, conversation, metadata
        self.message: Item | None = None
        self.reason: Reason | None = None
        self.turn: Turn | None = None
        self.task: asyncio.Task[None] | None = None
        self.question: Question | None = None
        self.messages: list[dict[str, Any]] | None = None
        self.playback = Playback()
        self.done: Done | None = None
        self.error: Exception | None = None
        self.output: list[Item] = []
        self.runtime_id: str | None = None
        self._outbox, self._items = outbox, items
        self._after = items.last_id or "root"
        self._text, self._sound = "", OutgoingSound(settings.output_format, rate)
        self._kind = "audio" if settings.speak else "text"

    def stopped(self) -> bool:
        """Whether it shall end now."""
        return self.reason is not None

    def begin(self) -> None:
        """It is asked for."""
        self._outbox.put("response.created", response=self.described("in_progress"))

    def take(self, event: TextDelta | AudioChunk) -> None:
        """The next piece of what is said."""
        if isinstance(event, TextDelta):
            if event.text:
                self._open_message()
                self._text += event.text
                self._part(f"{_TEXTS[self._kind]}.delta", event.text)
        else:
            self._open_message()
            self._send_sound(self._sound.push(event.samples))

    def finish(self) -> None:
        """It has ended, as ``done`` or ``error`` says."""
        status = self._status()
        if self.message is not None:
            self.message.runtime_id = self.runtime_id
            self._close_message("completed" if status == "completed" else "incomplete")
        if self.done is not None:
            for call in self.done.tool_calls:
                self._call(call)
        self._outbox.put("response.done", response=self.described(status))
        self._outbox.put("rate_limits.updated", rate_limits=[])

    def described(self, status: str) -> dict[str, Any]:
        """The response as clients read it."""
        settings = self.settings
        described = {
            "id": self.id,
            "object": "realtime.response",
            "status": status,
            "status_details": self._details(status),
            "output": [item.described() for item in self.output] if status != "in_progress" else [],
            "conversation_id": self.conversation,
            "output_modalities": settings.modalities,
            "max_output_tokens": settings.max_output_tokens,
            "audio": {"output": {"format": settings.output_format.described(), "voice": settings.voice}},
            "metadata": self.metadata,
            "usage": None,
        }
        if status != "in_progress":
            stats = None if self.done is None else self.done.stats
            described["usage"] = response_usage(stats)
            if stats is not None:
                described["omniport"] = {
                    "time_to_first_audio": stats.time_to_first_audio,
                    "rtf": stats.real_time_factor,
                    "underruns": stats.underruns,
                    "heard_ms": round(self.playback.heard * 1000),
                }
        return described

    def _status(self) -> str:
        if self.error is not None:
            return "failed"
        if self.done is None or self.done.finish_reason == "cancelled":
            return "cancelled"
        return "incomplete" if self.done.finish_reason in ("length", "context") else "completed"

    def _details(self, status: str) -> dict[str, Any] | None:
        if status == "failed" and self.error is not None:
            told = told_late(self.error)
            return {"type": status, "error": {"type": told.kind, "code": told.code, "message": str(told)}}
        if status == "cancelled":
            return {"type": status, "reason": self.reason or "client_cancelled"}
        return {"type": status, "reason": "max_output_tokens"} if status == "incomplete" else None

    def _open_message(self) -> None:
        if self.message is not None:
            return
        self.message = Item(new_id("item"), {"type": "message", "role": "assistant", "content": []}, "in_progress")
        self._add(self.message)
        self._part("content_part.added", part=self._told_part(""))

    def _close_message(self, status: str) -> None:
        message = self.message
        assert message is not None
        if self._kind == "audio":
            self._send_sound(self._sound.finish())
            self._part("output_audio.done")
            self._part("output_audio_transcript.done", transcript=self._text)
        else:
            self._part("output_text.done", text=self._text)
        self._part("content_part.done", part=self._told_part(self._text))
        text = {"type": "output_audio", "transcript": self._text}
        if self._kind == "text":
            text = {"type": "output_text", "text": self._text}
        message.fields["content"], message.status = [text], status
        self._end(message)

    def _call(self, call: ToolCall) -> None:
        item = Item(
            new_id("item"),
            {"type": "function_call", "call_id": call.id, "name": call.name, "arguments": ""},
            "in_progress",
        )
        self._add(item)
        index = self.output.index(item)
        where: dict[str, Any] = {"response_id": self.id, "item_id": item.id, "output_index": index, "call_id": call.id}
        self._outbox.put("response.function_call_arguments.delta", **where, delta=call.arguments)
        self._outbox.put("response.function_call_arguments.done", **where, name=call.name, arguments=call.arguments)
        item.fields["arguments"], item.status = call.arguments, "completed"
        self._end(item)

    def _add(self, item: Item) -> None:
        self.output.append(item)
        item.runtime_id = self.runtime_id
        index = len(self.output) - 1
        self._outbox.put("response.output_item.added", response_id=self.id, output_index=index, item=item.described())
        if self.conversation is not None:
            after = self._after if self._after == "root" or self._items.get(self._after) else None
            previous = self._items.insert(item, after)
            self._after = item.id
            self._outbox.put("conversation.item.added", item=item.described(), previous_item_id=previous)

    def _end(self, item: Item) -> None:
        if self.conversation is not None:
            self._outbox.put("conversation.item.done", item=item.described(), previous_item_id=self._items.before(item))
        index = self.output.index(item)
        self._outbox.put("response.output_item.done", response_id=self.id, output_index=index, item=item.described())

    def _told_part(self, text: str) -> dict[str, Any]:
        return {"type": self._kind, "transcript" if self._kind == "audio" else "text": text}

    def _send_sound(self, pieces: Any) -> None:
        for data, seconds in pieces:
            self._part("output_audio.delta", data, seconds)

    def _part(self, type: str, delta: str | None = None, seconds: float = 0.0, **fields: Any) -> None:
        assert self.message is not None
        if delta is not None:
            fields["delta"] = delta
        self._outbox.put(
            f"response.{type}",
            seconds,
            self.playback.written if seconds else None,
            response_id=self.id,
            item_id=self.message.id,
            output_index=0,
            content_index=0,
            **fields,
        )
