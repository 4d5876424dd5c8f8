"""Keys, addresses, origins, and what every answer and every error has."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import openai
import pytest
from omniport.cli.commands.serve import _read_keys
from omniport.runtime.errors import UsageError
from omniport.serve.settings import Limits, Settings
from support.served import Served

KEY = "sk-right"


@pytest.fixture
def make(root: Path) -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def build(**settings: object) -> Served:
        made.append(Served(root, **settings))
        return made[-1]

    yield build
    for served in made:
        served.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_this_machine_alone_needs_no_key(host: str) -> None:
    Settings(host=host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "box.local"])
def test_others_need_a_key_or_a_word(host: str) -> None:
    with pytest.raises(UsageError, match="--no-auth"):
        Settings(host=host)
    Settings(host=host, keys=(KEY,))
    Settings(host=host, no_auth=True)


@pytest.mark.parametrize(
    "headers",
    [{"authorization": f"Bearer {KEY}"}, {"authorization": f"bearer {KEY}"}, {"api-key": KEY}, {"x-api-key": KEY}],
)
def test_a_key_opens(make: Callable[..., Served], headers: dict[str, str]) -> None:
    assert make(keys=("sk-other", KEY)).http().get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}, {"authorization": KEY}, {"api-key": "é"}])
def test_a_wrong_key_is_refused(make: Callable[..., Served], headers: dict[str, str]) -> None:
    http = make(keys=(KEY,)).http()
    headers = {name: value.encode() for name, value in headers.items()}  # type: ignore[misc]
    for path in ("/v1/models", "/models", "/metrics", "/version", "/v1/omniport/capacity", "/nowhere"):
        response = http.get(path, headers=headers)
        assert response.status_code == 401
        error = response.json()["error"]
        assert (error["type"], error["code"], error["param"]) == ("authentication_error", "invalid_api_key", None)
        assert response.headers["x-should-retry"] == "false"
    assert http.get("/health", headers=headers).status_code == 200
    assert http.get("/ready", headers=headers).status_code == 200


def test_the_first_key_that_is_there_counts(make: Callable[..., Served]) -> None:
    headers = {"authorization": "Bearer wrong", "api-key": KEY}
    assert make(keys=(KEY,)).http().get("/v1/models", headers=headers).status_code == 401


def test_a_page_elsewhere_may_not_call(make: Callable[..., Served]) -> None:
    http = make(origins=("https://ours.example",)).http()
    assert http.get("/v1/models", headers={"origin": "http://127.0.0.1"}).status_code == 200
    allowed = http.get("/v1/models", headers={"origin": "https://ours.example"})
    assert allowed.headers["access-control-allow-origin"] == "https://ours.example"
    refused = http.get("/v1/models", headers={"origin": "https://evil.example"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "origin_not_allowed")
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    preflight = http.options("/v1/models", headers={"origin": "https://ours.example", **asked})
    assert preflight.status_code == 200


def test_a_name_that_was_pointed_here_is_refused(make: Callable[..., Served]) -> None:
    """DNS rebinding: the browser sends the page's own name as Host, and no foreign Origin."""
    http = make().http()
    for host, status in (("evil.example", 403), ("localhost:8000", 200), ("[::1]:8000", 200), ("", 403)):
        assert http.get("/v1/models", headers={"host": host}).status_code == status, host


def test_every_answer_has_an_id_and_openai_s_client_shows_it(served: Served) -> None:
    first, second = (served.http().get(path) for path in ("/health", "/nowhere"))
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    with pytest.raises(openai.NotFoundError) as caught:
        served.client().models.retrieve("gpt-none")
    assert caught.value.request_id.startswith("req_")
    assert (caught.value.code, caught.value.type) == ("model_not_found", "invalid_request_error")


def test_models(served: Served) -> None:
    (listed,) = served.client().models.list().data
    assert listed.id == "tiny"
    assert listed.owned_by == "omniport"
    assert served.client().models.retrieve("tiny").created == listed.created
    extra = listed.model_dump()["omniport"]
    assert extra["voices"] == ["Ethan", "Chelsie"]
    assert extra["input"] == ["text", "audio", "image", "video"]
    assert (extra["sample_rate"], extra["max_context"]) == (24000, 2048)
    assert len(extra["bundle_hash"]) == 16


def test_paths_without_the_prefix_and_unknown_ones(served: Served) -> None:
    http = served.http()
    assert http.get("/models").json() == http.get("/v1/models").json()
    assert http.get("/v1/nowhere").json()["error"]["code"] == "not_found"
    wrong = http.post("/v1/models")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")


def test_too_many_requests_at_once_are_refused(make: Callable[..., Served]) -> None:
    refused = make(limits=Limits(requests=0)).http().get("/v1/models")
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
    assert int(refused.headers["retry-after"]) >= 1


def test_operations(make: Callable[..., Served]) -> None:
    served = make()
    http = served.http()
    served.service.state = "loading"
    assert http.get("/health").status_code == 200
    loading = http.get("/ready")
    assert (loading.status_code, loading.json()["error"]["code"]) == (503, "not_ready")
    assert loading.headers["retry-after"]
    served.service.state = "ready"
    assert http.get("/ready").json() == {"status": "ready"}
    assert http.get("/version").json()["model"] == "tiny"
    capacity = http.get("/v1/omniport/capacity").json()
    assert (capacity["sessions"], capacity["active"], capacity["free"]) == (1, 0, 1)
    assert http.post("/v1/omniport/drain").status_code == 202
    assert http.get("/ready").status_code == 503
    assert http.get("/v1/omniport/capacity").json()["free"] == 0
    metrics = http.get("/metrics").text
    assert 'omniport_requests_total{route="/ready",status="503"} 2.0' in metrics
    assert 'omniport_sessions{state="free"} 0.0' in metrics


def test_a_failure_tells_nothing_and_the_next_is_served(
    make: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = make()
    monkeypatch.setattr(served.service.measurements, "page", lambda: 1 / 0)
    failed = served.http().get("/metrics")
    assert failed.status_code == 500
    error = failed.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert failed.headers["x-request-id"] in error["message"]
    assert "ZeroDivision" not in failed.text
    assert served.http().get("/health").status_code == 200


def test_the_names_of_voices_that_openai_has(make: Callable[..., Served]) -> None:
    service = make(voices={"nova": "Ethan"}).service
    assert [service.voice(name) for name in (None, "Ethan", "nova", "ash", "Nobody")] == [
        None,
        "Ethan",
        "Ethan",
        None,
        "Nobody",
    ]


def test_a_name_for_no_voice_is_refused(make: Callable[..., Served]) -> None:
    with pytest.raises(UsageError, match="Ethan, Chelsie"):
        make(voices={"ash": "Nobody"})


@pytest.mark.parametrize("headers", [{"origin": "http://["}, {"origin": "null"}, {"host": "["}, {"host": "[::1"}])
def test_names_that_are_none(make: Callable[..., Served], headers: dict[str, str]) -> None:
    assert make().http().get("/v1/models", headers=headers).status_code == 403


def test_keys_of_a_file(tmp_path: Path) -> None:
    """As Windows writes it, too."""
    file = tmp_path / "keys"
    file.write_bytes(b"\xef\xbb\xbffirst\r\n# none\r\nsecond\r\n")
    assert _read_keys(file) == ("first", "second")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_keys_are_read_from_a_regular_file_alone(tmp_path: Path) -> None:
    """Nobody may ever write into a pipe."""

    def write() -> None:
        with suppress(OSError):  # nobody reads it
            pipe.write_text("first")

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    threading.Thread(target=write, daemon=True).start()
    with pytest.raises(UsageError, match="not a regular file"):
        _read_keys(pipe)
