"""Files appear whole or not at all."""

from __future__ import annotations

import os
import signal
import stat
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from omniport.runtime.errors import UsageError
from omniport.runtime.system.files import (
    cache_folder,
    output,
    read_file,
    read_text,
    replace_file,
    replacing,
    scratch_folder,
    write_output,
)
from support.signals import SignalAt, handled


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    replace_file(path, b"one")
    with replacing(path) as partial:
        partial.write_bytes(b"two")
        assert path.read_bytes() == b"one"
        assert partial.parent == tmp_path, "another file system could not be renamed from"
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", [replace_file, write_output])
def test_what_a_killed_process_left_goes_and_nothing_else(tmp_path: Path, write: Any) -> None:
    path = tmp_path / "reply.wav"
    left, mine, others = (
        tmp_path / f".{name}.partial" for name in ("reply.wav.0123abcd", "reply.wav.draft", "other.wav.0123abcd")
    )
    for file in (left, mine, others):
        file.write_text("half")
    with replacing(path) as held:
        held.write_text("slow")
        write(path, b"whole")
        assert path.read_bytes() == b"whole"
        assert {file for file in tmp_path.iterdir() if file != path} == {held, mine, others}
    assert path.read_text() == "slow"
    assert {file for file in tmp_path.iterdir() if file != path} == {mine, others}


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    replace_file(path, b"one")

    def fail() -> None:
        with replacing(path) as partial:
            partial.write_bytes(b"half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError):
        replace_file(tmp_path / "missing" / "report.json", b"three")


def test_a_file_that_the_user_named_is_replaced_or_it_is_said_why_not(tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        write_output(tmp_path / "report.json", content)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"two"]
    with pytest.raises(UsageError, match=r"cannot write .*report\.json: No such file.* Give a file in a folder"):
        write_output(tmp_path / "missing" / "report.json", b"three")


def test_a_link_stays_one_and_its_file_keeps_its_permissions(tmp_path: Path) -> None:
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_bytes(b"old")
    target.chmod(0o600)
    link.symlink_to("target.json")
    write_output(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert {path.name for path in tmp_path.iterdir()} == {"target.json", "link.json"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UsageError, match="nobody reads this pipe"):
        write_output(pipe, b"lost")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_output(pipe, b"heard")
        assert os.read(reader, 100) == b"heard"
    finally:
        os.close(reader)
    assert pipe.is_fifo()


def test_a_failed_output_leaves_what_was_there_and_its_own_error(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(b"old")

    def fail() -> None:
        with output(path) as file:
            file.write(b"half")
            raise ValueError("of the block, not of the file")

    with pytest.raises(ValueError, match="of the block"):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(UsageError, match=r"cannot write .*null"):
        write_output(tmp_path / "a\0b", b"")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_only_regular_files_are_read_and_none_without_a_bound(tmp_path: Path) -> None:
    path, pipe = tmp_path / "text", tmp_path / "pipe"
    path.write_bytes(b"\xef\xbb\xbf" + "größer".encode())
    assert read_text(path) == "größer"
    assert len(read_file(path, 11)) == 11
    with pytest.raises(OSError, match="it has 11 bytes; at most 10"):
        read_file(path, 10)
    os.mkfifo(pipe)
    for odd in (pipe, Path(os.devnull), tmp_path):
        with pytest.raises(OSError, match="not a regular file"):
            read_file(odd, 10)
    with pytest.raises(OSError, match="null"):
        read_file(tmp_path / "a\0b", 10)


def test_writers_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    with replacing(path) as first, replacing(path) as second:
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert path.read_bytes() == b"first"


def test_cache_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNIPORT_CACHE", "")
    assert cache_folder() is None
    monkeypatch.delenv("OMNIPORT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/omniport")


class Stopped(Exception):
    pass


def stop(*_: object) -> None:
    raise Stopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_for_the_end_of_cleaning_up(tmp_path: Path, number: int) -> None:
    """It comes while the half-written file is removed: the file goes, then the signal is acted on."""

    def half() -> None:
        with replacing(tmp_path / "out") as partial:
            partial.write_text("half")
            raise KeyError

    with handled(number, stop), SignalAt(number, Path, "unlink") as at, pytest.raises(Stopped):
        half()
    assert at.sent
    assert list(tmp_path.iterdir()) == []


def test_cleaning_up_in_another_thread(tmp_path: Path) -> None:
    """Signals are the main thread's."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(replace_file, tmp_path / "out", b"whole").result(10)
    assert (tmp_path / "out").read_bytes() == b"whole"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("when", ["made", "removed"])
def test_a_signal_leaves_no_scratch_folder(tmp_path: Path, number: int, when: str) -> None:
    """It comes right after the folder is made, or in the middle of its removal."""
    owner, name = (tempfile, "mkdtemp") if when == "made" else (os, "rmdir")

    def use() -> None:
        with scratch_folder(parent=tmp_path) as folder:
            (folder / "deep").mkdir()
            (folder / "deep" / "file").write_text("x")

    with handled(number, stop), SignalAt(number, owner, name, after=when == "made") as at, pytest.raises(Stopped):
        use()
    assert at.sent
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/stdout").exists(), reason="no /dev/stdout")
def test_an_open_pipe_that_has_no_name_of_its_own() -> None:
    """``--speak /dev/stdout | player``"""
    reading, writing = os.pipe()
    write_output(Path(f"/dev/fd/{writing}"), b"sound")
    os.close(writing)
    assert os.read(reading, 100) == b"sound"
    os.close(reading)


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows")
def test_a_link_to_itself_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match="link to itself"):
        write_output(tmp_path / "loop", b"x")
    assert (tmp_path / "loop").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loop"]
