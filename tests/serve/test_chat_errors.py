"""Chats that cannot be, or do not end well: what OpenAI's client is told, and what is freed."""

from __future__ import annotations

import threading
import time
from typing import Any

import openai
import pytest
from support.chats import SPOKEN, ask, b64, hello, png, refused, say, wav
from support.served import Served


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
        ({"stop": ["a"] * 5}, "invalid_value", "stop"),
        ({"modalities": ["text", "audio"]}, "invalid_value", "audio"),
        ({"modalities": ["smell"]}, "invalid_value", "modalities[0]"),
        ({**SPOKEN, "audio": {"voice": "Nobody"}}, "voice_not_found", "audio.voice"),
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


def test_clients_are_not_told_where_the_bundle_lies(served: Served) -> None:
    http, root = served.http(), str(served.service.session.bundle.root)
    chat = http.post("/v1/chat/completions", json={**SPOKEN, "messages": hello(), "audio": {"voice": "Nobody"}})
    speech = http.post("/v1/audio/speech", json={"input": "Hello", "voice": "Nobody"})
    for response in (chat, speech):
        error = response.json()["error"]
        assert error["code"] == "voice_not_found"
        assert "Chelsie, Ethan" in error["message"]
        assert root not in error["message"]
    assert speech.json()["error"]["param"] == "voice"


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
