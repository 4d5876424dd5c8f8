"""What one client may take: size, length, pixels, time, hosts; and what is counted."""

from __future__ import annotations

import base64
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from omniport.runtime.errors import MediaError
from omniport.serve.media import url_fetch
from omniport.serve.media.url_fetch import fetch
from omniport.serve.settings import Limits
from PIL import Image
from support.served import Served

CHAT = "/v1/chat/completions"


@pytest.fixture
def make(root: Path) -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def build(**limits: object) -> Served:
        made.append(Served(root, limits=Limits(**limits)))  # type: ignore[arg-type]
        return made[-1]

    yield build
    for served in made:
        served.close()


def asked(part: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [part]}]}


def url(data: bytes) -> dict[str, str]:
    return {"url": f"data:;base64,{base64.b64encode(data).decode()}"}


def error(served: Served, body: dict[str, Any]) -> tuple[int, str, str | None]:
    response = served.http().post(CHAT, json=body)
    told = response.json()["error"]
    return response.status_code, told["code"], told["param"]


def test_a_body_that_is_too_large(make: Callable[..., Served]) -> None:
    http = make(body=1000).http()
    fits = {"messages": [{"role": "user", "content": "x" * 500}]}
    assert http.post(CHAT, json=fits).status_code == 200
    for body in (b"x" * 1001, iter([b"x" * 600, b"x" * 600])):  # announced, and not
        refused = http.post(CHAT, content=body)  # type: ignore[arg-type]
        told = refused.json()["error"]
        assert (refused.status_code, told["type"], told["code"]) == (413, "invalid_request_error", "request_too_large")
        assert refused.headers["x-should-retry"] == "false"


def test_a_medium_that_is_too_large(make: Callable[..., Served]) -> None:
    told = error(make(part=100), asked({"type": "image_url", "image_url": url(b"x" * 101)}))
    assert told == (413, "request_too_large", "messages[0].content[0].image_url")


def test_a_picture_with_too_many_pixels(make: Callable[..., Served]) -> None:
    file = io.BytesIO()
    Image.new("RGB", (200, 100)).save(file, "PNG")
    part = {"type": "image_url", "image_url": url(file.getvalue())}
    assert make(image_pixels=20_000).http().post(CHAT, json=asked(part)).status_code == 200
    assert error(make(image_pixels=19_999), asked(part)) == (400, "invalid_value", "messages[0].content[0].image_url")


def test_sound_that_is_too_long(make: Callable[..., Served]) -> None:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(16000), 16000, format="WAV")
    part = {"type": "audio_url", "audio_url": url(file.getvalue())}
    assert make(audio_seconds=1.0).http().post(CHAT, json=asked(part)).status_code == 200
    assert error(make(audio_seconds=0.9), asked(part)) == (400, "invalid_value", "messages[0].content[0].audio_url")


def test_a_video_that_is_too_long(make: Callable[..., Served]) -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height = 56, 56
        for _ in range(8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((56, 56, 3), np.uint8))))
        container.mux(stream.encode(None))
    part = {"type": "video_url", "video_url": url(file.getvalue())}
    assert make(video_seconds=3.0).http().post(CHAT, json=asked(part)).status_code == 200
    assert error(make(video_seconds=1.0), asked(part)) == (400, "invalid_value", "messages[0].content[0].video_url")


def test_media_that_are_too_many_together(make: Callable[..., Served]) -> None:
    """A few bytes of a picture of one colour become many pixels."""
    file = io.BytesIO()
    Image.new("RGB", (200, 100)).save(file, "PNG")
    part = {"type": "image_url", "image_url": url(file.getvalue())}
    served = make(decoded=150_000)
    for parts in ([part] * 2, [{"type": "video", "video": [part["image_url"]["url"]] * 2}]):  # type: ignore[index]
        body = {"messages": [{"role": "user", "content": parts}]}
        assert served.http().post(CHAT, json=body).status_code == 200
    for parts, where in (
        ([part] * 3, "[2].image_url"),
        ([{"type": "video", "video": [part["image_url"]["url"]] * 3}], "[0].video[2]"),
    ):  # type: ignore[index]
        body = {"messages": [{"role": "user", "content": parts}]}
        assert error(served, body) == (413, "request_too_large", f"messages[0].content{where}")


def test_media_that_take_too_long_together(make: Callable[..., Served]) -> None:
    file = io.BytesIO()
    Image.new("RGB", (30, 30)).save(file, "PNG")
    part = {"type": "video", "video": [url(file.getvalue())["url"]] * 5000}
    started = time.perf_counter()
    told = error(make(media_seconds=0.5), asked(part))
    assert told[:2] == (400, "invalid_value")
    assert time.perf_counter() - started < 5.0


def test_a_request_that_does_not_arrive(make: Callable[..., Served]) -> None:
    served = make(upload_seconds=0.3).start()
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 50\r\n\r\n{{".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("state", ["loading", "draining"])
def test_not_ready(make: Callable[..., Served], state: str) -> None:
    served = make()
    served.service.state = state  # type: ignore[assignment]
    for path in (CHAT, "/v1/audio/speech", "/v1/audio/transcriptions"):
        refused = served.http().post(path, json={})
        told = refused.json()["error"]
        assert (refused.status_code, told["type"], told["code"]) == (503, "server_error", "not_ready")
        assert int(refused.headers["retry-after"]) >= 1


def test_a_reply_that_fails(make: Callable[..., Served], monkeypatch: pytest.MonkeyPatch) -> None:
    served = make()
    monkeypatch.setattr(served.live.decoder("thinker"), "compute", lambda *_: 1 / 0)
    assert error(served, asked({"type": "text", "text": "Hello"})) == (500, "internal_error", None)
    monkeypatch.undo()
    assert served.http().post(CHAT, json=asked({"type": "text", "text": "Hello"})).status_code == 200


def test_replies_are_counted(make: Callable[..., Served]) -> None:
    served = make()
    body = asked({"type": "text", "text": "Hello"}) | {"modalities": ["text", "audio"], "audio": {"voice": "Ethan"}}
    usage = served.http().post(CHAT, json=body).json()["usage"]
    page = served.http().get("/metrics").text
    counted = dict(line.rsplit(" ", 1) for line in page.splitlines() if line.startswith("omniport_"))
    assert float(counted["omniport_codec_tokens_total"]) == usage["completion_tokens_details"]["audio_tokens"]
    assert float(counted["omniport_text_tokens_total"]) == usage["completion_tokens_details"]["text_tokens"]
    assert float(counted['omniport_prefill_tokens_total{when="late"}']) == usage["prompt_tokens"]
    assert counted["omniport_first_audio_seconds_count"] == counted["omniport_real_time_factor_count"] == "1.0"
    assert counted['omniport_requests_total{route="/v1/chat/completions",status="200"}'] == "1.0"
    assert float(counted['omniport_stage_seconds_total{stage="dit"}']) > 0
    capacity = served.http().get("/v1/omniport/capacity").json()
    assert capacity["predicted_first_audio_s"] > 0
    assert capacity["predicted_rtf"] > 0


@pytest.mark.parametrize(
    "url",
    [
        "http://named.example/a.wav",
        "https://other.example/a.wav",
        "https://named.example:8443/a.wav",
        "https://named.example@127.0.0.1/a.wav",
        "ftp://named.example/a.wav",
        "/etc/passwd",
        "https://named.example:x/a.wav",
        "https://[named.example/a.wav",
    ],
)
def test_other_urls_are_not_fetched(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(url_fetch.socket, "getaddrinfo", lambda *_, **__: pytest.fail("it was looked up"))
    with pytest.raises(MediaError, match="not fetched"):
        fetch(url, ("named.example",), Limits())


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.8",
        "169.254.169.254",
        "::1",
        "fd00::1",
        "::ffff:10.0.0.8",
        "64:ff9b::a00:8",
        "2002:a00:8::1",
        "224.0.1.1",
    ],
)
def test_private_addresses_are_not_asked(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(0, 0, 0, "", ("8.8.8.8", 443)), (0, 0, 0, "", (address, 443))]
    monkeypatch.setattr(url_fetch.socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(url_fetch.socket, "create_connection", lambda *_: pytest.fail("it was asked"))
    with pytest.raises(MediaError, match="public"):
        fetch("https://named.example/a.wav", ("named.example",), Limits())


class Answer:
    """Of a host that was asked."""

    def __init__(self, status: int, data: bytes) -> None:
        self.status, self.data, self.asked = status, data, ""

    def request(self, method: str, path: str) -> None:
        self.asked = f"{method} {path}"

    def getresponse(self) -> Answer:
        return self

    def read(self, limit: int) -> bytes:
        return self.data[:limit]

    stopped = False

    def stop(self) -> None: ...

    def close(self) -> None: ...


def test_a_host_that_sends_a_byte_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step of it is in time."""
    ours, theirs = socket.socketpair()

    class Connection(url_fetch._Connection):
        def connect(self) -> None:
            self.sock = ours  # type: ignore[assignment]

    def drip() -> None:
        with suppress(OSError):
            theirs.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            while theirs.send(b"x"):
                time.sleep(0.05)

    monkeypatch.setattr(url_fetch, "_public_address", lambda _: "8.8.8.8")
    monkeypatch.setattr(url_fetch, "_Connection", Connection)
    thread = threading.Thread(target=drip)
    thread.start()
    with pytest.raises(MediaError, match=r"more than 0\.5 s"):
        fetch("https://named.example/a.wav", ("named.example",), Limits(decode_seconds=0.5))
    thread.join(5)
    theirs.close()


@pytest.mark.parametrize(("status", "data", "problem"), [(302, b"", "status 302"), (200, b"x" * 11, "more than")])
def test_redirects_and_what_is_too_large(
    monkeypatch: pytest.MonkeyPatch, status: int, data: bytes, problem: str
) -> None:
    monkeypatch.setattr(url_fetch, "_public_address", lambda _: "8.8.8.8")
    monkeypatch.setattr(url_fetch, "_Connection", lambda *_: Answer(status, data))
    with pytest.raises(MediaError, match=problem):
        fetch("https://named.example/a.wav", ("named.example",), Limits(part=10))


def test_a_named_host_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Answer(200, b"sound")
    monkeypatch.setattr(url_fetch, "_public_address", lambda _: "8.8.8.8")
    monkeypatch.setattr(url_fetch, "_Connection", lambda host, address: answer)
    assert fetch("https://Named.example/a.wav?b=c", ("named.example",), Limits()) == b"sound"
    assert answer.asked == "GET /a.wav?b=c"
