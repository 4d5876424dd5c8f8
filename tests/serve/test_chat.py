"""Chat completions by OpenAI's client, unmodified, over fake graphs whose replies are scripted."""

from __future__ import annotations

import base64
import io
import itertools
import json
import threading
import time
from typing import Any

import av
import numpy as np
import openai
import pytest
import soundfile
from omniport.runtime import OmniSession
from PIL import Image
from support.served import Served

HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
SPOKEN: dict[str, Any] = {"modalities": ["text", "audio"], "audio": {"voice": "Ethan", "format": "wav"}}
CODES = [3, 5, 7, 11, 13, 17, 19, 23] * 4


def say(served: Served, text: str) -> None:
    served.live.script(text, [*CODES, served.live.bundle.manifest.codec.stop[0]])  # type: ignore[union-attr]


_COUNT = itertools.count()


def hello() -> list[dict[str, Any]]:
    """A question that was not asked before: the fake counts a reply's steps from the tokens that are prefilled."""
    return [{"role": "user", "content": f"{next(_COUNT)} Hello"}]


def ask(served: Served, messages: list[dict[str, Any]] | None = None, **options: Any) -> Any:
    options = {"model": "tiny", "seed": 1, **options}
    messages = messages or hello()
    if "modalities" in options:
        options.setdefault("extra_body", {"talker": {"temperature": 0}})
    return served.client().chat.completions.create(messages=messages, **options)


def wav(seconds: float = 0.5, rate: int = 16000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, 0.1 * np.sin(np.arange(int(seconds * rate)) / 10), rate, format="WAV")
    return file.getvalue()


def png(width: int = 56, height: int = 84) -> str:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 80, 20)).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def refused(served: Served, body: dict[str, Any]) -> tuple[int, str, str | None]:
    """(status, code, param) of an error."""
    response = served.http().post("/v1/chat/completions", json={"messages": HELLO, **body})
    error = response.json()["error"]
    assert error["message"]
    return response.status_code, error["code"], error["param"]


def test_text(served: Served) -> None:
    say(served, "Hi!")
    made = ask(served)
    (choice,) = made.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Hi!", "stop")
    assert made.id.startswith("chatcmpl-")
    assert (made.object, made.model) == ("chat.completion", "tiny")
    assert abs(made.created - time.time()) < 60
    assert choice.message.audio is None
    usage = made.usage
    assert (usage.completion_tokens, usage.total_tokens) == (3, usage.prompt_tokens + 3)
    details = usage.prompt_tokens_details
    assert details.text_tokens == usage.prompt_tokens > 5
    assert (details.audio_tokens, usage.completion_tokens_details.audio_tokens) == (0, 0)


def test_speech(served: Served) -> None:
    say(served, "Hi!")
    made = ask(served, **SPOKEN)
    message = made.choices[0].message
    assert message.content == message.audio.transcript == "Hi!"
    assert 3500 < message.audio.expires_at - time.time() <= 3600
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(message.audio.data)))
    assert (rate, len(samples)) == (24000, len(CODES) * 480)
    assert made.usage.completion_tokens_details.audio_tokens == len(CODES)
    assert made.usage.completion_tokens == 3 + len(CODES)


@pytest.mark.parametrize("format", ["pcm16", "flac", "mp3", "opus", "aac"])
def test_formats(served: Served, format: str) -> None:
    say(served, "Hi!")
    whole = ask(served, **SPOKEN | {"audio": {"voice": "Ethan", "format": format}})
    streamed = ask(served, **SPOKEN | {"audio": {"voice": "Ethan", "format": format}}, stream=True)
    for data in (base64.b64decode(whole.choices[0].message.audio.data), b"".join(sound_of(streamed))):
        if format == "pcm16":
            assert len(data) == len(CODES) * 480 * 2
            continue
        with av.open(io.BytesIO(data)) as container:
            frames = list(container.decode(audio=0))
        rate = frames[0].sample_rate
        seconds = sum(frame.samples for frame in frames) / rate
        assert abs(seconds - len(CODES) * 480 / 24000) < 0.15  # an encoder pads the ends


def sound_of(chunks: Any) -> list[bytes]:
    found = []
    for chunk in chunks:
        audio = getattr(chunk.choices[0].delta, "audio", None) if chunk.choices else None
        if audio is not None and audio.data:
            found.append(base64.b64decode(audio.data))
    return found


def test_a_stream_of_text(served: Served) -> None:
    say(served, "Hi you!")
    chunks = list(ask(served, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == len({chunk.created for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    first, *_, ended, usage = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Hi you!"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-2]] == [None] * (len(chunks) - 2)
    assert ended.choices[0].finish_reason == "stop"
    assert usage.choices == []
    assert usage.usage.completion_tokens == 7
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_of_speech_is_in_order(served: Served) -> None:
    say(served, "Hi you!")
    body = {"messages": HELLO, "stream": True, "talker": {"temperature": 0}, **SPOKEN}
    body["audio"] = {"voice": "alloy", "format": "pcm16"}
    response = served.http().post("/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-omniport-voice"] == "Chelsie"
    *lines, end = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert end == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert chunks[-1]["choices"][0] == {"index": 0, "delta": {}, "finish_reason": "stop", "logprobs": None}
    (sound,) = {chunk["choices"][0]["delta"]["audio"]["id"] for chunk in chunks[1:-1]}
    expiry = chunks[-2]["choices"][0]["delta"]["audio"]
    assert expiry.keys() == {"id", "expires_at"}
    text, samples = "", 0
    for chunk in chunks[1:-2]:
        delta = chunk["choices"][0]["delta"]
        if "content" in delta:
            assert delta["content"] == delta["audio"]["transcript"]
            text += delta["content"]
        else:
            assert delta["audio"].keys() == {"id", "data"}
            samples += len(base64.b64decode(delta["audio"]["data"])) // 2
    assert (text, samples) == ("Hi you!", len(CODES) * 480)
    assert served.service.spoken.find(sound) == "Hi you!"


def test_a_stream_of_wav_has_one_header_and_dashscope_s_none(served: Served) -> None:
    for headers, size in (({}, 44), ({"x-dashscope-compat": "1"}, 0)):
        say(served, "Hi!")
        made = ask(served, **SPOKEN, stream=True, extra_headers=headers)
        data = b"".join(sound_of(made))
        assert len(data) == size + len(CODES) * 480 * 2
        assert data.startswith(b"RIFF\xff\xff\xff\xffWAVE") == bool(size)


def test_a_chat_that_goes_on_is_not_prefilled_again(served: Served) -> None:
    say(served, "Hi!")
    first = ask(served, [{"role": "system", "content": "Be brief."}, *HELLO])
    chat = [{"role": "system", "content": "Be brief."}, *HELLO, first.choices[0].message.to_dict()]
    second = ask(served, [*chat, {"role": "user", "content": "And now?"}])
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached >= first.usage.prompt_tokens + 3
    other = ask(served, [{"role": "user", "content": "Something else"}])
    assert other.usage.prompt_tokens_details.cached_tokens < first.usage.prompt_tokens
    third = ask(served, [*chat, {"role": "user", "content": "And then?"}])
    assert third.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens + 3


def test_instructions_stand_beside_the_speech_prompt(served: Served) -> None:
    for role in ("system", "developer"):
        ask(served, [{"role": role, "content": "Be brief."}, *HELLO], **SPOKEN)
    texts = [
        item.content[0]["text"] for kept in served.service.sessions.kept for item in kept.items if item.role == "system"
    ]
    assert "You are Qwen.\n\nBe brief." in texts


def test_a_reply_is_named_by_its_sound(served: Served) -> None:
    say(served, "Hi!")
    sound = ask(served, **SPOKEN).choices[0].message.audio.id
    chat = [*HELLO, {"role": "assistant", "audio": {"id": sound}}, {"role": "user", "content": "Go on"}]
    assert ask(served, chat).choices[0].message.content == "Hi!"
    chat[1] = {"role": "assistant", "audio": {"id": "audio_gone"}}
    assert refused(served, {"messages": chat}) == (400, "audio_not_found", "messages[1].audio.id")


MEDIA: list[tuple[dict[str, Any], str]] = [
    ({"type": "input_audio", "input_audio": {"data": b64(wav()), "format": "wav"}}, "audio_tokens"),
    ({"type": "input_audio", "input_audio": {"data": f"data:;base64,{b64(wav())}"}}, "audio_tokens"),
    ({"type": "input_audio", "input_audio": {"data": b64(b"\0\1" * 9600), "format": "pcm16"}}, "audio_tokens"),
    ({"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{b64(wav())}"}}, "audio_tokens"),
    ({"type": "image_url", "image_url": {"url": png()}}, "image_tokens"),
    ({"type": "image_url", "image_url": png()}, "image_tokens"),
    ({"type": "image_url", "image_url": {"url": png(900, 300), "detail": "low"}}, "image_tokens"),
    ({"type": "file", "file": {"file_data": png(), "filename": "a.png"}}, "image_tokens"),
    ({"type": "video", "video": [png(), png()], "fps": 2}, "image_tokens"),
]


@pytest.mark.parametrize(("part", "counted"), MEDIA)
def test_media(served: Served, part: dict[str, Any], counted: str) -> None:
    say(served, "Yes.")
    content = [part, {"type": "text", "text": "What is it?"}]
    made = ask(served, [{"role": "user", "content": content}])
    assert made.choices[0].message.content == "Yes."
    assert getattr(made.usage.prompt_tokens_details, counted) > 0


def test_text_in_a_file(served: Served) -> None:
    part = {"type": "file", "file": {"file_data": f"data:text/plain;base64,{b64(b'x' * 50)}"}}
    assert ask(served, [{"role": "user", "content": [part]}]).usage.prompt_tokens > 50


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called(served: Served, stream: bool) -> None:
    say(served, 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Cologne"}}\n</tool_call>')
    made = ask(served, tools=[TOOL], max_tokens=300, stream=stream)
    if stream:
        chunks = list(made)
        (call,) = [chunk.choices[0].delta.tool_calls[0] for chunk in chunks if chunk.choices[0].delta.tool_calls]
        reason = chunks[-1].choices[0].finish_reason
    else:
        (call,), reason = made.choices[0].message.tool_calls, made.choices[0].finish_reason
        assert made.choices[0].message.content == "I look."
    assert (reason, call.function.name) == ("tool_calls", "weather")
    assert json.loads(call.function.arguments) == {"city": "Cologne"}
    say(served, "Rain.")
    calls = [{"id": call.id, "type": "function", "function": {"name": "weather", "arguments": call.function.arguments}}]
    chat = [*HELLO, {"role": "assistant", "content": None, "tool_calls": calls}]
    chat.append({"role": "tool", "tool_call_id": call.id, "content": "rain"})
    assert ask(served, chat, tools=[TOOL]).choices[0].message.content == "Rain."


def test_options(served: Served) -> None:
    say(served, "One two three")
    assert ask(served, stop=" three", max_completion_tokens=100).choices[0].message.content == "One two"
    cut = ask(served, max_tokens=3)
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("One", "length")
    ask(served, n=1, logprobs=False, frequency_penalty=0, logit_bias={}, store=False, user="me", metadata={"a": "b"})
    body = {"top_k": 5, "repetition_penalty": 1.1, "use_audio_in_video": True, "solver": "euler"}
    ask(served, temperature=0.5, top_p=0.9, response_format={"type": "text"}, extra_body=body)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"n": 2}, "unsupported_parameter", "n"),
        ({"logprobs": True}, "unsupported_parameter", "logprobs"),
        ({"frequency_penalty": 0.5}, "unsupported_parameter", "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
        ({"tool_choice": "required"}, "unsupported_parameter", "tool_choice"),
        ({"functions": []}, "unsupported_parameter", "functions"),
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"top_p": "much"}, "invalid_value", "top_p"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"stop": ["a"] * 5}, "invalid_value", None),
        ({"modalities": ["text", "audio"]}, "invalid_value", "audio"),
        ({"modalities": ["smell"]}, "invalid_value", "modalities[0]"),
        ({**SPOKEN, "audio": {"voice": "Nobody"}}, "voice_not_found", None),
        ({**SPOKEN, "audio": {"voice": "Ethan", "format": "ogg"}}, "invalid_value", "audio.format"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": "Hello"}, "invalid_value", "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "invalid_value", "messages[0].role"),
        ({"messages": [{"role": "system", "content": "x"}]}, "invalid_value", "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "smell"}]}]},
            "invalid_value",
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "user", "content": 7}]}, "invalid_value", "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x" * 4000}]}, "context_length_exceeded", None),
        ({"tools": [{"type": "function"}]}, "invalid_value", "tools[0]"),
    ],
)
def test_what_cannot_be_is_refused(served: Served, body: dict[str, Any], code: str, param: str | None) -> None:
    assert refused(served, body) == (400, code, param)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_audio", "input_audio": {"data": "!!", "format": "wav"}},
        {"type": "input_audio", "input_audio": {"data": b64(b"no sound"), "format": "wav"}},
        {"type": "input_audio", "input_audio": {"data": b64(wav(0.01)), "format": "wav"}},
        {"type": "input_audio", "input_audio": {}},
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
        {"type": "image_url", "image_url": {"url": "/etc/passwd"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "image_url", "image_url": {"url": png(), "detail": "extreme"}},
        {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}},
        {"type": "file", "file": {"file_id": "file-1"}},
        {"type": "file", "file": {"file_data": "data:application/pdf;base64,AAAA"}},
    ],
)
def test_media_that_cannot_be_read_are_named(served: Served, part: dict[str, Any]) -> None:
    status, code, param = refused(served, {"messages": [{"role": "user", "content": [part]}]})
    assert (status, code) == (400, "invalid_value")
    assert param is not None
    assert param.startswith("messages[0].content[0]")


def test_bodies_that_are_none(served: Served) -> None:
    http = served.http()
    for body in (b"", b"{", b"[]", b"\xff", b'{"messages": ' + b"[" * 100000):
        response = http.post("/v1/chat/completions", content=body)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_value")


def test_another_model(served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        ask(served, model="gpt-none")
    assert caught.value.code == "model_not_found"


def test_a_client_that_leaves_cancels_the_reply(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamed and whole, and one that waits for its turn."""
    gate = threading.Event()
    thinker = served.live.decoder("thinker")
    compute = thinker.compute

    def slow(*arguments: Any) -> Any:
        gate.wait(0.2)
        return compute(*arguments)

    monkeypatch.setattr(thinker, "compute", slow)
    say(served, "word " * 30)
    stream = ask(served, stream=True, max_tokens=150)
    next(iter(stream))
    for _ in range(2):
        with pytest.raises(openai.APITimeoutError):
            served.client(timeout=0.3).chat.completions.create(model="tiny", messages=hello())  # type: ignore[arg-type]
    stream.close()
    assert served.quiet(3.0), "30 s of work were left"
    gate.set()
    say(served, "Hi!")
    assert ask(served).choices[0].message.content == "Hi!"


def test_beyond_the_queue_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    thinker = served.live.decoder("thinker")
    compute = thinker.compute
    monkeypatch.setattr(thinker, "compute", lambda *arguments: (gate.wait(20), compute(*arguments))[1])
    say(served, "Hi!")
    made: list[Any] = []
    asking = [threading.Thread(target=lambda: made.append(ask(served))) for _ in range(5)]
    for thread in asking:
        thread.start()
    due = time.monotonic() + 10
    admission = served.service.admission
    while admission.active + admission.waiting < 5 and time.monotonic() < due:
        time.sleep(0.01)
    try:
        with pytest.raises(openai.RateLimitError) as caught:
            ask(served)
        assert caught.value.code == "session_limit_reached"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert served.http().get("/v1/omniport/capacity").json()["free"] == 0
    finally:
        gate.set()
        for thread in asking:
            thread.join(20)
    assert [each.choices[0].message.content for each in made] == ["Hi!"] * 5


def test_a_failure_in_a_stream_is_an_error_and_no_done(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    thinker = served.live.decoder("thinker")
    compute, calls = thinker.compute, []

    def fail(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > 3:
            raise ValueError("a secret")
        return compute(*arguments)

    say(served, "Hello you")
    with monkeypatch.context() as patch:
        patch.setattr(thinker, "compute", fail)
        with pytest.raises(openai.APIError, match="internal error"):
            list(ask(served, stream=True))
    assert ask(served).choices[0].message.content == "Hello yo"


def test_sessions_are_forks_that_share_the_tokenizer(served: Served) -> None:
    fork: OmniSession = served.live.session.fork()
    assert fork.text_codec is served.live.session.text_codec
    fork.close()
