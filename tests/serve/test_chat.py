"""Chat completions by OpenAI's client, unmodified, over fake graphs whose replies are scripted."""

from __future__ import annotations

import base64
import io
import json
import time
from typing import Any

import av
import pytest
import soundfile
from omniport.runtime import OmniSession
from support.chats import CODES, HELLO, SPOKEN, ask, b64, png, refused, say, wav
from support.served import Served


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


def test_sessions_are_forks_that_share_the_tokenizer(served: Served) -> None:
    fork: OmniSession = served.live.session.fork()
    assert fork.text_codec is served.live.session.text_codec
    fork.close()
