"""Check media files before a decoder sees them, and import the optional packages that decode them."""

from __future__ import annotations

import base64
import importlib
import io
import os
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from ..errors import MediaError
from ..system.foreign import foreign

Source = str | os.PathLike[str] | bytes


def require(module: str) -> Any:
    """Import an optional package; MediaError names the extra that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"PIL.Image": "pillow", "PIL.ImageOps": "pillow"}.get(module, module)
        raise MediaError(
            f"reading media needs the {package!r} package, which is not installed ({error}); "
            "run: pip install 'omniport[media]'"
        ) from error


def describe(source: object) -> str:
    """How messages call a checked source: the path, or its size."""
    if isinstance(source, bytes):
        return f"<{len(source)} bytes>"
    if isinstance(source, (str, os.PathLike)):
        return repr(os.fspath(source))
    return f"<{type(source).__name__}>"


def parsing(problem: str, remedy: str) -> AbstractContextManager[None]:
    """Around another library's decoder: whatever it raises becomes MediaError, see `foreign`."""
    return foreign(MediaError, problem, remedy)


def is_array(value: object) -> bool:
    """Whether it is an array, or another library's tensor; NumPy's own strings and bytes are what they hold."""
    return not isinstance(value, (str, bytes)) and any(hasattr(value, name) for name in ("__array__", "__dlpack__"))


def as_array(value: Any, label: str) -> NDArray[Any]:
    """Numbers of NumPy, another library or lists as an array. Gradients and devices are left behind; bfloat16, which
    NumPy does not have, becomes float32.

    Raises:
        MediaError: it cannot become one; the message calls it ``label``.
    """
    with parsing(f"{label} are no array", "pass a NumPy array"):
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            value = value.float() if str(value.dtype) == "torch.bfloat16" else value
        array = np.asarray(value)
        return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


#: a scheme, whose case does not count, as in every URL
_URL = re.compile(r"(?!file:)([a-z][a-z0-9+.-]*://|data:)", re.IGNORECASE)
_FILE_URL = re.compile(r"file:(//(localhost(?=/))?|(?=/))", re.IGNORECASE)
_DATA_URL = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)


def is_url(name: str) -> bool:
    """Whether it is a URL, of a file or of anything else, and no path."""
    return bool(_URL.match(name) or _FILE_URL.match(name))


def local_name(name: str) -> str:
    """The path of a ``file:`` URL, as it stands or with its %XX decoded; anything else as it is."""
    found = _FILE_URL.match(name)
    if found is None:
        return name
    path = name[found.end() :]
    return path if os.path.lexists(path) else unquote(path)


_WANTED = {
    "audio": "a path, bytes, (samples, sample_rate), or samples at 16 kHz",
    "image": "a path, bytes, a PIL image, or an array [H, W, 3]",
    "video": "a path, bytes, a list of pictures, or an array [F, H, W, 3]",
}


def check_source(source: Source, kind: str) -> Path | bytes:
    """A path that is a readable, non-empty regular file, or non-empty bytes; those of a ``data:`` URL are taken out.

    Raises:
        MediaError: missing, a folder or device, unreadable, empty, or a URL of something that is elsewhere.
    """
    if isinstance(source, str) and (data := _DATA_URL.match(source)):
        with parsing(f"{kind} {data[0]!r} is damaged", "pass the whole URL, or the bytes that it holds"):
            source = base64.b64decode(source[data.end() :], validate=True)
    if isinstance(source, (bytes, bytearray, memoryview)):
        source = bytes(source)
        if not source:
            raise MediaError(f"empty {kind}: got 0 bytes; pass the whole content of a file")
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise MediaError(f"{kind} of type {type(source).__name__} cannot be read; pass {_WANTED[kind]}")
    name = os.fspath(source)
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    name = local_name(name)
    if _URL.match(name):
        raise MediaError(f"{kind} {name[:80]!r} is a URL; URLs are not fetched: download it and pass the path or bytes")
    path = Path(name)
    try:
        if not path.exists():
            raise MediaError(f"{kind} file {name!r} does not exist; check the path")
        if not path.is_file():
            raise MediaError(f"{kind} {name!r} is not a regular file; pass the path of a {kind} file")
        if path.stat().st_size == 0:
            raise MediaError(f"{kind} file {name!r} is empty (0 bytes); record or download it again")
        with path.open("rb"):
            pass
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise MediaError(f"{kind} file {name!r} cannot be opened: {error}; check its permissions") from error
    return path


def stream(source: Path | bytes) -> io.BufferedIOBase:
    """A binary stream over a checked source; the caller closes it."""
    return io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
