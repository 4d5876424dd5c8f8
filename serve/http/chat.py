"""POST /v1/chat/completions, whole or streamed."""

from __future__ import annotations

import base64
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
from omniport.runtime import AudioChunk, Done, TextDelta, ToolCall
from starlette.requests import Request
from starlette.responses import Response

from ..media.sound_formats import Encoder, encode, encoder
from ..reply_events import ReplyEvents
from ..service import Service
from .answering import Stream, event_line, kept_alive, place, read_json, while_connected
from .api_errors import told_late
from .chat_messages import read_messages
from .chat_request import ChatRequest, parse, reply_options
from .routing import json_response, require_model, require_ready
from .usage import chat_usage

_ENDS = {"stop": "stop", "tool_calls": "tool_calls", "length": "length", "context": "length"}


async def chat(request: Request, service: Service) -> Response:
    """Answer a chat that is given whole."""
    require_ready(service)
    asked = parse(await read_json(request))
    require_model(service, asked.model)
    bare = service.settings.dialect == "dashscope" or request.headers.get("x-dashscope-compat") == "1"
    return await while_connected(request, service, _answer(service, asked, header=not bare))


async def _answer(service: Service, asked: ChatRequest, header: bool) -> Response:
    async with AsyncExitStack() as held:
        await held.enter_async_context(place(service))
        messages = await read_messages(asked.messages, service, asked.hear_videos)
        tools = asked.tools if asked.tool_choice == "auto" else []
        session = held.enter_context(service.sessions.borrow(asked.messages, tools))
        options, reply = reply_options(asked, service), _Reply(service, asked)
        made = None if reply.format is None else encoder(reply.format, reply.rate, header=header)

        def begin() -> Any:
            session.items.replace(messages, tools)
            return session.turn(**options).answer(drop=False)

        events = await held.enter_async_context(ReplyEvents(begin, service.waiting))
        headers = {"x-omniport-voice": session.bundle.find_voice(options["voice"]).name} if asked.speak else {}
        if asked.stream:
            lines = kept_alive(_chunks(events, reply, made))
            return Stream(lines, held.pop_all(), service, "text/event-stream", {"cache-control": "no-cache", **headers})
        return json_response(await _whole(events, reply), headers=headers)


class _Reply:
    """A reply as its client knows it."""

    def __init__(self, service: Service, asked: ChatRequest) -> None:
        self.service, self.asked = service, asked
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self.audio, self.expires = service.spoken.new()
        self.calls = 0  # told so far
        vocoder = service.session.manifest.vocoder
        self.format = asked.audio.format if asked.speak and asked.audio is not None else None
        self.rate = 24000 if vocoder is None else vocoder.sample_rate

    def record(self, kind: str, choices: list[dict[str, Any]], usage: object) -> dict[str, Any]:
        """The object around choices."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.asked.model or self.service.model,
            "system_fingerprint": f"fp_{self.service.fingerprint}",
            "choices": choices,
            "usage": usage,
        }

    def chunk(self, delta: dict[str, Any], reason: str | None = None) -> bytes:
        """A line of the stream."""
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return event_line(self.record("chat.completion.chunk", [choice], None))

    def ended(self, done: Done) -> str:
        """The reply is complete: why it ended, in OpenAI's words."""
        self.service.measurements.reply(done)
        if self.format is not None:
            self.service.spoken.keep(self.audio, done.text)
        if done.finish_reason == "stop" and done.speech_finish_reason in ("length", "context"):
            return "length"  # it was written to its end, and not said to it
        return _ENDS.get(done.finish_reason, "stop")


async def _whole(events: ReplyEvents, reply: _Reply) -> dict[str, Any]:
    sound: list[np.ndarray[Any, np.dtype[np.float32]]] = []
    done: Done | None = None
    async for event in events:
        if isinstance(event, AudioChunk):
            sound.append(event.samples)
        elif isinstance(event, Done):
            done = event
    assert done is not None, "a reply ends with Done"
    reason = reply.ended(done)
    message: dict[str, Any] = {"role": "assistant", "content": done.text, "refusal": None, "annotations": []}
    if reply.format is not None:
        data = encode(reply.format, np.concatenate(sound or [np.zeros(0, np.float32)]), reply.rate)
        message["audio"] = {
            "id": reply.audio,
            "data": base64.b64encode(data).decode(),
            "expires_at": reply.expires,
            "transcript": done.text,
        }
    if done.tool_calls:
        message["content"] = done.text or None
        message["tool_calls"] = [_call(call) for call in done.tool_calls]
    choice = {"index": 0, "finish_reason": reason, "logprobs": None, "message": message}
    return reply.record("chat.completion", [choice], chat_usage(done.stats))


async def _chunks(events: ReplyEvents, reply: _Reply, made: Encoder | None) -> AsyncIterator[bytes]:
    """Lines of the stream; an error is told in one, after which nothing follows."""
    yield reply.chunk({"role": "assistant", "content": "", "refusal": None})
    try:
        async for event in events:
            if isinstance(event, Done):
                for line in _ending(event, reply, made):
                    yield line
            elif delta := _delta(event, reply, made):
                yield reply.chunk(delta)
    except Exception as error:  # noqa: BLE001  the status was sent long ago
        yield event_line(told_late(error).body())
        return
    yield b"data: [DONE]\n\n"


def _delta(event: object, reply: _Reply, made: Encoder | None) -> dict[str, Any]:
    """What an event adds; nothing while a character or a piece of sound is incomplete."""
    if isinstance(event, TextDelta) and event.text:
        spoken = {"audio": {"id": reply.audio, "transcript": event.text}} if made is not None else {}
        return {"content": event.text, **spoken}
    if isinstance(event, AudioChunk) and made is not None and (data := made.add(event.samples)):
        return _sound(reply, data)
    if isinstance(event, ToolCall):
        reply.calls += 1
        return {"tool_calls": [{"index": reply.calls - 1, **_call(event)}]}
    return {}


def _ending(done: Done, reply: _Reply, made: Encoder | None) -> list[bytes]:
    reason = reply.ended(done)
    lines = []
    if made is not None:
        if rest := made.finish():
            lines.append(reply.chunk(_sound(reply, rest)))
        lines.append(reply.chunk({"audio": {"id": reply.audio, "expires_at": reply.expires}}))
    lines.append(reply.chunk({}, reason))
    if reply.asked.stream_options.include_usage:
        lines.append(event_line(reply.record("chat.completion.chunk", [], chat_usage(done.stats))))
    return lines


def _sound(reply: _Reply, data: bytes) -> dict[str, Any]:
    return {"audio": {"id": reply.audio, "data": base64.b64encode(data).decode()}}


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
