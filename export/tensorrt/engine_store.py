"""Store engines in a bundle: files first, the listing last, each replaced atomically.

At every moment the listing names only engines that are whole: one that is about to be replaced leaves the listing
before its file changes. A second build into the same bundle waits for the first.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from omniport.runtime.bundle.engines import (
    ENGINES_FILE,
    EngineListing,
    EngineRecord,
    ListedEngine,
    read_listing,
    record_path,
)
from omniport.runtime.bundle.listed_files import file_record, sha256_of
from omniport.runtime.errors import BuildError, BundleError
from omniport.runtime.system.files import PARTIAL, partial_path, path_lock, put_in_place, read_file, replace_file


class EngineStore:
    """The ``engines`` folder of one bundle, held by this process.

    Args:
        created_by: program and version, for the listing.
    """

    def __init__(self, root: Path, created_by: str) -> None:
        self.root = root
        self._created_by = created_by

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder. Takes away what killed builds left, and the folders that stay empty.

        Raises:
            BuildError: another build is writing into this bundle, or the folder cannot be written.
        """
        folder = self.root / ENGINES_FILE
        lock: int | None = None
        try:
            folder.parent.mkdir(exist_ok=True)
            self._refuse_links()
            lock = path_lock(folder.parent)
            if lock is None and os.name == "posix":
                raise BuildError(f"another build is writing into {folder.parent}: wait for it to end")
            for left in folder.parent.glob(f"**/.*{PARTIAL}"):
                left.unlink(missing_ok=True)
            yield
        except OSError as error:
            raise BuildError(
                f"cannot write into {folder.parent}: {error}. Nothing half-written was left. Free some space, or give "
                "a bundle that can be written to"
            ) from error
        finally:
            _remove_empty(folder.parent)
            if lock is not None:
                os.close(lock)

    def _refuse_links(self) -> None:
        base = self.root.resolve()
        for inner in (base / "engines", *(base / "engines").glob("*/")):
            if not inner.resolve().is_relative_to(base):
                raise BundleError(f"{inner} is a link that leaves the bundle: remove it")

    def record(self, name: str) -> EngineRecord | None:
        """The record of a listed engine that is there, whole by its size; None otherwise."""
        listed = self._engines().get(name)
        path, beside = self.root / name, self.root / record_path(name)
        if listed is None or not path.is_file() or path.stat().st_size != listed.engine.size:
            return None
        try:
            if sha256_of(beside) != listed.record.sha256:
                return None
            return msgspec.json.decode(read_file(beside, 16 << 20), type=EngineRecord)
        except (BundleError, OSError, msgspec.MsgspecError):
            return None

    def scratch(self, name: str) -> Path:
        """A new name for an engine until it is whole."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return partial_path(path)

    def put(self, name: str, scratch: Path, record: EngineRecord) -> None:
        """Put a whole engine and its record in place, and list them."""
        engines = self._engines()
        if engines.pop(name, None) is not None:
            self._list(engines)
        put_in_place(scratch, self.root / name)
        beside = self.root / record_path(name)
        replace_file(beside, msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
        engines[name] = ListedEngine(engine=record.engine, record=file_record(beside))
        self._list(engines)

    def _engines(self) -> dict[str, ListedEngine]:
        listing = read_listing(self.root)
        return dict(listing.engines) if listing is not None else {}

    def _list(self, engines: dict[str, ListedEngine]) -> None:
        listing = EngineListing(created_by=self._created_by, engines=dict(sorted(engines.items())))
        replace_file(self.root / ENGINES_FILE, msgspec.json.format(msgspec.json.encode(listing), indent=1) + b"\n")


def _remove_empty(folder: Path) -> None:
    for inner in (*sorted(folder.glob("*/")), folder):
        with contextlib.suppress(OSError):
            inner.rmdir()
