"""The work folder of a calibration: results of finished steps, from which an interrupted run resumes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omniport.runtime.errors import CheckFailed, UsageError
from omniport.runtime.system.files import path_lock, remove_folder, replace_file, replacing
from omniport.runtime.system.interrupts import uninterrupted

from .observers import Observer

_KEY = "key.json"
#: what every run writes anew
SOURCE = "source"


class Work:
    """A folder of named arrays and finished steps. Files appear whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def claim(self, key: Mapping[str, Any]) -> bool:
        """Make the folder that of a run with this key; True if such a run has left something there."""
        path = self.folder / _KEY
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            found = None
        if found == dict(key):
            return True
        path.unlink(missing_ok=True)  # first: what is left of that run, should this be interrupted, is not a whole one
        for child in self.folder.iterdir():
            if child.name != SOURCE:
                shutil.rmtree(child) if child.is_dir() else child.unlink()
        self._write(path, json.dumps(dict(key)).encode())
        return False

    def done(self, step: str) -> bool:
        """Whether a step is finished."""
        return (self.folder / "done" / step).exists()

    def finish(self, step: str) -> None:
        """A step is finished: all that it wrote is there."""
        self._write(self.folder / "done" / step, b"")

    def put(self, name: str, value: Any) -> None:
        """Keep a JSON value."""
        self._write(self.folder / f"{name}.json", json.dumps(value).encode())

    def get(self, name: str) -> Any:
        """A JSON value that was kept."""
        return json.loads((self.folder / f"{name}.json").read_text())

    def put_array(self, name: str, array: NDArray[Any]) -> None:
        """Keep an array."""
        path = self.folder / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)

    def array(self, name: str) -> NDArray[Any]:
        """An array that was kept."""
        found: NDArray[Any] = np.load(self.folder / f"{name}.npy")
        return found

    def keep(self, step: str, samples: int, observers: Mapping[str, Observer]) -> None:
        """Keep how many samples of a step are through, and what its observers have seen, as one file."""
        path = self.folder / "observers" / f"{step}.pt"
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as partial:
            torch.save((samples, {name: observer.state() for name, observer in observers.items()}), partial)

    def restore(self, step: str, observers: Mapping[str, Observer]) -> int:
        """Give observers what they had seen; returns how many samples that were."""
        path = self.folder / "observers" / f"{step}.pt"
        if not path.exists():
            return 0
        samples, states = torch.load(path, weights_only=True)
        for name, observer in observers.items():
            observer.restore(states[name])
        return int(samples)

    def _write(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)


@contextmanager
def work_folder(out: Path) -> Iterator[Work]:
    """The work folder beside ``out``, for this process alone.

    It goes when the block ends, when a check has failed, and when there is nothing in it to go on from; it stays when
    the block is interrupted.

    Raises:
        UsageError: another run writes to the same place, or the folder cannot be made.
    """
    folder = out.absolute().with_name(f".{out.name}.work")
    lock: int | None = None
    try:
        with uninterrupted():
            lock = _locked(folder, out)
        yield Work(folder)
        remove_folder(folder)
    except BaseException as error:
        if lock is not None and (isinstance(error, CheckFailed) or not (folder / _KEY).exists()):
            remove_folder(folder)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _locked(folder: Path, out: Path) -> int:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write beside {out}: {error}. Choose a folder that can be written to") from error
    lock = path_lock(folder)
    if lock is None:
        raise UsageError(f"another calibration is writing {out} now: wait for it, or name another file")
    return lock
