"""Who may connect, what is sent at the beginning, and what ends a connection: with a WebSocket alone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from omniport.serve.signed_keys import sign
from support.served import Served
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

KEY = "sk-right"


@pytest.fixture
def make(root: Path) -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def build(**settings: Any) -> Served:
        made.append(Served(root, **settings).start())
        return made[-1]

    yield build
    for served in made:
        served.close()


def open_socket(served: Served, **options: Any) -> ClientConnection:
    return connect(f"ws{served.url[4:]}/v1/realtime?model=x", open_timeout=60, **options)


def next_event(socket: ClientConnection) -> dict[str, Any]:
    event: dict[str, Any] = json.loads(socket.recv(timeout=20))
    return event


def refused(served: Served, **options: Any) -> tuple[int, str]:
    with pytest.raises(InvalidStatus) as caught:
        open_socket(served, **options)
    response = caught.value.response
    return response.status_code, json.loads(response.body)["error"]["code"]


def test_nothing_is_compressed(make: Callable[..., Served]) -> None:
    """Sound in base64 gets little smaller, and that takes a third of the protocol's processor time."""
    with open_socket(make()) as socket:
        assert socket.response is not None
        assert "Sec-WebSocket-Extensions" not in socket.response.headers


def test_keys_and_pages(make: Callable[..., Served]) -> None:
    served = make(keys=(KEY,))
    assert refused(served) == (401, "invalid_api_key")
    assert refused(served, additional_headers={"Authorization": "Bearer wrong"}) == (401, "invalid_api_key")
    key = {"Authorization": f"Bearer {KEY}"}
    assert refused(served, additional_headers=key, origin="https://evil.example") == (403, "origin_not_allowed")
    with open_socket(served, additional_headers=key) as socket:
        assert socket.subprotocol is None
    offered = ["realtime", f"openai-insecure-api-key.{KEY}", "openai-agents-sdk.0.20.0"]
    with open_socket(served, subprotocols=offered, origin=served.url) as socket:
        assert socket.subprotocol == "realtime"
        assert next_event(socket)["type"] == "session.created"


def test_a_refusal_is_no_fault_of_the_server(make: Callable[..., Served], caplog: pytest.LogCaptureFixture) -> None:
    served = make(keys=(KEY,), sessions=1)
    key = {"Authorization": f"Bearer {KEY}"}
    assert refused(served) == (401, "invalid_api_key")
    with open_socket(served, additional_headers=key):
        assert refused(served, additional_headers=key) == (429, "session_limit_reached")
    assert refused(served, additional_headers=key, origin="https://evil.example") == (403, "origin_not_allowed")
    wait_until(lambda: not served.service.realtime.open)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_key_for_a_browser(make: Callable[..., Served]) -> None:
    served = make(keys=(KEY,))
    asked = {"type": "realtime", "instructions": "Be brief.", "output_modalities": ["text"]}
    secret = served.client(api_key=KEY).realtime.client_secrets.create(
        session=asked,  # type: ignore[arg-type]
        expires_after={"anchor": "created_at", "seconds": 60},
    )
    assert secret.value.startswith("ek_")
    assert 0 < secret.expires_at - time.time() <= 60
    assert secret.session.type == "realtime"
    offered = ["realtime", f"openai-insecure-api-key.{secret.value}"]
    with open_socket(served, subprotocols=offered) as socket:
        session = next_event(socket)["session"]
        assert (session["instructions"], session["output_modalities"]) == ("Be brief.", ["text"])
    with pytest.raises(openai.AuthenticationError):
        served.client(api_key=secret.value).models.list()
    for wrong in (secret.value[:-4] + "AAAA", secret.value[:20], "ek_", "ek_é"):
        headers = {"Authorization": b"Bearer " + wrong.encode()}
        assert refused(served, additional_headers=headers) == (401, "invalid_api_key")
    other = make(keys=("sk-other",))
    assert refused(other, subprotocols=offered) == (401, "invalid_api_key")
    with pytest.raises(openai.BadRequestError):
        served.client(api_key=KEY).realtime.client_secrets.create(expires_after={"seconds": 1})  # type: ignore[typeddict-item]


def test_a_key_whose_session_cannot_be_any_more(make: Callable[..., Served]) -> None:
    """As after a restart with a bundle that lacks the voice: told, and no session stays behind."""
    served = make(keys=(KEY,), sessions=1)
    session = {"audio": {"output": {"voice": "gone"}}}
    key = sign(session, int(time.time()) + 60, served.service.settings)
    for _ in range(2):  # the first one's place is free again
        with open_socket(served, additional_headers={"Authorization": f"Bearer {key}"}) as socket:
            assert next_event(socket)["error"]["code"] == "voice_not_found"
            with pytest.raises(ConnectionClosed) as caught:
                socket.recv(timeout=20)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1008
        wait_until(lambda: not served.service.realtime.open)


def test_a_key_that_holds_no_more(make: Callable[..., Served]) -> None:
    served = make(keys=(KEY,))
    for seconds, holds in ((60, True), (-1, False)):
        key = sign({}, int(time.time()) + seconds, served.service.settings)
        headers = {"Authorization": f"Bearer {key}"}
        if holds:
            with open_socket(served, additional_headers=headers) as socket:
                assert next_event(socket)["type"] == "session.created"
        else:
            assert refused(served, additional_headers=headers) == (401, "invalid_api_key")


def wait_until(so: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not so():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_full_or_loading_server_refuses(make: Callable[..., Served]) -> None:
    served = make(sessions=1)
    with open_socket(served):
        assert refused(served) == (429, "session_limit_reached")
    served.service.state = "draining"
    assert refused(served) == (503, "not_ready")


def test_the_session_is_told_whole(make: Callable[..., Served]) -> None:
    with open_socket(make()) as socket:
        session = next_event(socket)["session"]
        assert session["type"] == "realtime"
        assert session["audio"]["input"]["turn_detection"]["interrupt_response"] is True
        changes = {
            "type": "realtime",
            "audio": {
                "input": {
                    "format": {"type": "audio/pcmu"},
                    "turn_detection": {"type": "semantic_vad", "eagerness": "low"},
                    "transcription": {"model": "gpt-4o-mini-transcribe"},
                },
                "output": {"voice": {"id": "Ethan"}, "format": {"type": "audio/pcm", "rate": 16000}},
            },
        }
        socket.send(json.dumps({"type": "session.update", "session": changes}))
        audio = next_event(socket)["session"]["audio"]
        assert audio["input"]["format"] == {"type": "audio/pcmu"}
        assert audio["input"]["transcription"] == {"model": "gpt-4o-mini-transcribe"}
        assert audio["input"]["turn_detection"] == {
            "type": "semantic_vad",
            "eagerness": "low",
            "create_response": True,
            "interrupt_response": True,
        }
        assert audio["output"] == {"format": {"type": "audio/pcm", "rate": 16000}, "voice": "Ethan", "speed": 1.0}
        off = {"type": "realtime", "audio": {"input": {"turn_detection": False}}}
        socket.send(json.dumps({"type": "session.update", "session": off}))
        assert next_event(socket)["session"]["audio"]["input"]["turn_detection"] is None


def test_the_earlier_form(make: Callable[..., Served]) -> None:
    served = make()
    served.live.script("Hello")
    with open_socket(served) as socket:
        next_event(socket)
        asked = {"modalities": ["text", "audio"], "voice": "ash", "input_audio_format": "pcm16", "turn_detection": None}
        socket.send(json.dumps({"type": "session.update", "session": asked}))
        session = next_event(socket)["session"]
        assert (session["modalities"], session["voice"], session["turn_detection"]) == (
            asked["modalities"],
            "Chelsie",
            None,
        )
        content = [{"type": "input_text", "text": "Hello"}]
        item = {"type": "message", "role": "user", "content": content}
        socket.send(json.dumps({"type": "conversation.item.create", "item": item}))
        assert next_event(socket)["type"] == "conversation.item.created"
        socket.send(json.dumps({"type": "response.create"}))
        came = []
        while "response.done" not in came:
            event = next_event(socket)
            came.append(event["type"])
        assert {"response.audio.delta", "response.audio_transcript.delta", "response.audio.done"} <= set(came)
        assert not any("output_audio" in kind or kind.startswith("conversation.item.done") for kind in came)
        assert event["response"]["output"][0]["content"][0]["type"] == "audio"


@pytest.mark.parametrize(
    "sent", ["", "[]", "null", "{", '{"type": 3}', "[" * 100_000, '{"type":"response.create","response":3}']
)
def test_what_is_no_event_is_told_and_the_session_goes_on(make: Callable[..., Served], sent: str) -> None:
    with open_socket(make()) as socket:
        next_event(socket)
        socket.send(sent)
        assert next_event(socket)["error"]["code"] == "invalid_value"
        socket.send(json.dumps({"type": "session.update", "session": {"type": "realtime"}}))
        assert next_event(socket)["type"] == "session.updated"


def test_frames_of_bytes_end_it(make: Callable[..., Served]) -> None:
    served = make()
    with open_socket(served) as socket:
        next_event(socket)
        socket.send(b"bytes")
        with pytest.raises(ConnectionClosed) as caught:
            next_event(socket)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1008
    wait_until(lambda: not served.service.realtime.open)


def test_a_stopping_server_ends_the_connection(make: Callable[..., Served]) -> None:
    served = make()
    with open_socket(served) as socket:
        next_event(socket)
        served.close()
        with pytest.raises(ConnectionClosed) as caught:
            next_event(socket)
    assert caught.value.rcvd is not None
    assert caught.value.rcvd.code == 1001, "clients connect again"


def test_the_operator_s_choices(make: Callable[..., Served]) -> None:
    """The earlier form without being asked, and no transcripts; what is not OpenAI's comes only to who wants it."""
    with open_socket(make(dialect="beta", transcribe="off")) as socket:
        assert next_event(socket)["session"]["modalities"] == ["text", "audio"]
        asked = {"input_audio_transcription": {"model": "whisper-1"}, "omniport": {"events": True}}
        socket.send(json.dumps({"type": "session.update", "session": asked}))
        session = next_event(socket)["session"]
        assert session["input_audio_transcription"] is None
        assert session["omniport"]["events"] is True
