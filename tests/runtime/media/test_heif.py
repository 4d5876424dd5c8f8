"""HEIC pictures, written here box by box around HEVC that FFmpeg codes."""

from __future__ import annotations

import struct
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from omniport.runtime.errors import MediaError
from omniport.runtime.media import image as module
from omniport.runtime.media.image import load_image


def box(kind: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I", 8 + len(body)) + kind + body


def coded(pixels: NDArray[np.uint8]) -> tuple[bytes, bytes]:
    """(hvcC, length-prefixed data) of one lossless-enough picture."""
    encoder: Any = av.CodecContext.create("libx265", "w")
    encoder.width, encoder.height, encoder.pix_fmt = pixels.shape[1], pixels.shape[0], "yuv444p"
    encoder.time_base = Fraction(1, 25)
    encoder.options = {"x265-params": "log-level=none:lossless=1:info=0:range=full"}
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
        format="yuv444p", dst_colorspace="ITU601", dst_color_range="JPEG"
    )
    stream = b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])
    units = [unit.rstrip(b"\0") for unit in stream.replace(b"\0\0\0\1", b"\0\0\1").split(b"\0\0\1") if unit]
    kinds = [unit[0] >> 1 & 63 for unit in units]
    sets = [(kind, unit) for kind, unit in zip(kinds, units, strict=True) if kind in (32, 33, 34)]
    head = bytes([1, 4, 8, 0, 0, 0, 0x90, 0, 0, 0, 0, 0, 93, 0xF0, 0, 0xFC, 0xFF, 0xF8, 0xF8, 0, 0, 0x0F, len(sets)])
    arrays = b"".join(struct.pack(">BHH", 0x80 | kind, 1, len(unit)) + unit for kind, unit in sets)
    data = b"".join(struct.pack(">I", len(unit)) + unit for kind, unit in zip(kinds, units, strict=True) if kind < 32)
    return head + arrays, data


def heic(pixels: NDArray[np.uint8], columns: int = 1, rows: int = 1, tile: int = 0, turns: int = 0) -> bytes:
    """A picture, whole or in tiles of ``tile`` pixels, with a quarter-turn property."""
    height, width = pixels.shape[:2]
    tiled = columns * rows > 1
    padded = (
        np.pad(pixels, ((0, rows * tile - height), (0, columns * tile - width), (0, 0)), "edge") if tiled else pixels
    )
    pieces = [padded[r * tile : (r + 1) * tile, c * tile : (c + 1) * tile] for r in range(rows) for c in range(columns)]
    items = [coded(piece) for piece in (pieces if tiled else [padded])]
    primary = len(items) + 1 if tiled else 1
    grid = struct.pack(">BBBBHH", 0, 0, rows - 1, columns - 1, width, height)
    properties = [
        box(b"hvcC", items[0][0]),
        box(b"ispe", bytes(4), struct.pack(">II", width, height)),
        box(b"irot", bytes([turns])),
    ]
    kinds = [(n + 1, b"hvc1") for n in range(len(items))] + ([(primary, b"grid")] if tiled else [])
    info = box(
        b"iinf",
        bytes(4),
        struct.pack(">H", len(kinds)),
        *(box(b"infe", b"\2\0\0\0", struct.pack(">HH", number, 0), kind, b"\0") for number, kind in kinds),
    )
    links = {number: [1] for number, _ in kinds}
    links[primary] = [2, 3] if tiled else [1, 2, 3]
    ipma = box(
        b"ipma",
        bytes(4),
        struct.pack(">I", len(links)),
        *(struct.pack(">HB", number, len(found)) + bytes(found) for number, found in links.items()),
    )
    iref = (
        box(
            b"iref",
            bytes(4),
            box(
                b"dimg", struct.pack(">HH", primary, len(items)), *(struct.pack(">H", n + 1) for n in range(len(items)))
            ),
        )
        if tiled
        else b""
    )

    def whole(start: int) -> bytes:
        places, at = [], start
        for number, (_, data) in enumerate(items, 1):
            places.append(struct.pack(">HHHHII", number, 0, 0, 1, at, len(data)))
            at += len(data)
        if tiled:
            places.append(struct.pack(">HHHHII", primary, 1, 0, 1, 0, len(grid)))
        iloc = box(b"iloc", b"\1\0\0\0\x44\0", struct.pack(">H", len(places)), *places)
        meta = box(
            b"meta",
            bytes(4),
            box(b"pitm", bytes(4), struct.pack(">H", primary)),
            iloc,
            info,
            iref,
            box(b"iprp", box(b"ipco", *properties), ipma),
            box(b"idat", grid),
        )
        return box(b"ftyp", b"heic", bytes(4), b"mif1heic") + meta

    body = b"".join(data for _, data in items)
    return whole(len(whole(0)) + 8) + box(b"mdat", body)


def scene(height: int, width: int) -> NDArray[np.uint8]:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 64 * 3], axis=2).astype(np.uint8)


@pytest.mark.parametrize("turns", [0, 1, 3])
def test_whole_and_tiled_pictures(turns: int) -> None:
    """A phone's photo is tiles and a turn: all of it is read, upright, and cut to its size."""
    pixels = scene(100, 150)
    for content in (heic(scene(96, 128), turns=turns), heic(pixels, columns=3, rows=2, tile=64, turns=turns)):
        expected = np.rot90(scene(96, 128) if content.count(b"grid") == 0 else pixels, turns)
        got = load_image(content)
        assert got.shape == expected.shape
        assert np.abs(got.astype(int) - expected).max() <= 4


def test_damaged_files_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    content = heic(scene(100, 150), columns=3, rows=2, tile=64)
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(content[: rng.integers(20, len(content))])
        for at in rng.integers(0, min(len(damaged), 900), 3):
            damaged[at] ^= int(rng.integers(1, 256))
        try:
            assert load_image(bytes(damaged)).ndim == 3
        except MediaError as error:
            assert "image <" in str(error)  # noqa: PT017
    monkeypatch.setattr(module, "MAX_PIXELS", 100 * 150 - 1)
    with pytest.raises(MediaError, match="too large: 150x100"):
        load_image(content)
