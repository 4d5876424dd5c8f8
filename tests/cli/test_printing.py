"""What the command line prints can be printed, whatever the names, files and replies hold."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from omniport.cli import main
from omniport.cli.common import log_console, print_json, print_line, print_table, print_text, set_up_streams
from omniport.runtime.errors import BundleError
from support.bundles import edit, make_bundle
from support.command_line import Omniport
from support.signals import handled

EVIL = "\x1b[2J\x07\x9b\u202e\rgone"


def test_control_characters_of_files_are_spelled(capsys: pytest.CaptureFixture[str]) -> None:
    print_line(f"voice {EVIL}")
    print_text(f"a reply{EVIL}\n")
    print_table(EVIL, ("name",), [(EVIL,)])
    log_console().print(f"stage {EVIL}", markup=False)
    captured = capsys.readouterr()
    for text in captured:
        assert not set(text) & set("\x1b\x07\x9b\u202e\r")
    assert captured.out.count("\\x1b[2J\\x07\\x9b\\u202e\\rgone") == 4
    assert "stage \\x1b[2J" in captured.err


def test_a_message_cannot_forge_a_second_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise BundleError("unknown field `x\nerror: all is well`")

    monkeypatch.setattr(main, "app", fail)
    with pytest.raises(SystemExit, match="2"):
        main.run([])
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error:")] == ["error: unknown field `x"]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "gbk"])
def test_an_encoding_that_lacks_characters_ends_no_reply(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    set_up_streams()
    print_text("naïve 你好 \U0001f600\n")
    sys.stdout.flush()
    assert b"\\U0001f600" in raw.getvalue()
    begin = len(raw.getvalue())
    print_json({"text": "你好 \U0001f600 \x9b"})
    line = raw.getvalue()[begin:]
    assert line.isascii()
    assert json.loads(line) == {"text": "你好 \U0001f600 \x9b"}


@pytest.mark.parametrize("value", ["inf", "nan", "-1", "many"])
def test_a_number_is_finite_and_in_range(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main.run(["run", "bundle", "--text", "hi", "--max-speech", value])
    assert "--max-speech" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["_report", "signal.signal"])
def test_an_interruption_at_the_very_end_is_an_exit_code(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """While an error is told, or the signals' handlers are put back."""
    calls: list[object] = []

    def interrupted(*given: object) -> None:
        calls.append(given)
        if where == "_report" or len(calls) == 2:
            raise KeyboardInterrupt

    owner = main if where == "_report" else main.signal
    monkeypatch.setattr(owner, where.rpartition(".")[2], interrupted)
    with pytest.raises(SystemExit, match="130"):
        main.run(["inspect", "nowhere"])
    assert calls


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_a_library_swallows_is_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    """As torch does while it traces: whatever is raised is a reason to try otherwise, and to fail in the end."""

    def swallows(**_: object) -> None:
        try:
            signal.raise_signal(number)
        except BaseException:  # noqa: BLE001 - what the library does
            raise RuntimeError("partially initialized module") from None

    monkeypatch.setattr(main, "app", swallows)
    with handled(signal.SIGINT), pytest.raises(SystemExit, match=str(code)):
        main.run([])
    assert capsys.readouterr().err == ""


def _omniport(tmp_path: Path, streams: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run with the streams that a shell makes."""
    words = [sys.executable, "-c", "from omniport.cli.main import run; run()", *arguments]
    shell = ["sh", "-c", f'"$@" {streams}', "sh", *words]
    return subprocess.run(shell, capture_output=True, text=True, timeout=240, cwd=tmp_path, check=False)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("arguments", [("--help",), ("voices", "bundle"), ("inspect", "bundle", "--json")])
def test_an_output_that_is_full_is_no_bug_of_ours(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    make_bundle(tmp_path / "bundle")
    ended = _omniport(tmp_path, ">/dev/full", *arguments)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("error: cannot write: No space left on device")
    assert ended.stderr.count("\n") == 1
    assert _omniport(tmp_path, ">/dev/full 2>/dev/full", *arguments).returncode == 2


@pytest.mark.skipif(sys.platform == "win32", reason="a shell of Unix")
@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&-", ">&- 2>&- <&-"])
def test_streams_that_were_closed_take_everything(tmp_path: Path, streams: str) -> None:
    make_bundle(tmp_path / "bundle")
    ended = _omniport(tmp_path, streams, "voices", "bundle")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""


def test_a_voice_of_control_characters(root: Path, omniport: Omniport) -> None:
    edit(root, lambda document: document["voices"][0].update(name="\x1b]0;x\x07y"))
    assert "\x1b" not in omniport("voices", root)[1]
