"""What the command line prints can be printed, whatever the names, files and replies hold."""

from __future__ import annotations

import io
import json
import sys

import pytest
from omniport.cli import main
from omniport.cli.common import log_console, print_json, print_line, print_table, print_text, set_up_streams
from omniport.runtime.errors import BundleError

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
