"""The user's cache folder, and replacing a file in one step: a reader sees the old one or the new one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import UsageError

#: how the names of files end that are being written
PARTIAL = ".partial"


def partial_path(path: Path) -> Path:
    """A new name beside ``path`` for what is to take its place."""
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}{PARTIAL}")


def put_in_place(partial: Path, path: Path) -> None:
    """Let a whole file take the place of ``path``.

    Raises:
        OSError: it cannot be renamed.
    """
    os.replace(partial, path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to the path that is given; at the end of the block that file takes the place of ``path``.

    When the block fails, the file goes, and what was at ``path`` stays.

    Raises:
        OSError: it cannot be put in place.
    """
    partial = partial_path(path)
    try:
        yield partial
        put_in_place(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink()


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file by one with this content.

    Raises:
        OSError: the folder is missing, or cannot be written.
    """
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_output(path: Path, content: bytes) -> None:
    """Replace a file that the user named.

    Raises:
        UsageError: the folder is missing, or cannot be written.
    """
    try:
        replace_file(path, content)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"cannot write {path}: {reason}. Give a file in a folder that can be written") from error


def cache_folder() -> Path | None:
    """Where what can be made again is kept; None when the cache is switched off (``OMNIPORT_CACHE`` is empty)."""
    named = os.environ.get("OMNIPORT_CACHE")
    if named is not None:
        return Path(named) if named else None
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "omniport"
