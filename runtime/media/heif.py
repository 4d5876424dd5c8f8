"""HEIC pictures, as phones take them: the boxes of HEIF (ISO 23008-12) are read here, HEVC is decoded by FFmpeg (PyAV).

FFmpeg alone would give one tile of a picture that is cut into tiles, and leave it lying down.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .source import require

Pixels = NDArray[np.uint8]

_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1")
#: matrix coefficients (ISO 23091-2) that PyAV's ``Colorspace`` calls otherwise
_BT709, _BT601 = 1, 5


class HeifError(ValueError):
    """The file is not what the standard says, or uses what is not read here."""


def is_heif(head: bytes) -> bool:
    """Whether a file that begins so (32 bytes) is one."""
    return head[4:8] == b"ftyp" and any(head[at : at + 4] in _BRANDS for at in (8, *range(16, len(head) - 3, 4)))


class _Bytes:
    """Big-endian numbers, one after the other."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise HeifError("it ends in the middle of a box")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def boxes(self) -> Iterator[tuple[bytes, bytes]]:
        """(type, content) of every box from here on."""
        while len(self.data) - self.at >= 8:
            size, kind = self.number(4), self.take(4)
            head = 8
            if size == 1:
                size, head = self.number(8), 16
            yield kind, self.take(size - head if size else len(self.data) - self.at)


@dataclass
class _Item:
    kind: bytes = b""
    extents: list[tuple[int, int]] = field(default_factory=list)
    inside: bool = False
    """its extents count in the ``idat`` box, not in the file"""
    tiles: list[int] = field(default_factory=list)
    properties: list[tuple[bytes, bytes]] = field(default_factory=list)

    def property(self, kind: bytes) -> bytes | None:
        return next((body for name, body in self.properties if name == kind), None)


class HeifPicture:
    """The primary picture of a file.

    Attributes:
        width, height: pixels, before it is turned.

    Raises:
        HeifError: malformed, or coded otherwise than in HEVC.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._items: dict[int, _Item] = {}
        self._inner = b""
        primary = 0
        meta = next((body for kind, body in _Bytes(content).boxes() if kind == b"meta"), None)
        if meta is None:
            raise HeifError("it has no picture items")
        for kind, body in _Bytes(meta[4:]).boxes():
            reader = _Bytes(body)
            if kind == b"idat":
                self._inner = body
            elif kind == b"iprp":
                self._read_properties(reader)
            elif kind in (b"pitm", b"iinf", b"iloc", b"iref"):
                version = reader.number(4) >> 24
                if kind == b"pitm":
                    primary = reader.number(4 if version else 2)
                elif kind == b"iinf":
                    self._read_kinds(reader, version)
                elif kind == b"iloc":
                    self._read_places(reader, version)
                else:
                    self._read_tiles(reader, version)
        self._primary = self._item(primary)
        size = _Bytes(self._primary.property(b"ispe") or b"")
        size.take(4)
        self.width, self.height = size.number(4), size.number(4)

    def decode(self) -> Pixels:
        """Upright RGB, uint8 [H, W, 3]."""
        item = self._primary
        pixels = self._tiled(item) if item.kind == b"grid" else self._coded(item)[: self.height, : self.width]
        for kind, body in item.properties:  # in this order
            if kind == b"irot":
                pixels = np.rot90(pixels, body[0] & 3)
            elif kind == b"imir":
                pixels = pixels[:, ::-1] if body[0] & 1 == 0 else pixels[::-1]
        return np.ascontiguousarray(pixels)

    def _item(self, number: int) -> _Item:
        return self._items.setdefault(number, _Item())

    def _read_kinds(self, reader: _Bytes, version: int) -> None:
        reader.take(4 if version else 2)
        for kind, body in reader.boxes():
            entry = _Bytes(body)
            entry_version = entry.number(4) >> 24
            if kind == b"infe" and entry_version >= 2:
                number = entry.number(4 if entry_version > 2 else 2)
                entry.take(2)
                self._item(number).kind = entry.take(4)

    def _read_places(self, reader: _Bytes, version: int) -> None:
        sizes = reader.number(2)
        offset, length, base, index = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
        for _ in range(reader.number(4 if version > 1 else 2)):
            item = self._item(reader.number(4 if version > 1 else 2))
            item.inside = bool(version and reader.number(2) & 15 == 1)
            reader.take(2)
            start = reader.number(base)
            for _ in range(reader.number(2)):
                reader.take(index if version else 0)
                item.extents.append((start + reader.number(offset), reader.number(length)))

    def _read_tiles(self, reader: _Bytes, version: int) -> None:
        size = 4 if version else 2
        for kind, body in reader.boxes():
            entry = _Bytes(body)
            item = self._item(entry.number(size))
            if kind == b"dimg":
                item.tiles = [entry.number(size) for _ in range(entry.number(2))]

    def _read_properties(self, reader: _Bytes) -> None:
        known: list[tuple[bytes, bytes]] = []
        for kind, body in reader.boxes():
            entry = _Bytes(body)
            if kind == b"ipco":
                known = list(entry.boxes())
            elif kind == b"ipma":
                flags = entry.number(4)
                for _ in range(entry.number(4)):
                    item = self._item(entry.number(4 if flags >> 24 else 2))
                    for _ in range(entry.number(1)):
                        number = entry.number(2) & 0x7FFF if flags & 1 else entry.number(1) & 0x7F
                        if 0 < number <= len(known):
                            item.properties.append(known[number - 1])

    def _data(self, item: _Item) -> bytes:
        source = self._inner if item.inside else self._content
        if sum(length for _, length in item.extents) > len(source):
            raise HeifError("its items are larger than the file")
        return b"".join(source[at : at + length] if length else source[at:] for at, length in item.extents)

    def _tiled(self, item: _Item) -> Pixels:
        head = _Bytes(self._data(item))
        wide = head.number(2) & 1
        rows, columns = head.number(1) + 1, head.number(1) + 1
        width, height = head.number(2 << wide), head.number(2 << wide)
        if (width, height) != (self.width, self.height) or len(item.tiles) != rows * columns:
            raise HeifError("its tiles do not make up its size")
        canvas = np.empty((height, width, 3), np.uint8)
        down, across = 0, 0
        for number, name in enumerate(item.tiles):
            tile = self._coded(self._item(name))
            down, across = (tile.shape[0], tile.shape[1]) if not number else (down, across)
            if tile.shape[:2] != (down, across) or down * rows < height or across * columns < width:
                raise HeifError("its tiles do not make up its size")
            top, left = number // columns * down, number % columns * across
            part = canvas[top : top + down, left : left + across]
            part[:] = tile[: part.shape[0], : part.shape[1]]
        return canvas

    def _coded(self, item: _Item) -> Pixels:
        av = require("av")
        setup = item.property(b"hvcC")
        if item.kind != b"hvc1" or setup is None:
            raise HeifError(f"its coding is {item.kind.decode('latin-1')!r}, not HEVC")
        decoder = av.CodecContext.create("hevc", "r")
        decoder.extradata = setup
        frames: list[Any] = [*decoder.decode(av.Packet(self._data(item))), *decoder.decode(None)]
        if not frames:
            raise HeifError("nothing in it decodes")
        frame = frames[0]
        if frame.width * frame.height > 4 * self.width * self.height + (1 << 20):
            raise HeifError("its coded size is not the one that it states")
        matrix, full = self._colours(item)
        spaces = av.video.reformatter.Colorspace
        ranges = av.video.reformatter.ColorRange
        rgb = frame.reformat(
            format="rgb24",
            src_colorspace=spaces.ITU709 if matrix == _BT709 else spaces.ITU601,
            src_color_range=ranges.JPEG if full else ranges.MPEG,
            dst_color_range=ranges.JPEG,
        )
        pixels: Pixels = rgb.to_ndarray()
        return pixels

    def _colours(self, item: _Item) -> tuple[int, bool]:
        """Matrix coefficients and full range: those of its ``colr`` box, or what MIAF has where there is none."""
        for kind, body in (*item.properties, *self._primary.properties):
            if kind == b"colr" and body[:4] == b"nclx" and len(body) >= 11:
                return int.from_bytes(body[8:10], "big"), bool(body[10] & 0x80)
        return _BT601, True
