"""POST /v1/audio/speech: a given text is spoken; GET /v1/audio/voices."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any, Literal

import msgspec
from omniport.runtime import AudioChunk, Done
from omniport.runtime.speech.ode_methods import SolverChoice
from starlette.requests import Request
from starlette.responses import Response

from ..media.sound_formats import Encoder, encoder, media_type
from ..reply_events import ReplyEvents
from ..service import Service
from .answering import Stream, convert, event_line, kept_alive, place, read_json, while_connected
from .api_errors import told_late, unsupported
from .chat_request import TalkerOptions, VoiceId, seed_of, talker_sampling, voice_of
from .routing import json_response, require_model, require_ready
from .usage import token_usage


class SpeechRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What is read of the body; the fields after ``stream_format`` are not OpenAI's."""

    input: str
    model: str | None = None
    voice: str | VoiceId | None = None
    response_format: Literal["mp3", "opus", "aac", "flac", "wav", "pcm"] = "mp3"
    speed: float = 1.0
    instructions: str | None = None
    stream_format: Literal["audio", "sse"] = "audio"
    seed: int | None = None
    talker: TalkerOptions = TalkerOptions()
    solver: SolverChoice = "auto"


async def speak(request: Request, service: Service) -> Response:
    """Speak a text word for word; sound is sent as it is made."""
    require_ready(service)
    body = await read_json(request)
    asked = convert({name: value for name, value in body.items() if value is not None}, SpeechRequest)
    require_model(service, asked.model)
    if asked.speed != 1.0:
        raise unsupported("speed", f"speed is {asked.speed:g}; only 1.0 is supported")
    return await while_connected(request, service, _answer(service, asked))


async def list_voices(request: Request, service: Service) -> Response:
    """The bundle's voices."""
    voices = [{"id": name, "name": name} for name in service.voice_names]
    return json_response({"object": "list", "voices": service.voice_names, "data": voices})


async def _answer(service: Service, asked: SpeechRequest) -> Response:
    session = service.session
    options: dict[str, Any] = {
        "voice": voice_of(service, asked.voice, "voice"),
        "talker": talker_sampling(session.manifest, asked.talker),
        "seed": seed_of(asked.seed),
        "solver": asked.solver,
        "say": asked.input,
    }
    async with AsyncExitStack() as held:
        await held.enter_async_context(place(service))
        events = await held.enter_async_context(ReplyEvents(lambda: session.reply([], **options), service.waiting))
        headers = {"x-omniport-voice": session.bundle.find_voice(options["voice"]).name}
        if asked.instructions:
            headers["warning"] = '299 omniport "instructions are ignored"'
        vocoder = session.manifest.vocoder
        assert vocoder is not None, "a session refuses to speak without"
        made = encoder(asked.response_format, vocoder.sample_rate)
        if asked.stream_format == "sse":
            lines = kept_alive(_lines(events, made, service))
            return Stream(lines, held.pop_all(), service, "text/event-stream", headers)
        return Stream(
            _sound(events, made, service), held.pop_all(), service, media_type(asked.response_format), headers
        )


async def _encoded(events: ReplyEvents, made: Encoder, service: Service) -> AsyncIterator[tuple[bytes, Done | None]]:
    """Pieces of the encoded sound; the last one, which may be empty, with the reply's end."""
    async for event in events:
        if isinstance(event, AudioChunk):
            yield made.add(event.samples), None
        elif isinstance(event, Done):
            service.measurements.reply(event)
            yield made.finish(), event


async def _sound(events: ReplyEvents, made: Encoder, service: Service) -> AsyncIterator[bytes]:
    async for data, _ in _encoded(events, made, service):
        if data:
            yield data


async def _lines(events: ReplyEvents, made: Encoder, service: Service) -> AsyncIterator[bytes]:
    try:
        async for data, done in _encoded(events, made, service):
            if data:
                yield event_line({"type": "speech.audio.delta", "audio": base64.b64encode(data).decode()})
            if done is not None:
                yield event_line({"type": "speech.audio.done", "usage": token_usage(done.stats)})
    except Exception as error:  # noqa: BLE001  the status was sent long ago
        yield event_line(told_late(error).body())
