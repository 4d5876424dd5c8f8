"""Files appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from omniport.runtime.errors import UsageError
from omniport.runtime.system.files import cache_folder, replace_file, replacing, write_output


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    replace_file(path, b"one")
    with replacing(path) as partial:
        partial.write_bytes(b"two")
        assert path.read_bytes() == b"one"
        assert partial.parent == tmp_path, "another file system could not be renamed from"
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


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
