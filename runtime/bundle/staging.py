"""Write a folder under a temporary name, and rename it into place once it is complete.

Next to ``NAME`` a folder ``.NAME.partial-XXXX`` holds ``new``, what is being written. It is written out to disk, then
both change places in one step; where the system cannot do that, ``NAME`` becomes ``old`` in that folder first. The
folder's owner holds a lock on it, which the kernel releases however the process ends: one that nobody holds was left by
a process that was killed. Whoever reads or writes ``NAME`` next for a new version puts ``old`` back, should the kill
have come between two renames, and removes the rest.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import BundleError, ExportError
from ..system.files import exchange, path_lock, remove_folder, sync
from ..system.interrupts import uninterrupted
from .manifest import Manifest
from .reader import MANIFEST_FILE, read_manifest

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A folder that takes the place of ``out`` when the block ends well, and vanishes when it does not.

    Raises:
        ExportError: the disk is full, or the folder cannot be written. What was at ``out`` before is untouched.
    """
    target = Path(os.path.realpath(out))  # a link stays a link: what it points to is replaced
    missing = [folder for folder in target.parents if not folder.exists()]
    room: Path | None = None
    lock: int | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        recover(target)
        while room is None or not room.exists():  # another process that writes there may sweep it before it is locked
            with uninterrupted():
                room = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
                lock = path_lock(room)
                with contextlib.suppress(FileNotFoundError):
                    (room / "new").mkdir()
        fresh = room / "new"
        yield fresh
        for path in (*fresh.rglob("*"), fresh):
            sync(path)
        _place(fresh, target, room)
        sync(target.parent)
    except OSError as error:
        raise write_error(error, target) from error
    finally:
        with uninterrupted():
            if room is not None:
                _remove(room, target)
            if lock is not None:
                os.close(lock)
            if not target.exists():
                for folder in missing:
                    with contextlib.suppress(OSError):
                        folder.rmdir()


def _place(fresh: Path, target: Path, room: Path) -> None:
    """Let the new folder take the place of the old one, if there is one."""
    try:
        if not target.exists():
            fresh.rename(target)
            return
    except OSError:
        if not target.exists():
            raise
    # there it is, if only since a moment: another process wrote it
    if not exchange(fresh, target):
        target.rename(room / "old")
        fresh.rename(target)


def take_over(source: Path, target: Path, link: bool = True) -> None:
    """Hard-link a file into the new folder, or copy it where links are not possible.

    Args:
        link: False copies: the onnx package reads no weights from a file that has other links.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)


def check_space(out: Path, needed: int, what: str = "bundle") -> None:
    """ExportError if the disk that ``out`` will be on has less than ``needed`` bytes free for ``what``."""
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ExportError(
            f"{parent} has {free / 1e6:,.0f} MB free and the {what} needs {needed / 1e6:,.0f} MB. Free some space or "
            "choose another folder."
        )


def previous_manifest(out: Path) -> Manifest | None:
    """The manifest of the bundle that ``out`` holds, None if there is nothing at all.

    Raises:
        ExportError: something else is there. It is not for this program to remove.
    """
    recover(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST_FILE).exists():
        raise ExportError(f"{out} exists and holds no bundle. Choose another folder, or remove it first.")
    try:
        return read_manifest(out)
    except BundleError as error:
        raise ExportError(
            f"{out} holds a bundle that this release cannot read ({error}). Remove the folder, or choose another one."
        ) from error


def unlisted(out: Path, manifest: Manifest) -> list[str]:
    """Files in a bundle's folder that the bundle does not list: somebody else's, to be left there."""
    found = (path.relative_to(out).as_posix() for path in sorted(out.rglob("*")) if not path.is_dir())
    return [name for name in found if name != MANIFEST_FILE and name not in manifest.files]


def recover(out: Path) -> None:
    """Put back what a killed export to ``out`` had moved aside, and remove what else it left behind."""
    target = Path(os.path.realpath(out))
    for name in glob.glob(f".{glob.escape(target.name)}.partial-*", root_dir=target.parent):
        room = target.parent / name
        lock = path_lock(room)
        if lock is not None:
            _remove(room, target)
            os.close(lock)


def _remove(room: Path, target: Path) -> None:
    old = room / "old"
    if old.exists() and not target.exists():
        with contextlib.suppress(OSError):
            old.rename(target)
    if not old.exists() or target.exists():
        remove_folder(room)


def write_error(error: OSError, target: Path) -> ExportError:
    """What to tell of a file or folder that could not be written."""
    if error.errno in _DISK_ERRORS:
        return ExportError(
            f"the disk is full: {error.strerror} while writing {target}. Nothing was left behind. Free some space or "
            "choose another folder."
        )
    return ExportError(
        f"cannot write {target}: {error}. Nothing was left behind. Give a folder that can be written to."
    )
