"""A null byte in a path is one clear error, in every argument and option that may hold one, and in the runtime."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omniport.runtime import OmniSession
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import UserError
from omniport.runtime.system.files import write_output
from support.command_line import Omniport, refused
from support.live_turns import Live


@pytest.mark.parametrize(
    "command",
    [
        ["run", "NUL", "--text", "Hello"],
        ["inspect", "NUL"],
        ["voices", "NUL"],
        ["plan", "NUL"],
        ["export", "NUL", "out"],
        ["make-checkpoint", "NUL"],
        ["bench", "NUL"],
        ["validate", "NUL", "NUL"],
    ],
)
@pytest.mark.parametrize("name", ["a\0b", "/" + "x" * 300], ids=["null", "long"])
def test_commands(omniport: Omniport, command: list[str], name: str, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(omniport(*(name if word == "NUL" else word for word in command)))
    assert len(re.findall("^error: ", message, re.MULTILINE | re.IGNORECASE)) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "use",
    [
        OmniSession.open,
        lambda path: Bundle.open(path, verify=True),
        lambda path: write_output(Path(path), b"x"),
    ],
)
def test_the_runtime(use: Callable[[str], object]) -> None:
    with pytest.raises(UserError, match=r"(?i)null"):
        use("a\0b")


@pytest.mark.parametrize("kind", ["audio", "image", "video"])
def test_media(live: Live, kind: str) -> None:
    with pytest.raises(UserError):
        live.session.reply([{"role": "user", "content": [{"type": kind, kind: "a\0b"}]}])
