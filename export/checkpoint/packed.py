"""Read GPTQ and AWQ weights: linear layers stored as packed integers of 4 or 8 bits.

Both store, for y = x @ w with w [K, N], integers q, and a scale s and a zero point z for each group of rows and each
column: w = (q - z) * s. Eight integers of 4 bits, or four of 8, share an int32, the first in its lowest bits:

- GPTQ (as AutoGPTQ and GPTQModel write it) packs q along K and z along N, in order. Format ``gptq`` stores z - 1,
  ``gptq_v2`` z. ``g_idx`` names each row's group; with ``desc_act`` the rows of a group lie scattered.
- AWQ (AutoAWQ's ``gemm`` version) has 4 bits, packs both along N, columns in the order `_AWQ_ORDER`, and stores z.

Integers are handed out as q - 8 and zero points as z - 8 (of 8 bits: less 128), which fit INT4 (INT8) and leave the
difference as it is: a symmetric weight, where z is 8 (128) throughout, then needs no zero points.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from omniport.runtime.errors import CheckpointError

from .config import read_json

Array = NDArray[Any]
_WORD_BITS = 32
#: which column of eight each 4-bit field of a word holds
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
#: bits of an integer that are read
_BITS: Mapping[str, tuple[int, ...]] = {"gptq": (4, 8), "awq": (4,)}
_PARTS: Mapping[str, tuple[str, ...]] = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
}
#: DequantizeLinear's fused kernels want blocks of a power of two
_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 128
_HELP = "Export from the unquantized checkpoint and run omniport quantize on the bundle."


class TensorReader(Protocol):
    """What is needed of a checkpoint: its tensors as they are stored."""

    def __contains__(self, key: str) -> bool: ...

    def shape(self, key: str) -> tuple[int, ...]: ...

    def dtype(self, key: str) -> str: ...

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Array: ...


@dataclass(frozen=True)
class PackedFormat:
    """How a checkpoint's packed weights are to be read.

    Attributes:
        method: ``gptq`` or ``awq``.
        bits: of an integer, 4 or 8.
        group: rows that share a scale; -1: all.
        zero_shift: what is to be added to a stored zero point.
        mixed: layers may have other groups than ``group``.
    """

    method: str
    bits: int
    group: int
    zero_shift: int
    mixed: bool

    @property
    def per_word(self) -> int:
        """Integers in an int32."""
        return _WORD_BITS // self.bits

    @property
    def middle(self) -> int:
        """Of the range of an integer: what is subtracted from it."""
        return 1 << (self.bits - 1)


def packed_format(raw: Mapping[str, Any], folder: Path) -> PackedFormat | None:
    """The format that config.json (or, in older checkpoints, quantize_config.json) describes; None: not quantized.

    Args:
        raw: config.json's object.
        folder: of the checkpoint.

    Raises:
        CheckpointError: a method, number of bits or packing that cannot be read.
    """
    thinker = raw.get("thinker_config")
    found = [raw.get("quantization_config"), (thinker or {}).get("quantization_config")]
    config = next((entry for entry in found if entry is not None), None)
    older = folder / "quantize_config.json"
    if config is None and older.exists():
        config = {"quant_method": "gptq", **read_json(older)}
    if config is None:
        return None
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder}: quantization_config is a {type(config).__name__}, expected an object.")
    method = config.get("quant_method")
    if method not in _PARTS:
        raise CheckpointError(
            f"{folder} is a checkpoint quantized by {method!r}; omniport reads {' and '.join(_PARTS)}. {_HELP}"
        )
    known = _BITS[str(method)]
    if config.get("bits") not in known:
        raise CheckpointError(
            f"{folder} is a {method} checkpoint of {config.get('bits')!r} bits; "
            f"{' and '.join(map(str, known))} are read. {_HELP} Its recipe w8 stores 8 bits."
        )
    return _gptq(config, folder) if method == "gptq" else _awq(config, folder)


def _gptq(config: Mapping[str, Any], folder: Path) -> PackedFormat:
    written = config.get("checkpoint_format", "gptq")
    if written not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"{folder} is packed as {written!r}; of GPTQ, gptq and gptq_v2 are read. {_HELP}")
    shift, mixed = int(written == "gptq"), bool(config.get("dynamic"))
    return PackedFormat("gptq", config["bits"], _group(config, folder), shift, mixed)


def _awq(config: Mapping[str, Any], folder: Path) -> PackedFormat:
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise CheckpointError(f"{folder} is packed as {version!r}; of AWQ, gemm is read. {_HELP}")
    return PackedFormat("awq", config["bits"], _group(config, folder), 0, False)


def _group(config: Mapping[str, Any], folder: Path) -> int:
    group = config.get("group_size", config.get("q_group_size"))
    if not isinstance(group, int) or isinstance(group, bool) or (group < 1 and group != -1):
        raise CheckpointError(
            f"{folder}: quantization_config says group_size {group!r}; a number of rows or -1 was expected."
        )
    return group


@dataclass(frozen=True)
class PackedWeight:
    """One linear layer's weight.

    Attributes:
        module: its path, to which ``.qweight`` and so on are added.
        shape: [K, N], of the weight as the graph multiplies it.
        group: rows that share a scale.
    """

    module: str
    format: PackedFormat
    shape: tuple[int, int]
    group: int
    reader: TensorReader

    @property
    def block(self) -> int:
        """Rows of a block of `scales`: the group, or a power of two that divides it, where kernels want that."""
        power = self.group & -self.group
        return self.group if power < _SMALLEST_BLOCK else min(power, _LARGEST_BLOCK)

    @cached_property
    def order(self) -> NDArray[np.int64] | None:
        """[K]: which row of w comes where, so that groups lie together; None: they do.

        Raises:
            CheckpointError: groups of unequal size.
        """
        key = f"{self.module}.g_idx"
        if self._groups is None:
            return None
        rows, groups = self.shape[0], self.shape[0] // self.group
        counts = np.bincount(self._groups, minlength=groups)
        if (counts != self.group).any():
            raise CheckpointError(f"{key!r} has groups of {counts.min()} to {counts.max()} rows, expected {self.group}")
        order: NDArray[np.int64] = np.argsort(self._groups, kind="stable").astype(np.int64)
        return None if np.array_equal(order, np.arange(rows)) else order

    @cached_property
    def symmetric(self) -> bool:
        """Whether every zero point is in the middle of the range."""
        return not self._zeros().any()

    def check(self) -> None:
        """Read what is small, and see that it can be used.

        Raises:
            CheckpointError: groups or zero points that make no sense.
        """
        _ = self.order, self.symmetric

    def integers(self, rows: int = 1024) -> Iterator[NDArray[np.int8]]:
        """q less the middle, [K, N] in pieces of about so many rows; in `order` if there is one."""
        if self.order is not None:
            whole = np.empty(self.shape, np.int8)
            for start, stop in self._ranges(rows):
                whole[start:stop] = self._piece(start, stop)
            yield from (whole[self.order[start:stop]] for start, stop in self._ranges(rows))
        else:
            yield from (self._piece(start, stop) for start, stop in self._ranges(rows))

    def scales(self) -> Array:
        """[K / block, N] in the stored dtype."""
        stored = self.reader.read(f"{self.module}.scales")
        if not np.isfinite(stored.astype(np.float32)).all():
            raise CheckpointError(f"'{self.module}.scales' holds values that are not finite. Download the file again.")
        return np.repeat(stored, self.group // self.block, axis=0)

    def zero_points(self) -> NDArray[np.int8]:
        """z less the middle, [K / block, N]."""
        return np.repeat(self._zeros(), self.group // self.block, axis=0)

    def offsets(self) -> NDArray[np.float32]:
        """What the zero points add to every row of a group, (middle - z) * s: float32 [K / group, N], exact."""
        return -self._zeros().astype(np.float32) * self.reader.read(f"{self.module}.scales").astype(np.float32)

    def dequantized(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows of the weight as an unquantized checkpoint stores it, [N, K]: exact in float32."""
        wide = self.format.per_word
        first, last = start // wide, -(-stop // wide)
        packed = self.reader.read(f"{self.module}.qweight")
        if self.format.method == "gptq":
            integers = self._along_rows(packed[:, start:stop])
        else:
            integers = self._along_columns(packed[:, first:last])[:, start - first * wide : stop - first * wide]
        groups = self._groups if self._groups is not None else np.arange(self.shape[0]) // self.group
        zeros = self._zeros()[:, start:stop][groups]
        scales = self.reader.read(f"{self.module}.scales")[:, start:stop].astype(np.float32)[groups]
        # of 8 bits, a difference has 9
        return np.ascontiguousarray((np.subtract(integers, zeros, dtype=np.int16).astype(np.float32) * scales).T)

    @cached_property
    def _groups(self) -> NDArray[np.int64] | None:
        """[K]: each row's group; None: not stored.

        Raises:
            CheckpointError: a group that there is not.
        """
        key, count = f"{self.module}.g_idx", self.shape[0] // self.group
        if self.format.method != "gptq" or key not in self.reader:
            return None
        groups: NDArray[np.int64] = self.reader.read(key).astype(np.int64)
        if groups.min() < 0 or groups.max() >= count:
            raise CheckpointError(f"{key!r} names groups {groups.min()} to {groups.max()}, expected 0 to {count - 1}")
        return groups

    def _ranges(self, rows: int) -> Iterator[tuple[int, int]]:
        wide = self.format.per_word
        step = max(1, rows // wide) * wide
        return ((start, min(start + step, self.shape[0])) for start in range(0, self.shape[0], step))

    def _piece(self, start: int, stop: int) -> NDArray[np.int8]:
        key = f"{self.module}.qweight"
        if self.format.method == "gptq":
            wide = self.format.per_word
            return self._along_rows(self.reader.read(key, start // wide, stop // wide))
        return self._along_columns(self.reader.read(key, start, stop))

    def _zeros(self) -> NDArray[np.int8]:
        """z less the middle, [K / group, N].

        Raises:
            CheckpointError: zero points that readers of the format disagree about.
        """
        stored = self._along_columns(self.reader.read(f"{self.module}.qzeros"))
        # a stored 15 (of 8 bits: 255) is 0 - 1 to those that wrote it, and 16 to most that read it
        if self.format.zero_shift and stored.max() == self.format.middle - 1:
            count = 2 * self.format.middle
            raise CheckpointError(
                f"'{self.module}.qzeros' holds {count - 1}, which readers of the format gptq take for 0 or for "
                f"{count}. Convert the checkpoint to gptq_v2, or: {_HELP}"
            )
        return stored + np.int8(self.format.zero_shift)

    def _along_rows(self, packed: Array) -> NDArray[np.int8]:
        """int32 [R / per word, C] -> [R, C] less the middle."""
        fields = _fields(packed, self.format.bits).transpose(0, 2, 1)
        return np.ascontiguousarray(fields).reshape(-1, packed.shape[1])

    def _along_columns(self, packed: Array) -> NDArray[np.int8]:
        """int32 [R, C / per word] -> [R, C] less the middle."""
        fields = _fields(packed, self.format.bits)
        if self.format.method == "awq":
            fields = fields[..., np.argsort(_AWQ_ORDER)]
        return fields.reshape(len(packed), -1)


def _fields(packed: Array, bits: int) -> NDArray[np.int8]:
    """int32 [R, C] -> [R, C, 8 or 4]: the fields of so many bits less the middle of their range, the lowest first."""
    low_first = np.ascontiguousarray(packed.astype("<i4", copy=False)).view(np.uint8).reshape(*packed.shape, 4)
    if bits == 8:
        return (low_first ^ np.uint8(128)).view(np.int8)
    fields = np.stack((low_first & 0x0F, low_first >> 4), axis=-1).reshape(*packed.shape, _WORD_BITS // bits)
    return fields.view(np.int8) - np.int8(8)


def find_packed(format: PackedFormat | None, keys: set[str], reader: TensorReader) -> dict[str, PackedWeight]:
    """Packed weights by the name that the weight would have unquantized (``....weight``).

    Args:
        format: None if the checkpoint does not say that it is quantized.
        keys: names of all stored tensors.

    Raises:
        CheckpointError: parts are missing, or of shapes that do not go together or with the configuration.
    """
    ends = (".qweight", ".qzeros")
    modules = sorted({key.rpartition(".")[0] for key in keys if key.endswith(ends)})
    if modules and format is None:
        raise CheckpointError(
            f"{modules[0]}.qweight is packed, but config.json has no quantization_config that says how. Download the "
            "checkpoint's config.json again."
        )
    if format is None:
        return {}
    if not modules:
        raise CheckpointError(
            f"config.json describes a {format.method} checkpoint, but no weight is packed (a .qweight). The "
            "configuration and the weights do not belong together."
        )
    return {f"{module}.weight": _packed(format, module, keys, reader) for module in modules}


def _packed(format: PackedFormat, module: str, keys: set[str], reader: TensorReader) -> PackedWeight:
    missing = [part for part in ("qweight", "qzeros", "scales") if f"{module}.{part}" not in keys]
    if missing:
        raise CheckpointError(
            f"{module} is packed, but {', '.join(f'{module}.{part}' for part in missing)} is missing. Download the "
            "checkpoint again."
        )
    if f"{module}.weight" in keys:
        raise CheckpointError(f"{module} is stored twice, packed and as {module}.weight. Remove one of them.")
    shapes = {part: reader.shape(f"{module}.{part}") for part in _PARTS[format.method] if f"{module}.{part}" in keys}
    _check_dtypes(module, shapes, reader)
    if any(len(shape) != (1 if part == "g_idx" else 2) for part, shape in shapes.items()):
        raise _inconsistent(module, shapes, "wrong number of dimensions")
    wide = format.per_word
    down, across = (wide, 1) if format.method == "gptq" else (1, wide)
    rows, columns = shapes["qweight"][0] * down, shapes["qweight"][1] * across
    groups = shapes["scales"][0]
    expected = {"scales": (groups, columns), "qzeros": (groups, columns // wide), "g_idx": (rows,)}
    wrong = [part for part, shape in expected.items() if part in shapes and shapes[part] != shape]
    if wrong or not groups or rows % groups or columns % wide:
        raise _inconsistent(module, shapes, f"for a weight [{rows}, {columns}] of {format.bits} bits")
    group = rows // groups
    if group != (rows if format.group == -1 else format.group) and not format.mixed:
        raise _inconsistent(module, shapes, f"groups of {group} rows, while quantization_config says {format.group}")
    return PackedWeight(module, format, (rows, columns), group, reader)


def _check_dtypes(module: str, parts: Mapping[str, Any], reader: TensorReader) -> None:
    for part in parts:
        got = reader.dtype(f"{module}.{part}")
        wanted = ("float16", "bfloat16", "float32") if part == "scales" else ("int32",)
        if got not in wanted:
            raise CheckpointError(f"'{module}.{part}' is {got}, expected {' or '.join(wanted)}. {_HELP}")


def _inconsistent(module: str, shapes: Mapping[str, tuple[int, ...]], why: str) -> CheckpointError:
    listed = ", ".join(f"{part} {list(shape)}" for part, shape in shapes.items())
    return CheckpointError(
        f"the packed parts of {module} have shapes that do not go together ({why}): {listed}. The checkpoint may mix "
        f"numbers of bits, which is not supported. {_HELP}"
    )
