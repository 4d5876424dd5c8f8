"""SIGTERM and SIGINT in the middle of the removal of what a command wrote for itself: it is gone all the same."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from omniport.calib.calibration.work_dir import work_folder
from support.command_line import Omniport
from support.signals import SignalAt, handled

SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """SIGINT as in a terminal."""
    with handled(signal.SIGINT):
        yield


@pytest.mark.parametrize(("number", "code"), SIGNALS, ids=["TERM", "INT"])
@pytest.mark.parametrize("what", ["quantize", "export", "make-checkpoint"])
def test_nothing_of_a_command_is_left(
    omniport: Omniport, tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, what: str, number: int, code: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    given: dict[str, list[object]] = {
        "quantize": [tiny_bundle, out, "--recipe", "w8", "--quiet"],
        "export": [tiny_checkpoint, out, "--graphs", "audio_encoder", "--quiet"],
        "make-checkpoint": [out, "--size", "tiny", "--quiet"],
    }
    if what == "make-checkpoint":  # it removes a folder only when it has failed
        monkeypatch.setattr("omniport.export.synthetic.make_checkpoint.write_shards", _fails)
    with SignalAt(number, os, "rmdir") as removal:
        found, _, errors = omniport(what, *given[what])
    assert removal.sent
    assert found == code, errors
    assert {path.name for path in tmp_path.iterdir()} <= {"out"}


def _fails(*_: object, **__: object) -> None:
    raise OSError("no room")


def calibration(folder: Path, key: dict[str, int], error: type[Exception] | None = None) -> None:
    """One that finishes a step, and then ends or fails."""
    with work_folder(folder / "out") as work:
        work.claim(key)
        work.finish("one")
        if error is not None:
            raise error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_of_a_calibration_is_left(tmp_path: Path, number: int) -> None:
    with handled(number), SignalAt(number, os, "unlink") as removal, pytest.raises(KeyboardInterrupt):
        calibration(tmp_path, {"a": 1})
    assert removal.sent
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_that_was_half_removed_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other settings begin anew, and are interrupted: nothing of the run before counts as finished."""
    with pytest.raises(ZeroDivisionError):
        calibration(tmp_path, {"a": 1}, ZeroDivisionError)
    with monkeypatch.context() as patched:
        listed = Path.iterdir
        patched.setattr(Path, "iterdir", lambda folder: iter(sorted(listed(folder))))  # "done" before "key.json"
        with SignalAt(signal.SIGINT, os, "rmdir") as removal, pytest.raises(KeyboardInterrupt):
            calibration(tmp_path, {"a": 2})
    assert removal.sent
    with work_folder(tmp_path / "out") as work:
        assert not work.claim({"a": 1})
        assert not work.done("one")
