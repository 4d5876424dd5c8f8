"""POST /v1/audio/transcriptions and /translations: the thinker writes down what is said."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any, Literal

import msgspec
from omniport.runtime import Done, OmniSession, SamplingConfig, TextDelta
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from ..media.medium import RATE, Medium
from ..reply_events import ReplyEvents
from ..service import Service
from .answering import Stream, event_line, kept_alive, place, while_connected
from .api_errors import invalid, told_late, unsupported
from .chat_request import Temperature
from .media_reader import MediaReader
from .routing import Body, json_response, require_model, require_ready
from .usage import token_usage

_FIELDS = 32
_TASKS = {
    "transcribe": "Write down what is said in this recording, word for word, in the language that is spoken.",
    "translate": "Write down in English what is said in this recording.",
}
_ALONE = "Answer with that text alone."


class TranscriptionRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of the form, beside its file."""

    model: str | None = None
    language: str | None = None
    prompt: str | None = None
    response_format: str = "json"
    temperature: Temperature = 0.0
    stream: Literal["true", "false"] = "false"


#: a form, of which texts that are empty count as left out
FORM = Body(
    record=TranscriptionRequest,
    media_type="multipart/form-data",
    more={"file": {"type": "string", "format": "binary"}},
    needed=("file",),
)


async def transcribe(request: Request, service: Service) -> Response:
    """What is said, in its language."""
    return await _respond(request, service, "transcribe")


async def translate(request: Request, service: Service) -> Response:
    """What is said, in English."""
    return await _respond(request, service, "translate")


async def _respond(request: Request, service: Service, task: str) -> Response:
    require_ready(service)
    async with request.form(max_files=1, max_fields=_FIELDS) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise invalid("there is no file; a form with a recording was expected", "file")
        data = await file.read()
        given = {name: value for name, value in form.items() if isinstance(value, str) and value}
    try:
        asked = msgspec.convert(
            given | {"stream": given.get("stream", "false").lower()}, TranscriptionRequest, strict=False
        )
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$.")
        raise invalid(problem, path.rstrip("`") or None) from error
    require_model(service, asked.model)
    if asked.response_format not in ("json", "text", "verbose_json"):
        message = f"{asked.response_format!r:.100} is not supported: the model gives no times; json, text, verbose_json"
        raise unsupported("response_format", message)
    return await while_connected(request, service, _answer(service, asked, data, task))


async def _answer(service: Service, asked: TranscriptionRequest, data: bytes, task: str) -> Response:
    session = service.session
    sampling = sampling_of(session, asked.temperature)
    async with AsyncExitStack() as held:
        await held.enter_async_context(place(service))
        part = await MediaReader(service).read(Medium(kind="audio", data=data), "file")
        messages = [
            {
                "role": "user",
                "content": [part, {"type": "text", "text": instruction(asked.language, asked.prompt, task)}],
            }
        ]
        events = await held.enter_async_context(
            ReplyEvents(lambda: session.reply(messages, speak=False, thinker=sampling), service.waiting)
        )
        if asked.stream == "true":
            lines = kept_alive(_lines(events, service))
            return Stream(lines, held.pop_all(), service, "text/event-stream")
        done = None
        async for event in events:
            done = event
        assert isinstance(done, Done), "a reply ends with Done"
        service.measurements.reply(done)
        return _written(done, asked, task, len(part["audio"][0]) / RATE)


def instruction(language: str | None, prompt: str | None, task: str = "transcribe") -> str:
    """What the thinker is asked to do with the sound before it."""
    spoken = f" The language is {language}." if language and task == "transcribe" else ""
    hint = f" These words may occur in it: {prompt}" if prompt else ""
    return f"{_TASKS[task]}{spoken} {_ALONE}{hint}"


def sampling_of(session: OmniSession, temperature: float = 0.0) -> SamplingConfig:
    """The thinker's: as a rule it writes what is likeliest."""
    return msgspec.structs.replace(session.manifest.thinker_sampling, temperature=temperature)


def _written(done: Done, asked: TranscriptionRequest, task: str, seconds: float) -> Response:
    text = done.text.strip()
    if asked.response_format == "text":
        return PlainTextResponse(text + "\n")
    body: dict[str, Any] = {"text": text, "usage": token_usage(done.stats)}
    if asked.response_format == "verbose_json":
        language = "english" if task == "translate" else asked.language or ""
        body |= {"task": task, "language": language, "duration": seconds, "segments": []}
        body["usage"] = {"type": "duration", "seconds": seconds}
    return json_response(body)


async def _lines(events: ReplyEvents, service: Service) -> AsyncIterator[bytes]:
    try:
        async for event in events:
            if isinstance(event, TextDelta) and event.text:
                yield event_line({"type": "transcript.text.delta", "delta": event.text})
            elif isinstance(event, Done):
                service.measurements.reply(event)
                body = {"type": "transcript.text.done", "text": event.text.strip(), "usage": token_usage(event.stats)}
                yield event_line(body)
    except Exception as error:  # noqa: BLE001  the status was sent long ago
        yield event_line(told_late(error).body())
