"""The command `serve`, as a rule over fake graphs, in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

from .paths import REPOSITORY

#: the command, with changes
CODE = """
import faulthandler, signal, sys, time
if hasattr(signal, "SIGUSR1"):
    faulthandler.register(signal.SIGUSR1)
CHANGES
from omniport.cli.main import run
run(["serve", *sys.argv[1:], "--backend", "ort-cpu", "--port", "0"])
"""
FAKE = """
from omniport.runtime.backends import registry
from support import toy_backend
registry.BACKENDS["ort-cpu"] = "support.toy_backend"
"""
SLOW = """
from support.fake_backend import FakeDecoder
compute = FakeDecoder.compute
FakeDecoder.compute = lambda *arguments: (time.sleep(0.1), compute(*arguments))[1]
"""


def start(root: Path, *arguments: str, slow: str = "", fake: bool = True, **environment: str) -> subprocess.Popen[str]:
    code = CODE.replace("CHANGES", FAKE * fake + slow)
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "tests"), *sys.path]), **environment}
    command = [sys.executable, "-c", code, str(root), *arguments]
    return subprocess.Popen(command, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def listening(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    assert url.startswith("http://127.0.0.1:"), process.communicate()
    due = time.monotonic() + 60
    while httpx.get(f"{url}/ready").status_code != 200:
        assert time.monotonic() < due
        time.sleep(0.05)
    return url


def stacks(process: subprocess.Popen[str]) -> str:
    """What every thread of a server that does not answer is doing. Ends it."""
    if hasattr(signal, "SIGUSR1"):
        process.send_signal(signal.SIGUSR1)
        time.sleep(1)
    process.kill()
    return process.communicate()[1]
