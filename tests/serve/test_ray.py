"""Three replicas under Ray Serve, on this machine."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import pytest
from omniport.serve.settings import Settings
from support.lost_client import Socket
from support.paths import REPOSITORY
from support.ray_replica import open_session, said
from websockets.exceptions import ConnectionClosed, InvalidStatus

ray = pytest.importorskip("ray", reason="Ray is not installed")
#: Ray's own warnings are not ours
pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]
REPLICAS, SESSIONS = 3, 2
TEXT = {"type": "realtime", "output_modalities": ["text"], "audio": {"input": {"turn_detection": None}}}
#: for a machine that has other work: Ray's processes are nice, and give one another seconds
PATIENT = {
    "RAY_worker_niceness": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "300",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
}


class Cluster:
    """Where it listens, and who talks to it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.client = httpx.Client(base_url=url, timeout=120)
        self.model = self.client.get("/v1/models").json()["data"][0]["id"]

    def home(self, session: str) -> int:
        """The process that answers a chat of this session."""
        body = {"model": self.model, "messages": [{"role": "user", "content": "Hello"}]}
        response = self.client.post("/v1/chat/completions", json=body, headers={"x-session-id": session})
        assert response.status_code == 200, response.text
        return int(response.json()["choices"][0]["message"]["content"])

    def talk(self, session: str | None = None, query: str = "") -> Socket:
        headers = {} if session is None else {"x-session-id": session}
        return Socket(self.url, query, additional_headers=headers, proxy=None, subprotocols=["realtime"])


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    from omniport.serve.ray import application
    from ray import serve

    with pytest.MonkeyPatch.context() as patched, socket.socket() as free:
        for name, value in PATIENT.items():
            patched.setenv(name, value)
        patched.setattr("ray.serve._private.api.HTTP_PROXY_TIMEOUT", 600)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        path = os.pathsep.join([str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")])
        ray.init(
            num_cpus=1,
            object_store_memory=100 << 20,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": path}},
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            settings = Settings(sessions=SESSIONS)
            app = application(open_session, settings, replicas=REPLICAS, actor_options={"num_cpus": 0.1})
            serve.run(app, name="omniport")
            made = Cluster(f"http://127.0.0.1:{port}")
            yield made
            made.client.close()
        finally:
            serve.shutdown()
            ray.shutdown()


def begin(client: Socket) -> str:
    token: str = client.created()["omniport"]["resume_token"]
    client.send("session.update", session=TEXT)
    client.until("session.updated")
    return token


def ask(client: Socket) -> dict[str, Any]:
    client.send("response.create")
    response: dict[str, Any] = client.until("response.done")[-1]["response"]
    assert response["status"] == "completed", response
    return response


def test_a_session_stays_where_its_caches_are(cluster: Cluster) -> None:
    homes = {name: cluster.home(name) for name in (f"session {k}" for k in range(8))}
    assert len(set(homes.values())) > 1
    for name in ("session 0", "session 1", "session 2"):
        assert cluster.home(name) == homes[name]
        client = cluster.talk(name)
        begin(client)
        assert client.inner.subprotocol == "realtime"
        client.write("Hello")
        (item,) = ask(client)["output"]
        assert int(item["content"][0]["text"]) == homes[name]
        client.inner.close()


def test_a_full_replica_refuses(cluster: Cluster) -> None:
    with ExitStack() as talks:

        def talk(session: str | None = None) -> None:
            client = cluster.talk(session)
            talks.callback(client.inner.close)
            client.created()

        def refused(session: str | None = None) -> None:
            begun = time.monotonic()
            with pytest.raises(InvalidStatus) as caught:
                talk(session)
            response = caught.value.response
            assert (response.status_code, response.headers["retry-after"]) == (429, "1")
            assert time.monotonic() - begun < 10, "it does not hang"

        for _ in range(SESSIONS):
            talk("mine")
        refused("mine")
        for _ in range((REPLICAS - 1) * SESSIONS):
            talk()  # to the one that is least busy
        refused()


def test_one_is_killed_in_the_middle_of_a_conversation(cluster: Cluster) -> None:
    def converse(client: Socket) -> str:
        token = begin(client)
        client.write("Hello")
        ask(client)
        client.write("And now?")
        return token

    calm = cluster.talk("calm")
    converse(calm)
    wanted = ask(calm)["usage"]["input_tokens"]
    calm.inner.close()

    client = cluster.talk("mine")
    home = cluster.home("mine")
    token = converse(client)
    client.send("response.create")
    lost = client.until("response.output_text.delta")[0]["response"]["id"]
    os.kill(home, signal.SIGKILL)
    with pytest.raises(ConnectionClosed):
        client.until("response.done")

    begun, again = time.monotonic(), None
    while again is None:
        assert time.monotonic() - begun < 60
        with suppress(InvalidStatus):  # it has not been noticed everywhere yet
            again = cluster.talk("mine", f"resume={token}")
    came = again.until("response.done")
    assert came[0]["session"]["omniport"]["resumed"] is True
    assert [event["type"] for event in came[1:]] == ["conversation.item.deleted", "response.done"]
    assert (came[-1]["response"]["id"], came[-1]["response"]["status"]) == (lost, "failed")
    response = ask(again)
    assert response["output"][0]["content"][0]["text"] != said(home)
    assert response["usage"]["input_tokens"] == wanted, "the model is told all that was said"
    again.inner.close()


def test_the_number_of_replicas_follows_that_of_sessions() -> None:
    from omniport.serve.ray import application

    options = {"sessions": 10, "resume_seconds": 0}
    deployed = application(open_session, Settings(**options), replicas=(1, 8))._bound_deployment
    scaled = deployed._deployment_config.autoscaling_config
    assert (scaled.min_replicas, scaled.max_replicas, scaled.target_ongoing_requests) == (1, 8, 7)
    assert deployed.max_ongoing_requests > Settings().limits.requests + 10, "the application refuses before"


def test_stopping_drains(cluster: Cluster) -> None:
    from ray import serve

    client = cluster.talk()
    client.created()
    serve.delete("omniport", _blocking=False)
    assert client.closed() == 1001
