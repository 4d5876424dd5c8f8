"""The trained model answers by every way in: the words are right, and they are heard in its speech.

Wren was taught no dictation. Without the instruction to write down what is said it answers that: what is to write down
then has right words only if the sound went in as it was.
"""

from __future__ import annotations

import asyncio
import base64
import io
from typing import Any

import numpy as np
import pytest
import soundfile
from omniport.export.evaluation.hearing import words
from support.dashscope_client import Events
from support.realtime import connected, until
from support.served import ServedSession
from support.spoken_questions import Listener, SpokenQuestion, question
from support.wyoming_client import ask

TOMATO = "A tomato is red."
TWELVE = "After eleven comes twelve."
FIFTEEN = "Four plus eleven is fifteen."
BACKWARDS = "Seven, six, five, four, three, two."
SUNDAY = "Before Monday comes Sunday."


@pytest.fixture
def no_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("http.transcription", "wyoming.replies"):
        monkeypatch.setattr(f"omniport.serve.{module}.instruction", lambda *_: "")


def spoken_to(asked: SpokenQuestion) -> Any:
    data = base64.b64encode(asked.path.read_bytes()).decode()
    return {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": data, "format": "flac"}}]}


def test_a_chat(wren: ServedSession, listener: Listener) -> None:
    asked = question(FIFTEEN)
    reply = wren.client().chat.completions.create(
        model=wren.service.model,
        messages=[spoken_to(asked)],
        modalities=["text", "audio"],
        audio={"voice": "Ethan", "format": "wav"},
    )
    message = reply.choices[0].message
    assert message.content == FIFTEEN
    assert message.audio is not None
    sound, rate = soundfile.read(io.BytesIO(base64.b64decode(message.audio.data)), dtype="float32")
    assert rate == 24000
    assert listener.hears(sound, FIFTEEN)
    assert not listener.hears(sound, BACKWARDS), "other words are heard as other words"
    assert not listener.hears(asked.sound, FIFTEEN)


def test_a_chat_that_is_streamed(wren: ServedSession, listener: Listener) -> None:
    text, sound = "", b""
    for chunk in wren.client().chat.completions.create(
        model=wren.service.model,
        messages=[spoken_to(question(BACKWARDS))],
        modalities=["text", "audio"],
        audio={"voice": "Chelsie", "format": "pcm16"},
        stream=True,
    ):
        delta = chunk.choices[0].delta
        text += delta.content or ""
        if (audio := getattr(delta, "audio", None)) is not None:
            sound += base64.b64decode(getattr(audio, "data", None) or "")
    assert text == BACKWARDS
    assert listener.hears(sound, BACKWARDS)


def test_a_given_text(wren: ServedSession, listener: Listener) -> None:
    response = wren.client().audio.speech.create(
        model=wren.service.model, voice="Ethan", input=TOMATO, response_format="pcm"
    )
    assert listener.hears(response.read(), TOMATO)


@pytest.mark.usefixtures("no_instruction")
def test_a_recording_that_is_written_down(wren: ServedSession) -> None:
    told = wren.client().audio.transcriptions.create(model=wren.service.model, file=question(TWELVE).path)
    assert told.text == TWELVE


def test_realtime(wren: ServedSession, listener: Listener) -> None:
    """Two turns, whose ends Silero's detector hears."""
    with connected(wren, audio={"output": {"voice": "Ethan"}}) as connection:
        for answer in (FIFTEEN, SUNDAY):  # Ethan's are heard right whatever codes are sampled
            for piece in question(answer).pieces():
                connection.input_audio_buffer.append(audio=base64.b64encode(piece).decode())
            came = until(connection, "response.done")
            sound = b"".join(base64.b64decode(e.delta) for e in came if e.type == "response.output_audio.delta")
            (item,) = came[-1].response.output
            assert item.content[0].transcript == answer
            assert listener.hears(sound, answer)


def test_dashscope(wren: ServedSession, listener: Listener) -> None:
    """Earlier names, by hand, at 16 kHz."""
    from dashscope.audio.qwen_omni import MultiModality, OmniRealtimeConversation

    events, asked = Events(), question(SUNDAY)
    url = f"ws{wren.url[4:]}/v1/realtime"
    conversation = OmniRealtimeConversation(model="qwen-omni", callback=events, url=url, api_key="none")
    conversation.connect()
    try:
        conversation.update_session([MultiModality.TEXT, MultiModality.AUDIO], "Chelsie", enable_turn_detection=False)
        samples, rate = soundfile.read(asked.path, dtype="int16")
        assert rate == 16000
        for piece in np.array_split(samples, 20):
            conversation.append_audio(base64.b64encode(piece.tobytes()).decode())
        conversation.commit()
        conversation.create_response()
        came = events.until("response.done")
        conversation.end_session()
    finally:
        conversation.close()
    assert "".join(e["delta"] for e in came if e["type"] == "response.audio_transcript.delta") == SUNDAY
    sound = b"".join(base64.b64decode(e["delta"]) for e in came if e["type"] == "response.audio.delta")
    assert listener.hears(sound, SUNDAY)


@pytest.mark.usefixtures("no_instruction")
def test_wyoming(wren: ServedSession, listener: Listener) -> None:
    """Home Assistant's pipeline: what is said is written down, a text is answered, the answer is spoken."""
    from wyoming.asr import Transcribe, Transcript
    from wyoming.audio import AudioChunk, AudioStart, AudioStop
    from wyoming.client import AsyncTcpClient
    from wyoming.handle import Handled
    from wyoming.tts import Synthesize, SynthesizeVoice

    format = {"rate": 24000, "width": 2, "channels": 1}

    async def work() -> tuple[str, str, bytes]:
        async with AsyncTcpClient(*wren.wyoming, connect_timeout=10, read_timeout=60) as client:
            chunks = [AudioChunk(**format, audio=piece) for piece in question(TWELVE).pieces(before=0, behind=0)]
            came = await ask(client, "transcript-stop", Transcribe(), AudioStart(**format), *chunks, AudioStop())
            written = Transcript.from_event(came[-2]).text
            came = await ask(client, "handled-stop", Transcript("What colour is a tomato?"))
            answered = Handled.from_event(came[-2]).text
            came = await ask(client, "audio-stop", Synthesize(answered, SynthesizeVoice("Ethan")))
            return written, answered, b"".join(event.payload or b"" for event in came if event.type == "audio-chunk")

    written, answered, sound = asyncio.run(work())
    assert words(written) == words(TWELVE)
    assert answered == TOMATO
    assert listener.hears(sound, TOMATO)
