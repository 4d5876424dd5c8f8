"""Several servers behind HAProxy and nginx, with the configurations that are shipped, on loopback."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.bundles import make_bundle
from support.paths import REPOSITORY
from support.served import Served
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

PROXY = REPOSITORY / "serve" / "hosting" / "proxy"
BOARDS, SESSIONS, PLACES = 3, 4, 5
KEY = "sk-boards"  # without a key a server goes by the names of this machine alone
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


class Boards:
    """Servers, each of which answers with its number, behind a proxy.

    Attributes:
        url: of the proxy.
    """

    def __init__(self, kind: str, work: Path) -> None:
        self.all = [Served(make_bundle(work / name), model=name, any_model=True, keys=(KEY,)).start() for name in "012"]
        self._held = threading.Event()
        for number, board in enumerate(self.all):
            board.live.script(str(number), codes=[])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        file = PROXY / {"haproxy": "haproxy.cfg", "nginx": "nginx.conf"}[kind]
        text = re.sub(r"(bind |listen )[*:]*8000", rf"\g<1>127.0.0.1:{port}", file.read_text(encoding="utf-8"))
        for number, board in enumerate(self.all):
            text = text.replace(f"192.0.2.{11 + number}:8000", board.url.removeprefix("http://"))
        (work / file.name).write_text(text, encoding="utf-8")
        foreground = f"daemon off; master_process off; pid {work}/pid;"
        command = {
            "haproxy": ["haproxy", "-db", "-f", file.name],
            "nginx": ["nginx", "-p", str(work), "-c", file.name, "-e", "stderr", "-g", foreground],
        }[kind]
        self._process = subprocess.Popen(command, cwd=work, stderr=subprocess.PIPE, text=True)
        self.client = httpx.Client(base_url=self.url, timeout=30, headers={"Authorization": f"Bearer {KEY}"})
        due = time.monotonic() + 20
        while not self._listens(port):
            assert time.monotonic() < due
            assert self._process.poll() is None, self._process.communicate()
            time.sleep(0.05)

    @staticmethod
    def _listens(port: int) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    def close(self) -> None:
        self.client.close()
        self._process.terminate()
        self._process.communicate(timeout=20)
        for board in self.all:
            board.close()

    @contextmanager
    def held(self, number: int) -> Iterator[None]:
        """A board whose replies do not go on before ``release``."""
        thinker = self.all[number].live.decoder("thinker")
        compute = thinker.compute

        def wait(*arguments: Any) -> Any:
            assert self._held.wait(60)
            return compute(*arguments)

        thinker.compute = wait  # type: ignore[method-assign]
        try:
            yield
        finally:
            self.release()
            thinker.compute = compute  # type: ignore[method-assign]

    def release(self) -> None:
        self._held.set()

    def answer(self, session: str | None = None, **body: Any) -> int:
        """The number of the board that has answered."""
        headers = {} if session is None else {"x-session-id": session}
        response = self.client.post("/v1/chat/completions", json={**HELLO, **body}, headers=headers)
        assert response.status_code == 200, response.text
        return int(response.json()["choices"][0]["message"]["content"])

    def talk(self, session: str | None = None, **options: Any) -> tuple[ClientConnection, int]:
        """A WebSocket, and the number of its board."""
        headers = {"Authorization": f"Bearer {KEY}", **({} if session is None else {"x-session-id": session})}
        address = self.url.replace("http", "ws") + "/v1/realtime" + options.pop("query", "")
        websocket = connect(address, additional_headers=headers, proxy=None, open_timeout=60, **options)
        created = json.loads(websocket.recv(timeout=20))
        return websocket, int(created["session"]["model"])


def eventually(true: Callable[[], bool]) -> None:
    due = time.monotonic() + 20
    while not true():
        assert time.monotonic() < due
        time.sleep(0.01)


@pytest.fixture(params=["haproxy", "nginx"])
def boards(
    request: pytest.FixtureRequest, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Boards]:
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    made = Boards(request.param, tmp_path)
    yield made
    made.close()


def test_a_conversation_stays_where_its_caches_are(boards: Boards) -> None:
    homes = {name: boards.answer(name) for name in (f"session {k}" for k in range(12))}
    assert len(set(homes.values())) > 1
    for name, home in homes.items():
        assert boards.answer(name) == home
    websocket, home = boards.talk("session 3", subprotocols=["realtime"])
    with websocket:
        assert home == homes["session 3"]
        assert websocket.subprotocol == "realtime"
    websocket, home = boards.talk(query="?session_id=tab")
    with websocket:
        other, again = boards.talk(query="?session_id=tab")
        with other:
            assert again == home


def test_a_full_board_passes_on(boards: Boards) -> None:
    home = boards.answer("mine")
    admission = boards.all[home].service.admission
    with boards.held(home), ThreadPoolExecutor(PLACES) as clients:
        answers = []
        for place in range(PLACES):
            answers.append(clients.submit(boards.answer, "mine"))
            eventually(lambda: admission.active + admission.waiting == place + 1)  # noqa: B023
        assert boards.answer("mine") != home
        assert home not in {boards.answer() for _ in range(4)}
        boards.release()
        assert [answer.result(30) for answer in answers] == [home] * PLACES


def test_full_of_talk(boards: Boards) -> None:
    with ExitStack() as talks:

        def begin(session: str | None = None) -> int:
            websocket, board = boards.talk(session)
            talks.enter_context(websocket)
            return board

        home = begin("mine")
        assert [begin("mine") for _ in range(SESSIONS - 1)] == [home] * (SESSIONS - 1)
        assert begin("mine") != home
        for _ in range(BOARDS * SESSIONS - SESSIONS - 1):
            assert begin() != home
        begun = time.monotonic()
        with pytest.raises(InvalidStatus) as refused:
            begin()
        assert refused.value.response.status_code in (429, 503)
        assert int(refused.value.response.headers["retry-after"]) > 0
        assert time.monotonic() - begun < 5, "it does not hang"


def test_a_draining_board_gets_nothing_new(boards: Boards) -> None:
    homes = {name: boards.answer(name) for name in (f"session {k}" for k in range(9))}
    websocket, leaving = boards.talk("session 0")
    with websocket:
        boards.all[leaving].service.drain()
        for name, home in homes.items():
            answered = boards.answer(name)
            assert answered != leaving
            assert home in (leaving, answered), "the others stay where they are"
        assert leaving not in {boards.answer() for _ in range(6)}
        with pytest.raises(ConnectionClosed) as closed:
            websocket.recv(timeout=20)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1001
        elsewhere, board = boards.talk("session 0")
        with elsewhere:
            assert board != leaving, "who talked there is told to come again"


def test_what_is_each_servers_own_is_not_passed_on(boards: Boards) -> None:
    for path in ("/metrics", "/v1/omniport/capacity", "/omniport/capacity"):
        assert boards.client.get(path).status_code == 404
    assert boards.client.post("/v1/omniport/drain").status_code == 404
    assert boards.client.get("/ready").status_code == 200
    assert all(board.service.state == "ready" for board in boards.all)
