"""What systemd is told over its notification socket."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from omniport.serve.systemd import Supervisor
from support.served_process import SLOW, listening, start

if sys.platform != "linux":
    pytest.skip("systemd runs on Linux alone", allow_module_level=True)

#: an endpoint that holds the event loop
STUCK = """
from omniport.serve.http import operations
async def get_version(request, service): time.sleep(1.5)
operations.get_version = get_version
"""


class Listener:
    """Takes what is sent to a socket, as systemd does.

    Attributes:
        heard: (seconds, line) of each line, in order.
    """

    def __init__(self, address: str) -> None:
        self.heard: list[tuple[float, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while message := self._socket.recv(4096):
            self.heard += [(time.monotonic(), line) for line in message.decode().split("\n")]

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"", self._socket.getsockname())
        self._thread.join(20)
        self._socket.close()

    def lines(self) -> list[str]:
        return [line for _, line in self.heard]

    def wait(self, line: str) -> None:
        due = time.monotonic() + 60
        while line not in self.lines():
            assert time.monotonic() < due, self.heard
            time.sleep(0.01)

    def silence(self, since: float, until: float) -> float:
        """The longest time between two signs of life."""
        signs = [at for at, line in self.heard if line == "WATCHDOG=1" and since < at < until]
        return max(later - earlier for earlier, later in pairwise([since, *signs, until]))


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[tuple[Listener, str]]:
    """One that listens, and its address as systemd gives it."""
    path = str(tmp_path / "notify")
    listener = Listener(path)
    yield listener, path
    listener.close()


def test_from_loading_to_the_end(
    root: Path, stopped: list[subprocess.Popen[str]], systemd: tuple[Listener, str]
) -> None:
    listener, path = systemd
    process = start(root, "--quiet", slow=SLOW, NOTIFY_SOCKET=path, WATCHDOG_USEC="400000")
    stopped.append(process)
    listener.wait("STATUS=loading")
    url = listening(process)
    listener.wait("READY=1")
    before = listener.lines()
    assert before.index("STATUS=loading") < before.index("WATCHDOG=1") < before.index("READY=1"), "loading is life, too"
    assert "STOPPING=1" not in before
    httpx.post(f"{url}/v1/omniport/drain")
    listener.wait("STATUS=draining")
    assert "STOPPING=1" not in listener.lines(), "it may be asked what it still does"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    listener.wait("STOPPING=1")
    assert listener.lines().count("READY=1") == 1


def test_no_sign_of_life_while_the_loop_is_stuck(
    root: Path, stopped: list[subprocess.Popen[str]], systemd: tuple[Listener, str]
) -> None:
    listener, path = systemd
    process = start(root, "--quiet", slow=STUCK, NOTIFY_SOCKET=path, WATCHDOG_USEC="400000")
    stopped.append(process)
    url = listening(process)
    free = time.monotonic()
    time.sleep(2.0)
    held = time.monotonic()
    with pytest.raises(httpx.TimeoutException):
        httpx.get(f"{url}/version", timeout=1.4)
    assert listener.silence(held, time.monotonic()) > 1.0
    assert len([at for at, line in listener.heard if line == "WATCHDOG=1" and free < at < held]) >= 3
    again = len(listener.heard)
    while len(listener.heard) == again:
        assert time.monotonic() < held + 20, "it turns again"
        time.sleep(0.01)


def test_an_abstract_socket(tmp_path: Path) -> None:
    name = f"omniport-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"\0{name}")
        systemd.settimeout(10)
        supervisor = Supervisor({"NOTIFY_SOCKET": f"@{name}", "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"})
        supervisor.turn("ready")
        assert systemd.recv(100) == b"STATUS=ready\nREADY=1"
        supervisor.turn("ready")
        supervisor.stopping()
        assert systemd.recv(100) == b"STOPPING=1", "the watchdog waits for another process"


def test_nobody_to_be_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Supervisor({}).turn("ready")
    assert not caplog.records
    Supervisor({"NOTIFY_SOCKET": str(tmp_path / "gone")}).turn("ready")
    assert "was not told" in caplog.text
