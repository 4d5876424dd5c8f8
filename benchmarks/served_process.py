"""A server in a process of its own, as a load test sees it: its address, memory, threads, processor time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httpx

from .harness import ROOT

_COMMAND = "from omniport.cli.main import run; run()"
_READY = 180.0


class ServedProcess:
    """``omniport serve`` (Linux). What it logs are warnings and errors alone, of which there should be none.

    Attributes:
        url: where it listens. seconds: from its start until it was ready.
    """

    def __init__(self, bundle: Path, *options: object, port: int = 0) -> None:
        begun = time.perf_counter()
        self._bundle = bundle
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by stop
        arguments = ["serve", bundle, "--port", port, "--any-model", "--quiet", *options]
        command = [sys.executable, "-c", _COMMAND, *map(str, arguments)]
        self._process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=self._log)
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        if not self.url:
            raise RuntimeError(f"the server did not start: {self.log()}")
        self.pid = self._process.pid
        while self._ask_ready() != 200:
            if self._process.poll() is not None or time.perf_counter() - begun > _READY:
                raise RuntimeError(f"the server does not become ready: {self.log()}")
            time.sleep(0.05)
        self.seconds = time.perf_counter() - begun

    def __enter__(self) -> ServedProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def port(self) -> int:
        """Where it listens."""
        return urlsplit(self.url).port or 0

    def state(self) -> dict[str, int]:
        """Bytes that are resident, threads, open files."""
        status = (Path("/proc") / str(self.pid) / "status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        files = len(os.listdir(f"/proc/{self.pid}/fd"))
        return {"memory": int(fields["VmRSS"].split()[0]) << 10, "threads": int(fields["Threads"]), "files": files}

    def loop_seconds(self) -> float:
        """Processor time of the thread that runs the event loop, which computes nothing."""
        return int(Path(f"/proc/{self.pid}/task/{self.pid}/schedstat").read_text().split()[0]) / 1e9

    def busy(self) -> int:
        """Replies that are made or waited for."""
        told = httpx.get(f"{self.url}/v1/omniport/capacity").json()
        return int(told["active"] + told["waiting"])

    def settle(self, seconds: float = 20.0) -> float:
        """Seconds until nothing is made any more, at most so many."""
        begun = time.perf_counter()
        while self.busy() and time.perf_counter() - begun < seconds:
            time.sleep(0.05)
        return time.perf_counter() - begun

    def log(self) -> list[str]:
        """Lines that it wrote, without this machine's folders."""
        self._log.seek(0)
        text = self._log.read().replace(str(self._bundle), self._bundle.name)
        return text.replace(f"{ROOT}{os.sep}", "").splitlines()

    def signal(self, number: signal.Signals) -> None:
        """Send one."""
        self._process.send_signal(number)

    def wait(self, seconds: float = 60.0) -> int:
        """For its end; its exit code."""
        return self._process.wait(seconds)

    def stop(self) -> dict[str, Any]:
        """End it, if it has not ended; the exit code, and what it has logged."""
        if self._process.poll() is None:
            self.signal(signal.SIGTERM)
            try:
                self.wait()
            except subprocess.TimeoutExpired:
                self._process.kill()
                self.wait()
        log = [] if self._log.closed else self.log()
        told = {"exit_code": self._process.returncode, "log_lines": len(log), "log": log[:5]}
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()
        return told

    def _ask_ready(self) -> int:
        try:
            return httpx.get(f"{self.url}/ready").status_code
        except httpx.TransportError:
            return 0
