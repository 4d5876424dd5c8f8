"""Read tensors of a safetensors file by byte range.

Follows the "Format" section of the safetensors README: 8 bytes of little-endian header length, a JSON header, then one
byte buffer that the tensors cover without gap or overlap. Every number in the header is checked before it is used. Data
is read with plain file reads into a fresh array: nothing is memory-mapped, so resident memory does not grow with the
file.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from omniport.runtime.errors import CheckpointError
from omniport.runtime.system.files import open_regular
from omniport.runtime.system.page_cache import expect, forget

MAX_HEADER = 100_000_000
"""bytes; the limit of the reference implementation"""

#: dtype name of the format -> dtype that reads return
_DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: numpy dtype, shape, and where its data begins and ends in the file (bytes)."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class SafetensorsFile:
    """A checked safetensors file.

    Attributes:
        path: the file.
        size: its length in bytes.
        header: the JSON header's bytes, as stored.
        entries: tensor name -> entry, in header order.
    """

    path: Path
    size: int
    header: bytes
    entries: Mapping[str, TensorEntry]

    @classmethod
    def open(cls, path: Path) -> SafetensorsFile:
        """Read and check the header.

        Raises:
            CheckpointError: the file cannot be read, is shorter or longer than its header says, or its header breaks
                a rule of the format.
        """
        try:
            with open_regular(path) as file:
                size = file.seek(0, 2)
                file.seek(0)
                header = _read_header(file, path, size)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        return cls(path, size, header, _parse_entries(header, path, size))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows ``[start, stop)`` of a tensor along axis 0, in the stored dtype; a scalar is read whole.

        Raises:
            ValueError: the range does not lie within the tensor.
            CheckpointError: the file changed or became unreadable since it was opened.
        """
        entry = self.entries[name]
        rows = entry.shape[0] if entry.shape else 1
        stop = rows if stop is None else stop
        if not 0 <= start <= stop <= rows:
            raise ValueError(f"rows {start}:{stop} of {name} are outside its {rows} rows")
        shape = (stop - start, *entry.shape[1:]) if entry.shape else ()
        out = np.empty(shape, entry.dtype)
        if out.nbytes == 0:
            return out
        row_bytes = (entry.end - entry.begin) // rows
        try:
            with self.path.open("rb", buffering=0) as file:
                first = entry.begin + start * row_bytes
                expect(file.fileno(), first, 2 * out.nbytes)  # weights mostly follow one another
                file.seek(first)
                _fill(file, out.reshape(-1).view(np.uint8).data, self.path, name)
        except OSError as error:
            raise CheckpointError(f"cannot read {name} from {self.path}: {error.strerror or error}") from error
        return out

    def forget(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Drop rows that were read from the page cache: they will not be read again."""
        entry = self.entries[name]
        rows = entry.shape[0] if entry.shape else 1
        row_bytes = (entry.end - entry.begin) // max(1, rows)
        last = rows if stop is None else stop
        with contextlib.suppress(OSError), self.path.open("rb", buffering=0) as file:
            forget(file.fileno(), entry.begin + start * row_bytes, (last - start) * row_bytes)


def _fill(file: Any, view: memoryview, path: Path, name: str) -> None:
    """Read until ``view`` is full: one read may return less, as Linux caps a read at 2 GiB."""
    filled = 0
    while filled < len(view):
        count = file.readinto(view[filled:])
        if not count:
            raise CheckpointError(
                f"{path} ended {len(view) - filled} bytes early while reading {name}: the file was changed during the "
                "export. Run it again once the checkpoint is complete."
            )
        filled += count


def _bad(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a valid safetensors file: {what}. Download the file again.")


def _read_header(file: BinaryIO, path: Path, size: int) -> bytes:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise _bad(path, f"it has {size} bytes, fewer than the 8 that hold the header's length")
    if prefix == b"version ":
        raise CheckpointError(f"{path} is a pointer of Git LFS, not the file. Run git lfs pull in its folder.")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER:
        raise _bad(path, f"its header claims {length} bytes, more than the {MAX_HEADER} allowed")
    if 8 + length > size:
        raise _bad(path, f"truncated: its header claims {length} bytes and the file has {size}")
    return file.read(length)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """``object_pairs_hook`` that refuses a name given twice, which ``json`` would otherwise drop silently."""
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"name {key!r} given twice")
        out[key] = value
    return out


def _parse_entries(header: bytes, path: Path, size: int) -> dict[str, TensorEntry]:
    if not header.startswith(b"{"):
        raise _bad(path, "its header does not start with '{'")
    try:
        parsed = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"its header is not JSON ({error})") from error
    parsed.pop("__metadata__", None)
    data_start = 8 + len(header)
    entries = {name: _parse_entry(name, info, path, data_start) for name, info in parsed.items()}
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            what = "overlaps the tensor before it" if entry.begin < position else "leaves a gap before it"
            raise _bad(path, f"tensor {name!r} {what} (begins at byte {entry.begin}, expected {position})")
        position = entry.end
    if size < position:
        raise CheckpointError(
            f"{path} is truncated: its header describes {position} bytes and the file has {size}. "
            "Download the file again."
        )
    if size > position:
        raise _bad(path, f"{size - position} bytes follow the last tensor")
    return entries


def _parse_entry(name: str, info: object, path: Path, data_start: int) -> TensorEntry:
    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, f"tensor {name!r} needs exactly dtype, shape and data_offsets")
    dtype = _DTYPES.get(info["dtype"]) if isinstance(info["dtype"], str) else None
    if dtype is None:
        raise _bad(path, f"tensor {name!r} has dtype {info['dtype']!r}; known are {', '.join(_DTYPES)}")
    shape, offsets = _sizes(info["shape"]), _sizes(info["data_offsets"])
    if shape is None or offsets is None or len(offsets) != 2:
        raise _bad(path, f"tensor {name!r} has shape {info['shape']!r} and data_offsets {info['data_offsets']!r}")
    begin, end = offsets
    expected = math.prod(shape) * dtype.itemsize
    if end - begin != expected:
        raise _bad(path, f"tensor {name!r} spans {end - begin} bytes; {info['dtype']} {list(shape)} takes {expected}")
    return TensorEntry(dtype, shape, data_start + begin, data_start + end)


def _sizes(value: object) -> tuple[int, ...] | None:
    """``value`` as non-negative integers below 2**63, or None."""
    if not isinstance(value, list):
        return None
    if not all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**63 for item in value):
        return None
    return tuple(value)
