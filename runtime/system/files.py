"""The user's cache folder, and replacing a file in one step: a reader sees the old one or the new one."""

from __future__ import annotations

import ctypes
import errno
import glob
import importlib
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..errors import UsageError
from .interrupts import uninterrupted

NONBLOCK = getattr(os, "O_NONBLOCK", 0)  # 0 on Windows
#: how the names of files end that are being written
PARTIAL = ".partial"
#: of Linux' renameat2
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def partial_path(path: Path) -> Path:
    """A new name beside ``path`` for what is to take its place."""
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}{PARTIAL}")


def path_lock(path: Path) -> int | None:
    """An open descriptor that holds the lock of a path; None if another process holds it or nobody can say."""
    try:
        fcntl: Any = importlib.import_module("fcntl")  # not on Windows, where nothing is swept
    except ImportError:
        return None
    descriptor = -1
    try:
        descriptor = os.open(path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if descriptor >= 0:
            os.close(descriptor)
        return None
    return descriptor


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A new, empty file beside ``path`` for what is to take its place; it is gone at the end of the block.

    Its lock is held until then: such files that nobody holds were left by processes that were killed, and go.

    Raises:
        OSError: it cannot be made.
    """
    for name in glob.glob(f".{glob.escape(path.name)}.*{PARTIAL}", root_dir=path.parent):
        left = path.parent / name
        if re.fullmatch(r"[0-9a-f]{8}", name.split(".")[-2]) and (lock := path_lock(left)) is not None:
            with suppress(OSError):
                left.unlink()
            os.close(lock)
    partial, held = partial_path(path), None
    try:
        with uninterrupted():
            partial.touch()
            held = path_lock(partial)
        yield partial
    finally:
        with uninterrupted():
            with suppress(OSError):
                partial.unlink()
            if held is not None:
                os.close(held)


def put_in_place(partial: Path, path: Path) -> None:
    """Let a whole file take the place of ``path``: it is on the disk before its name changes.

    Raises:
        OSError: it cannot be written out, or renamed.
    """
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def exchange(fresh: Path, target: Path) -> bool:
    """Let two folders change places in one step; False where the system or its file system cannot.

    Raises:
        OSError: anything else.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(fresh), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EPERM):  # an old kernel, NFS and others, a container's filter
        return False
    raise OSError(number, os.strerror(number), str(target))


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, written to the disk.

    Raises:
        OSError: the disk is full, or failed.
    """
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has nothing to sync
            raise
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to the path that is given; at the end of the block that file takes the place of ``path``.

    When the block fails, the file goes, and what was at ``path`` stays.

    Raises:
        OSError: it cannot be put in place.
    """
    with _partial(path) as partial:
        yield partial
        put_in_place(partial, path)


def remove_folder(path: Path) -> None:
    """Remove a folder, as far as that is possible; a signal waits until it is gone."""
    with uninterrupted():
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def scratch_folder(prefix: str = "omniport-", parent: Path | None = None) -> Iterator[Path]:
    """A new folder, which is gone at the end of the block, whatever signal comes.

    Args:
        parent: the folder that it is made in; the system's for temporary files if None.

    Raises:
        OSError: it cannot be made.
    """
    folder: Path | None = None
    try:
        with uninterrupted():  # a signal in between would leave a folder that nobody knows of
            folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        yield folder
    finally:
        if folder is not None:
            remove_folder(folder)


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file by one with this content.

    Raises:
        OSError: the folder is missing, or cannot be written.
    """
    with replacing(path) as partial:
        partial.write_bytes(content)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong with writing a file that the user named into a UsageError that names it."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        nobody = getattr(error, "errno", 0) == errno.ENXIO
        reason = "nobody reads this pipe" if nobody else getattr(error, "strerror", None) or error
        raise UsageError(f"cannot write {path}: {reason}. Give a file in a folder that can be written") from error


@contextmanager
def output(path: Path) -> Iterator[BinaryIO]:
    """Write a file that the user named; it takes its place at the end of the block, and nothing when the block fails.

    A link stays one: the file that it points to is replaced, and keeps its permissions. A pipe or a device (it is not
    seekable) is written to as it is.

    Raises:
        UsageError: the folder is missing, the file cannot be put in place, or nobody reads the pipe.
    """
    with ExitStack() as stack:
        with writing(path):
            target = Path(os.path.realpath(path))
            if target.is_symlink():
                raise OSError(errno.ELOOP, "it is a link to itself", str(path))
            mode = path.stat().st_mode if path.exists() else None
            regular = mode is None or stat.S_ISREG(mode)
            partial = stack.enter_context(_partial(target)) if regular else None
            file = stack.enter_context(_closing(_open_device(path) if partial is None else partial.open("wb")))
        yield file
        with writing(path):
            file.close()
            if partial is not None:
                if mode is not None:
                    partial.chmod(stat.S_IMODE(mode))
                put_in_place(partial, target)


@contextmanager
def _closing(file: BinaryIO) -> Iterator[BinaryIO]:
    try:
        yield file
    finally:
        with uninterrupted(), suppress(OSError):
            file.close()


def _open_device(path: Path) -> BinaryIO:
    # without O_NONBLOCK opening a pipe waits until somebody reads it
    descriptor = os.open(path, os.O_WRONLY | NONBLOCK)
    if sys.platform != "win32":
        os.set_blocking(descriptor, True)
    return cast(BinaryIO, open(descriptor, "wb", buffering=0))


def write_output(path: Path, content: bytes) -> None:
    """Write a file that the user named, as ``output`` does.

    Raises:
        UsageError: it cannot be written.
    """
    with output(path) as file, writing(path):
        file.write(content)


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading. Opening a pipe would wait for a writer, and a device never ends.

    Raises:
        OSError: it cannot be opened, or is something else.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | NONBLOCK | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
    except ValueError as error:  # a null byte in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return open(descriptor, "rb")


def read_file(path: str | os.PathLike[str], most: int) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: it cannot be read, or has more than ``most`` bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > most else file.read(most + 1)  # a file that grows meanwhile is refused too
    if size > most or len(content) > most:
        raise OSError(errno.EFBIG, f"it has {size} bytes; at most {most} were expected", str(path))
    return content


def read_text(path: str | os.PathLike[str], most: int = 64 << 20) -> str:
    """The text of a regular file: UTF-8, with or without the byte order mark that Windows programs write.

    Raises:
        OSError: as ``read_file``.
        UnicodeDecodeError: it is not UTF-8.
    """
    return read_file(path, most).decode("utf-8-sig")


def cache_folder() -> Path | None:
    """Where what can be made again is kept; None when the cache is switched off (``OMNIPORT_CACHE`` is empty)."""
    named = os.environ.get("OMNIPORT_CACHE")
    if named is not None:
        return Path(named) if named else None
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "omniport"


def read_own_file(path: Path, most: int) -> bytes:
    """The bytes of a file that is this user's alone.

    Raises:
        OSError: it cannot be read, is a link, somebody else's or open to others, or has more than ``most`` bytes.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb") as file:
        facts = os.fstat(descriptor)
        others = sys.platform != "win32" and (facts.st_uid != os.geteuid() or facts.st_mode & 0o022)
        if others or facts.st_size > most:
            raise PermissionError(f"{path} is not this user's alone, or too large")
        return file.read(most)
