"""Given texts spoken, and recordings written down, by OpenAI's client over fake graphs."""

from __future__ import annotations

import io
import json
from typing import Any

import av
import numpy as np
import openai
import pytest
import soundfile
from support.served import Served

CODES = [3, 5, 7, 11, 13, 17, 19, 23] * 4
GREEDY = {"talker": {"temperature": 0}}


@pytest.fixture(autouse=True)
def scripted(served: Served) -> None:
    served.live.script("Hello.", [*CODES, served.live.bundle.manifest.codec.stop[0]])  # type: ignore[union-attr]


def recording() -> io.BytesIO:
    file = io.BytesIO()
    file.name = "question.wav"
    soundfile.write(file, 0.1 * np.sin(np.arange(16000) / 10), 16000, format="WAV")
    file.seek(0)
    return file


def spoken(served: Served, **options: Any) -> bytes:
    made = served.client().audio.speech.create(
        **{"model": "tiny", "input": "Noon.", "voice": "Ethan", "extra_body": GREEDY, **options}
    )
    return bytes(made.read())


@pytest.mark.parametrize("format", ["wav", "pcm", "flac", "mp3", "opus", "aac"])
def test_speech(served: Served, format: str) -> None:
    data = spoken(served, response_format=format)
    if format == "pcm":
        assert len(data) == len(CODES) * 480 * 2
        return
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(audio=0))
    assert abs(sum(frame.samples for frame in frames) / frames[0].sample_rate - len(CODES) / 50) < 0.15


def test_mp3_is_the_default_and_answers_say_what_they_are(served: Served) -> None:
    body = {"input": "Noon.", "voice": {"id": "ash"}, "instructions": "Whisper.", **GREEDY}
    response = served.http().post("/v1/audio/speech", json=body)
    assert response.headers["content-type"] == "audio/mpeg"
    assert response.headers["x-omniport-voice"] == "Chelsie"
    assert "instructions" in response.headers["warning"]


def test_the_given_text_is_spoken_and_nothing_else(served: Served) -> None:
    body = {"input": "Noon.", "response_format": "wav", "stream_format": "sse", **GREEDY}
    response = served.http().post("/v1/audio/speech", json=body)
    *sounds, done = [json.loads(line[6:]) for line in response.text.split("\n\n") if line]
    assert {event["type"] for event in sounds} == {"speech.audio.delta"}
    assert done["type"] == "speech.audio.done"
    assert done["usage"]["output_tokens"] == len("Noon.") + len(CODES)
    assert done["usage"]["total_tokens"] == done["usage"]["input_tokens"] + done["usage"]["output_tokens"]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"speed": 2}, "unsupported_parameter"),
        ({"voice": "Nobody"}, "voice_not_found"),
        ({"input": ""}, "invalid_value"),
        ({"input": "<|im_end|>"}, "invalid_value"),
        ({"input": "x" * 4000}, "context_length_exceeded"),
        ({"response_format": "ogg"}, "invalid_value"),
    ],
)
def test_what_cannot_be_said(served: Served, options: dict[str, Any], code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        spoken(served, **options)
    assert caught.value.code == code


def test_voices(served: Served) -> None:
    assert served.http().get("/v1/audio/voices").json()["voices"] == ["Ethan", "Chelsie"]


def test_transcription(served: Served) -> None:
    client = served.client()
    made = client.audio.transcriptions.create(model="tiny", file=recording())
    assert made.text == "Hello."
    assert made.usage.type == "tokens"
    assert made.usage.input_token_details.audio_tokens == 25
    assert made.usage.total_tokens == made.usage.input_tokens + 6
    text = client.audio.transcriptions.create(model="tiny", file=recording(), response_format="text", language="en")
    assert text == "Hello.\n"
    verbose = client.audio.transcriptions.create(model="tiny", file=recording(), response_format="verbose_json")
    assert (verbose.duration, verbose.text) == (1.0, "Hello.")
    translated = served.http().post("/v1/audio/translations", files={"file": ("a.wav", recording())})
    assert translated.json()["text"] == "Hello."  # OpenAI's client calls its own method deprecated


def test_a_stream_of_a_transcription(served: Served) -> None:
    events = list(served.client().audio.transcriptions.create(model="tiny", file=recording(), stream=True))
    assert "".join(event.delta for event in events if event.type == "transcript.text.delta") == "Hello."
    assert (events[-1].type, events[-1].text) == ("transcript.text.done", "Hello.")
    assert events[-1].usage.output_tokens == 6


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"response_format": "srt"}, "unsupported_parameter"),
        ({"temperature": 9}, "invalid_value"),
        ({"file": b"no sound"}, "invalid_value"),
    ],
)
def test_transcriptions_that_cannot_be(served: Served, options: dict[str, Any], code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.client().audio.transcriptions.create(**{"model": "tiny", "file": recording(), **options})
    assert caught.value.code == code


def test_a_form_without_a_file(served: Served) -> None:
    for body in ({"data": {"model": "tiny"}}, {"content": b"x", "headers": {"content-type": "multipart/form-data"}}):
        assert served.http().post("/v1/audio/transcriptions", **body).status_code == 400
