"""What people said is in no line of the log, nor in an error that stands there."""

from __future__ import annotations

import asyncio
import io
import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from omniport.runtime.errors import BackendError
from omniport.serve.log_lines import WithoutContent, log_failure
from support.served import Served
from support.served_process import listening, start

SECRET = "my password is swordfish"
FAILING = f"""
from support.fake_backend import FakeDecoder
SLOW_FAILURE = "{SECRET}"
first = []
compute = FakeDecoder.compute
def fail(*arguments):
    if len(first) > 40: raise KeyError("{SECRET}")
    first.append(0)
    return compute(*arguments)
FakeDecoder.compute = fail
"""


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(WithoutContent("%(message)s"))
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield written
    root.removeHandler(handler)
    root.setLevel(level)


def test_an_error_s_classes_and_places(log: io.StringIO) -> None:
    try:
        try:
            raise ValueError(SECRET)
        except ValueError as error:
            raise KeyError(SECRET) from error
    except KeyError:
        logging.getLogger("any").exception("it failed")
    text = log.getvalue()
    assert SECRET not in text
    assert "builtins.ValueError" in text
    assert "builtins.KeyError" in text
    assert f"{__file__}:" in text


def test_what_is_about_the_machine_is_told(log: io.StringIO) -> None:
    logging.getLogger("any").error("it failed", exc_info=BackendError("the engine is for another device"))
    assert "the engine is for another device" in log.getvalue()


def test_a_task_that_nobody_waited_for(log: io.StringIO) -> None:
    async def fail() -> None:
        raise ValueError(SECRET)

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(log_failure)
        task = asyncio.ensure_future(fail())
        await asyncio.sleep(0.01)
        del task

    asyncio.run(run())
    assert "never retrieved" in log.getvalue()
    assert SECRET not in log.getvalue()


def test_a_path_makes_no_line_of_its_own(served: Served, log: io.StringIO) -> None:
    served.http().get("/a%0Ab%1b[31m")
    lines = [line for line in log.getvalue().splitlines() if line.startswith("GET")]
    assert [line.split()[1] for line in lines] == ["/a%0Ab%1B%5B31m"]


@pytest.mark.parametrize("asked", [False, True])
def test_a_reply_that_fails(root: Path, stopped: list[subprocess.Popen[str]], asked: bool) -> None:
    process = start(root, *["--log-content"] * asked, slow=FAILING)
    stopped.append(process)
    url = listening(process)
    body = {"messages": [{"role": "user", "content": SECRET}], "stream": True, "max_tokens": 100}
    for _ in range(3):
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert SECRET not in answer.text
    assert "internal_error" in answer.text
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert "KeyError" in err
    assert (SECRET in err) == asked
