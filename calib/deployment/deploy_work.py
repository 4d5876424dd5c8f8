"""The work folder of a deployment: finished stages and graphs, from which an interrupted one goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from omniport.runtime.bundle.graph_spec import GraphSpec
from omniport.runtime.bundle.listed_files import sha256_of
from omniport.runtime.bundle.manifest import FileRecord
from omniport.runtime.errors import ExportError, UsageError
from omniport.runtime.system.files import path_lock, remove_folder, scratch_folder, sync
from omniport.runtime.system.host import peak_memory
from omniport.runtime.system.interrupts import uninterrupted
from omniport.runtime.system.progress import Progress

from .deploy_record import Deployment, StageFigures, find_record, write_record

_GRAPH = "graph.json"
#: how the names of what is being made begin
_PARTIAL = ".partial-"


class KeptWork(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A finished graph. ``schemes``: weight -> how it is stored, of a graph that was quantized."""

    key: str
    spec: GraphSpec
    files: dict[str, FileRecord]
    schemes: dict[str, str]


class DeployWork:
    """A folder beside OUT, of this process alone.

    Attributes:
        folder: the work folder.
        calibration: where the calibration goes.
    """

    def __init__(self, folder: Path, out: Path) -> None:
        self.folder = folder
        self.calibration = folder / "model.calib"
        self._out = out

    def claim(self, key: str) -> Deployment | None:
        """What a deployment of that key has left; of any other all is removed."""
        found = find_record(self.folder)
        if found is not None and found.key == key:
            for left in self.folder.rglob(f"{_PARTIAL}*"):
                remove_folder(left)
            return found
        for child in self.folder.iterdir():
            remove_folder(child) if child.is_dir() else child.unlink()
        return None

    def save(self, record: Deployment) -> None:
        """Keep a record of what is finished."""
        write_record(self.folder, record)

    def graph(self, name: str, key: str) -> KeptWork | None:
        """A finished graph of that key whose files are whole; None otherwise."""
        folder = self.graph_folder(name)
        try:
            kept = msgspec.json.decode((folder / _GRAPH).read_bytes(), type=KeptWork)
        except (OSError, msgspec.MsgspecError):
            return None
        whole = kept.key == key and all(_whole(folder / file, record) for file, record in kept.files.items())
        return kept if whole else None

    def graph_folder(self, name: str) -> Path:
        """Where a finished graph lies, its files by their names in the bundle."""
        return self.folder / "graphs" / name

    @contextmanager
    def new_graph(self, name: str) -> Iterator[tuple[Path, list[KeptWork]]]:
        """A folder for a graph, and a list for what it is; in place, and on the disk, when the block ends well."""
        target = self.graph_folder(name)
        target.parent.mkdir(exist_ok=True)
        remove_folder(target)
        with scratch_folder(_PARTIAL, target.parent) as scratch:
            fresh, made = scratch / name, list[KeptWork]()
            fresh.mkdir()
            yield fresh, made
            (fresh / _GRAPH).write_bytes(msgspec.json.encode(made[0]))
            for path in (*fresh.rglob("*"), fresh):
                sync(path)
            fresh.rename(target)
            sync(target.parent)

    def drop_graphs(self) -> None:
        """Remove finished graphs: they are in the bundle."""
        remove_folder(self.folder / "graphs")

    def disk_bytes(self) -> int:
        """Bytes that OUT, what is written beside it and this folder take on the disk; a hard link counts once."""
        beside = self._out.parent.glob(f".{self._out.name}.partial-*")
        return disk_bytes(self._out, self.folder, *beside)


class Meter:
    """Time, memory and disk of a stage. Give it to what reports progress: the disk is looked at as often as it does."""

    def __init__(self, work: DeployWork, told: Progress) -> None:
        self._work, self._told = work, told
        self._peak, self._looked, self._began = 0, 0.0, time.perf_counter()
        self._stage = ""

    def progress(self, stage: str, done: int, total: int) -> None:
        """A library function's progress."""
        now = time.perf_counter()
        if stage != self._stage or now - self._looked > 0.5:
            self._stage = stage
            self.look()
        self._told(stage, done, total)

    def look(self) -> None:
        """Look at the disk."""
        self._looked = time.perf_counter()
        self._peak = max(self._peak, self._work.disk_bytes())

    def figures(self) -> StageFigures:
        """What the stage took."""
        self.look()
        seconds = round(time.perf_counter() - self._began, 3)
        return StageFigures(seconds=seconds, peak_memory_bytes=peak_memory() or 0, peak_disk_bytes=self._peak)


@contextmanager
def deploy_work(out: Path) -> Iterator[DeployWork]:
    """The work folder beside ``out``. It stays when the block is interrupted, unless there is nothing to go on from.

    Raises:
        UsageError: another deployment writes to the same place. ExportError: the folder cannot be made.
    """
    target = Path(os.path.realpath(out))
    folder = target.with_name(f".{target.name}.deploy")
    lock: int | None = None
    missing = [each for each in folder.parents if not each.exists()]
    try:
        with uninterrupted():
            lock = _locked(folder, out)
        yield DeployWork(folder, target)
        remove_folder(folder)
    finally:
        with uninterrupted():
            if lock is not None:
                if find_record(folder) is None:
                    remove_folder(folder)
                os.close(lock)
            for each in missing:
                try:
                    each.rmdir()
                except OSError:
                    break


def _locked(folder: Path, out: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"cannot write beside {out}: {error}. Choose a folder that can be written to") from error
    lock = path_lock(folder)
    if lock is None:
        raise UsageError(f"another omniport deploy is writing {out} now: wait for it, or name another OUT")
    return lock


def disk_bytes(*paths: Path) -> int:
    """Bytes that files below some folders take on the disk; a hard link counts once, what vanishes meanwhile not."""
    seen: dict[tuple[int, int], int] = {}
    for path in paths:
        for root, _, names in os.walk(path):
            for name in names:
                try:
                    found = os.lstat(os.path.join(root, name))
                except OSError:
                    continue
                seen[found.st_dev, found.st_ino] = getattr(found, "st_blocks", -(-found.st_size // 512)) * 512
    return sum(seen.values())


def _whole(path: Path, record: FileRecord) -> bool:
    return path.is_file() and path.stat().st_size == record.size and sha256_of(path) == record.sha256.lower()
