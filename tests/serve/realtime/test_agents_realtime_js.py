"""@openai/agents-realtime, unmodified, in Node: every event passes its schema. No part of the `test` extra."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from support.loudness import Loudness
from support.paths import REPOSITORY
from support.realtime import SAID
from support.served import Served

SCRIPT = REPOSITORY / "tests" / "support" / "agents_realtime.cjs"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Cologne"}}\n</tool_call>'
NODE = shutil.which("node")


def has_package() -> bool:
    wanted = "require.resolve('@openai/agents-realtime')"
    return NODE is not None and subprocess.run([NODE, "-e", wanted], capture_output=True).returncode == 0


class Script:
    """The running script, step by step."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def step(self, name: str) -> dict[str, Any]:
        """What has happened up to the step; the script waits there."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        told: dict[str, Any] = json.loads(line) if line else {"step": "died"}
        assert told["step"] == name, told
        return told

    def go_on(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()


@contextmanager
def running(url: str) -> Iterator[Script]:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([str(NODE), str(SCRIPT), url], env=os.environ.copy(), **pipes) as process:
        try:
            yield Script(process)
        finally:
            process.kill()


@pytest.mark.skipif(not has_package(), reason="no Node with @openai/agents-realtime: npm install, and NODE_PATH")
def test_a_conversation(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omniport.serve.realtime.voice_activity.SileroVad", Loudness)
    served.live.script(SAID, [3, 5, 7, 11, 13] * 40)  # 4 s of speech
    with running(f"ws{served.url[4:]}/v1/realtime") as script:
        for name, wanted in (
            ("connected", {"session.created", "session.updated"}),
            ("answered", {"response.output_audio.delta", "response.output_audio_transcript.done", "response.done"}),
            ("interrupted", {"input_audio_buffer.speech_started", "conversation.item.truncated"}),
            ("heard", {"input_audio_buffer.committed", "response.done"}),
        ):
            told = script.step(name)
            assert wanted <= set(told["seen"]), (name, told)
            if name == "heard":
                served.live.script(CALL)
            script.go_on()
        script.step("called")
        served.live.script(SAID)
        script.go_on()
        ended = script.step("ended")
        assert ended["calls"] == ["Rain in Cologne."]
        assert ended["unknown"] == []
