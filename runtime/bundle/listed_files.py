"""Files named in a manifest or listing: which paths are allowed, and whether the file is the listed one."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

import msgspec

from ..errors import BundleError
from ..system.files import open_regular, read_file
from .manifest import FileRecord

T = TypeVar("T")

SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_READ_BLOCK = 1 << 20
_MAX_DOCUMENT_BYTES = 16 << 20


@dataclass(frozen=True)
class Document:
    """What a JSON file of the bundle calls itself, and what messages about it say.

    Attributes:
        newest: the newest schema version that this release reads.
        made_by: the command that writes it.
        mend: what to do about a damaged one, a sentence without its full stop.
    """

    format: str
    newest: int
    what: str
    made_by: str
    mend: str


class _Header(msgspec.Struct):
    """What every schema version has; read first, so that a newer file is called newer, not malformed."""

    format: str
    schema_version: int


def bad_path(name: str) -> str:
    """Why a path inside a bundle is refused; empty if it is fine."""
    if not name or "\0" in name or "\\" in name or ":" in name:
        return "is empty or holds one of NUL, '\\' and ':'"
    path = PurePosixPath(name)
    if path.is_absolute():
        return "is absolute"
    if ".." in path.parts:
        return "holds '..'"
    if str(path) != name or name == ".":
        return "is not in its shortest form"
    return ""


def read_document(path: Path, kind: type[T], about: Document) -> T:
    """Decode one of a bundle's JSON files.

    Raises:
        BundleError: missing, too large, of another format, newer than this release, or with unknown or repeated keys.
    """
    text = _read_small(path, about)
    try:
        header = msgspec.json.decode(text, type=_Header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{path} is not {about.what}: {error}. {about.mend}") from error
    if header.format != about.format:
        raise BundleError(f"{path} has format {header.format!r}; {about.format!r} was expected")
    if header.schema_version > about.newest:
        raise BundleError(
            f"{path} has schema version {header.schema_version}; this release reads up to {about.newest}: "
            "upgrade omniport"
        )
    if header.schema_version < 1:
        raise BundleError(f"{path} has schema version {header.schema_version}; 1 to {about.newest} was expected")
    try:
        document = msgspec.json.decode(text, type=kind)
        _refuse_repeated_keys(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise BundleError(f"{path} does not follow the bundle format: {error}. {about.mend}") from error
    return document


def _read_small(path: Path, about: Document) -> bytes:
    try:
        return read_file(path, _MAX_DOCUMENT_BYTES)
    except OSError as error:
        raise BundleError(
            f"cannot read {path}: {error.strerror or error}. A file made by {about.made_by!r} was expected"
        ) from error


def _refuse_repeated_keys(text: bytes) -> None:
    """Two values for one key would let two readers see two different bundles."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            repeated = sorted(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
            more = f" and {len(repeated) - 3} more" if len(repeated) > 3 else ""
            raise ValueError(f"key {', '.join(repeated[:3])}{more} occurs twice in one object")
        return found

    json.loads(text, object_pairs_hook=unique)


def resolve_listed(root: Path, name: str, size: int, listing: str, mend: str) -> Path:
    """Absolute path of a listed file that exists inside the bundle with its listed size.

    Args:
        listing: the file that lists it, relative to ``root``, for messages.
        mend: what to do about a file that is not right, for messages.

    Raises:
        BundleError: missing, not a regular file, of another size, or a link that leaves the bundle.
    """
    base = root.resolve()
    try:
        path = base.joinpath(*PurePosixPath(name).parts).resolve(strict=True)
        inside, regular, found = path.is_relative_to(base), path.is_file(), path.stat().st_size
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise BundleError(f"{name}, listed in {root / listing}, cannot be opened: {error}. {mend}") from error
    if not inside:
        raise BundleError(f"{name} in {root} is a link that leaves the bundle ({path}); put the file itself there")
    if not regular:
        raise BundleError(f"{name} in {root} is not a regular file")
    if found != size:
        raise BundleError(
            f"{name} in {root} has {found} bytes; {listing} lists {size}. The file is truncated or was replaced: "
            f"{mend[0].lower()}{mend[1:]}"
        )
    return path


def file_record(path: Path) -> FileRecord:
    """Size and sha256 of a file.

    Raises:
        BundleError: the file cannot be read.
    """
    return FileRecord(size=path.stat().st_size, sha256=sha256_of(path))


def sha256_of(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """sha256 of a file in lower-case hexadecimal digits; ``advance`` is called with the bytes of each block.

    Raises:
        BundleError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            while block := file.read(_READ_BLOCK):
                digest.update(block)
                if advance is not None:
                    advance(len(block))
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()
