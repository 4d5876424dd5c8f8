"""A session that is used stays with its process: a fork of it is told so, at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omniport.runtime import OmniSession, UsageError
from support.live_turns import Live

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on Windows"),
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),
]

#: seconds; a child that hangs never ends, and one that does not takes 1 s on a machine of its own
PATIENCE = 240


def in_a_fork(check: Callable[[], object]) -> None:
    """It passes in a fork of this process; the limit tells a hang from a machine that is busy."""
    child = os.fork()
    if not child:
        code = 1
        try:
            check()
            code = 0
        finally:
            os._exit(code)
    limit = time.monotonic() + PATIENCE
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > limit:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(ended[1]) == 0


def refused(call: Callable[[], Any]) -> None:
    with pytest.raises(UsageError, match="fork"):
        call()


def test_a_fork_in_a_reply(live: Live) -> None:
    live.script("Yes.", [*range(40), 52])
    session, turn = live.session, live.ask("Hello")
    events = turn.commit()
    next(events)
    message = [{"role": "user", "content": "Hello"}]

    def check() -> None:
        with session._lock:  # as another thread of the parent might hold it
            for call in (session.turn, session.fork, session.reset, session.load, lambda: session.reply(message)):
                refused(call)
            refused(lambda: turn.push_text("more"))
            refused(turn.commit)
            refused(lambda: next(events))
            turn.cancel()
            session.close()

    in_a_fork(check)
    assert list(events)[-1].finish_reason == "stop"  # type: ignore[union-attr]
    session.close()


def test_a_fork_before_the_first_turn(root: Path) -> None:
    """A server may open the bundle, then fork its workers."""
    live = Live(root)
    live.script("Yes.")

    def check() -> None:
        assert live.say("Well?", speak=False)[2].text == "Yes."
        live.session.close()

    in_a_fork(check)
    assert live.say("Well?", speak=False)[2].text == "Yes."
    in_a_fork(lambda: refused(live.session.turn))


def test_forks_of_a_session_are_of_its_process(live: Live) -> None:
    other: OmniSession = live.session.fork()
    live.script("Yes.")
    live.say("Well?", speak=False)
    in_a_fork(lambda: refused(other.turn))


_CHILD_OF_A_REPLY = """
import gc, os, sys
from omniport.runtime import OmniSession, SamplingConfig
session = OmniSession.open(sys.argv[1], backend="ort-cpu", threads=4)
message, few = [{"role": "user", "content": "Hello"}], SamplingConfig(max_new_tokens=3)
events = session.reply(message, thinker=few, talker=few)
next(events)
child = os.fork()
if not child:
    if sys.argv[2] == "reply":
        session.reply(message)
    if sys.argv[2] == "drop":
        session, events = None, None
        gc.collect()
    sys.exit(3)
ended = os.waitpid(child, 0)[1]
events.close()
session.close()
sys.exit(os.waitstatus_to_exitcode(ended) % 256)
"""


@pytest.mark.parametrize(("what", "code"), [("reply", 1), ("drop", 3), ("leave", 3)])
def test_a_fork_ends_as_it_says(tiny_bundle: Path, what: str, code: int) -> None:
    """ONNX Runtime's threads are the parent's: whoever joins them at exit in a fork crashes, or waits forever."""
    command = [sys.executable, "-W", "ignore", "-c", _CHILD_OF_A_REPLY, str(tiny_bundle), what]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == code, ended.stderr
    assert ("is a fork" in ended.stderr) == (what == "reply")
