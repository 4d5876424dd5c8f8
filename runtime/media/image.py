"""Preprocess images and video frames: decode, resize, cut into patches, lay out attention windows.

**Resize kernel**: Pillow's BICUBIC (Keys' cubic with a = -0.5, widened when shrinking, so antialiased; rounded and
clipped to 8 bits after each of its two passes) for still images and for video frames. Still images: as transformers'
Qwen2VLImageProcessorPil. Video: the reference (Qwen2VLVideoProcessor) resizes with torchvision's antialiased bicubic:
the same kernel, but rounded once at the end, which differs by a few levels of 255 where hard edges overshoot.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import VisionFrontend
from ..errors import MediaError
from .heif import HeifPicture, is_heif
from .limits import VisionLimits, image_size, video_size
from .source import Source, as_array, check_source, describe, is_array, parsing, require, stream

ImageSource = Any  # Source | PIL.Image.Image | uint8 or float array: Pillow is optional, so it has no name here
Pixels = NDArray[np.uint8]

#: largest picture that is decoded, in pixels: Pillow takes 4 bytes for each, 256 MiB
MAX_PIXELS = 1 << 26
#: decoders that may see a file: no format that runs another program (EPS) or only writes
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")
#: bytes of a HEIC file that are read at most
MAX_HEIF = 1 << 27
_SILENT = logging.NullHandler()
#: EXIF orientation -> the name of Pillow's transposition that sets the picture upright
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_ORIENTATION = 0x0112


@dataclass(frozen=True, eq=False)
class VisionInput:
    """One image or video as the vision encoder takes it.

    T temporal patches, N patches per temporal patch, W windows of 64 slots (``window_size / patch_size`` squared).
    Patches are ordered by 2x2 merge blocks, row by row; the four patches of a block follow each other.

    Attributes:
        patches: float32 [T, N, 1176]; each patch is (channel, temporal, row, column) flattened, as in the reference.
        grid_thw: T, rows and columns of patches.
        grid_hw: int64 [N, 2], row and column of each patch.
        window_index: int64 [W * 64]; per window, the patches (into N) that its slots hold; unused slots hold N.
        window_valid: bool [W, 64]; the used slots, which come first in each window.
    """

    patches: NDArray[np.float32]
    grid_thw: tuple[int, int, int]
    grid_hw: NDArray[np.int64]
    window_index: NDArray[np.int64]
    window_valid: NDArray[np.bool_]

    @property
    def tokens(self) -> int:
        """Embeddings that the encoder gives: T * N / 4."""
        merge_block = 4
        steps, rows, columns = self.grid_thw
        return steps * rows * columns // merge_block


def load_image(source: ImageSource) -> Pixels:
    """Read a picture as RGB, uint8 [H, W, 3].

    EXIF orientation is applied. Transparency is composited onto white (as the reference does), greys of more than 8
    bits are scaled to 8 bits (the reference clips them), the first frame of an animation is taken.

    Args:
        source: a path or ``file://`` URL, the bytes of a file, a PIL image, or an array or tensor [H, W], [H, W, 1],
            [H, W, 3] or [H, W, 4]: uint8, or float in 0..1, which is scaled by 255 and rounded.

    Raises:
        MediaError: missing, empty, corrupt or unknown file; more than ``MAX_PIXELS`` (checked before decoding);
            arrays of another shape or dtype, outside 0..1, or with NaN.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    pixels: Pixels = _read(source, _decode)
    return pixels


def picture_size(source: ImageSource) -> tuple[int, int]:
    """Height and width of a picture, upright, by its header.

    Raises:
        MediaError: as ``load_image``, as far as the header tells.
    """
    if isinstance(source, np.ndarray):
        _check_array(source)
        return source.shape[0], source.shape[1]
    size: tuple[int, int] = _read(
        source,
        # the size of a TIFF file is that of the upright picture already
        lambda image, turn, label: image.size[:: 1 if turn in range(5, 9) and not _is_tiff(image) else -1],
    )
    return size


def _read(source: ImageSource, use: Callable[[Any, int, str], Any]) -> Any:
    """``use(picture, turn, label)`` of an open picture; of a HEIC file's or a tensor's pixels, as a picture."""
    module = require("PIL.Image")
    logging.getLogger("PIL").addHandler(_SILENT)  # else Python writes what it logs of a damaged file to stderr
    if is_array(source) and not isinstance(source, module.Image):
        return use(module.fromarray(_from_array(as_array(source, "pixels of an image"))), 1, "image array")
    if isinstance(source, module.Image):
        _check_pixels(source.width, source.height, "image")
        with parsing("image cannot be read", "open its file again"):
            source.load()
            return use(source, _orientation(source), "image")
    checked = check_source(cast(Source, source), "image")
    label = f"image {describe(checked)}"
    module.init()
    known = [name for name in FORMATS if name in module.OPEN]
    with (
        stream(checked) as opened,
        warnings.catch_warnings(),
        parsing(f"{label} is corrupt", "open it in another program or export it again"),
    ):
        warnings.simplefilter("ignore")  # notes on metadata, and on size: our own check follows
        try:
            image = module.open(opened, formats=known)
        except module.DecompressionBombError as error:
            raise MediaError(f"{label} is too large: {error}; at most {MAX_PIXELS} pixels are taken") from error
        except module.UnidentifiedImageError as error:
            opened.seek(0)
            if is_heif(opened.read(32)):
                opened.seek(0)
                picture = HeifPicture(opened.read(MAX_HEIF))
                _check_pixels(picture.width, picture.height, label)
                return use(module.fromarray(picture.decode()), 1, label)
            raise MediaError(
                f"{label} is not a picture that can be read; expected JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC"
            ) from error
        with image:
            _check_pixels(image.width, image.height, label)
            turn = _orientation(image)
            if _is_tiff(image):  # Pillow would turn a TIFF file while it loads, and write its EXIF anew
                image.getexif().pop(_ORIENTATION, None)
            return use(image, turn, label)


def _is_tiff(image: Any) -> bool:
    return hasattr(image, "tag_v2")


def _orientation(image: Any) -> int:
    """EXIF orientation; 1, upright, if there is none that can be read."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # noqa: BLE001  what is wrong in a photo's metadata is no fault of its pixels
        return 1


def _check_pixels(width: int, height: int, label: str) -> None:
    if width < 1 or height < 1:
        raise MediaError(f"{label} has no pixels ({width}x{height}); pass a picture with both sides above 0")
    if width * height > MAX_PIXELS:
        raise MediaError(
            f"{label} is too large: {width}x{height} = {width * height} pixels, at most {MAX_PIXELS} are taken; "
            "shrink it first"
        )


def _decode(image: Any, turn: int, label: str) -> Pixels:
    """A PIL image in RGB, turned upright by its EXIF orientation."""
    if turn in _TURNS:  # not ImageOps.exif_transpose: it writes the EXIF anew, which fails for odd entries
        image = image.transpose(require("PIL.Image").Transpose[_TURNS[turn]])
    if image.mode.startswith("I") or image.mode == "F":
        return _rgb(_grey(image, label))
    if image.mode == "La":  # Pillow goes on from there only
        image = image.convert("LA")
    if "A" in image.getbands() or ("transparency" in image.info and image.mode != "RGBa"):
        return _on_white(image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _grey(image: Any, label: str) -> Pixels:
    """A picture of whole or floating-point numbers, one a pixel, in 8 bits. ``convert`` clips what is above 255."""
    grey = np.asarray(image)
    low, high = grey.min(), grey.max()
    if image.mode == "F":
        if not (low >= 0 and (high == 0 or 1 < high <= 255)):  # not <, so that NaN fails
            raise MediaError(
                f"{label} holds floating-point numbers in {low:g}..{high:g}; expected 0..255: convert it, numbers in "
                "0..1 times 255"
            )
    elif low < 0 or high > 65535:
        raise MediaError(f"{label} holds {low}..{high}; expected 8 or 16 bits a channel: convert it")
    if image.mode in ("I", "F") and high <= 255:
        return grey.astype(np.uint8)
    return np.concatenate([np.round(grey[i : i + 256] / 257).astype(np.uint8) for i in range(0, len(grey), 256)])


def _on_white(image: Any) -> Pixels:
    module = require("PIL.Image")
    white = module.new("RGBA", image.size, (255, 255, 255, 255))
    return np.asarray(module.alpha_composite(white, image).convert("RGB"))


def _rgb(grey: Pixels) -> Pixels:
    return np.repeat(grey.reshape(*grey.shape[:2], 1), 3, axis=2)


def _check_array(array: NDArray[Any]) -> None:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise MediaError(
            f"image array has shape {list(array.shape)}; expected [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]: "
            "move the channels last"
        )
    _check_pixels(array.shape[1], array.shape[0], "image array")


def _from_array(array: NDArray[Any]) -> Pixels:
    """Check an array and bring it to uint8 [H, W, 3]."""
    _check_array(array)
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise MediaError("image array holds NaN or infinite values; expected uint8, or float in 0..1")
        if array.min() < 0 or array.max() > 1:
            raise MediaError(
                f"image array of {array.dtype} lies in {array.min():g}..{array.max():g}; expected uint8, or float in "
                "0..1: scale it or convert it to uint8"
            )
        array = np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise MediaError(f"image array has dtype {array.dtype}; expected uint8, or float in 0..1: convert it")
    if array.ndim == 2 or array.shape[2] == 1:
        return _rgb(array)
    if array.shape[2] == 4:
        return _on_white(require("PIL.Image").fromarray(np.ascontiguousarray(array)))
    return np.ascontiguousarray(array)


def resize(pixels: Pixels, height: int, width: int) -> Pixels:
    """uint8 [H, W, 3] to [height, width, 3], Pillow BICUBIC."""
    if pixels.shape[:2] == (height, width):
        return pixels
    module = require("PIL.Image")
    resized = module.fromarray(np.ascontiguousarray(pixels)).resize((width, height), module.Resampling.BICUBIC)
    return np.asarray(resized)


def image_input(image: Pixels, frontend: VisionFrontend, size: tuple[int, int] | None = None) -> VisionInput:
    """Prepare one still picture: it is shown twice to fill a temporal patch.

    Args:
        image: uint8 [H, W, 3].
        size: height and width that it is shown in; the bundle's own choice if None.

    Raises:
        MediaError: wrong shape or dtype, an aspect ratio above ``MAX_ASPECT``.
    """
    _check_frames(image[None], "image")
    shown = size or image_size(image.shape[0], image.shape[1], frontend, VisionLimits())
    return _build(image[None], shown, frontend)


def video_input(frames: Pixels, frontend: VisionFrontend, size: tuple[int, int] | None = None) -> VisionInput:
    """Prepare a clip's frames; the last one is repeated to fill the last temporal patch.

    Args:
        frames: uint8 [F, H, W, 3], F >= 1.
        size: height and width that they are shown in; the bundle's own choice if None.

    Raises:
        MediaError: wrong shape or dtype, an aspect ratio above ``MAX_ASPECT``.
    """
    _check_frames(frames, "video")
    count, height, width = frames.shape[:3]
    return _build(frames, size or video_size(height, width, count, frontend, VisionLimits()), frontend)


def _check_frames(frames: NDArray[Any], kind: str) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        lead = "[F, H, W, 3]" if kind == "video" else "[1, H, W, 3]"
        raise MediaError(f"{kind} frames are {frames.dtype} {list(frames.shape)}; expected uint8 {lead}")


def _build(frames: Pixels, size: tuple[int, int], frontend: VisionFrontend) -> VisionInput:
    patch, merge, depth = frontend.patch_size, frontend.merge_size, frontend.temporal_patch_size
    rows, columns = size[0] // patch, size[1] // patch
    steps = -(-frames.shape[0] // depth)
    scale = (1.0 / (255.0 * np.asarray(frontend.image_std))).astype(np.float32)
    shift = (-np.asarray(frontend.image_mean) / np.asarray(frontend.image_std)).astype(np.float32)
    patches = np.empty((steps, rows * columns, 3 * depth * patch * patch), np.float32)
    # One temporal patch at a time: a long clip is never held in float twice.
    for step in range(steps):
        wanted = [min(i, frames.shape[0] - 1) for i in range(step * depth, (step + 1) * depth)]
        resized = {i: resize(frames[i], size[0], size[1]) for i in set(wanted)}
        pixels = np.stack([resized[i] for i in wanted])
        # [depth, block row, row in block, y, block column, column in block, x, channel]
        blocks = pixels.reshape(depth, rows // merge, merge, patch, columns // merge, merge, patch, 3)
        ordered = blocks.transpose(1, 4, 2, 5, 7, 0, 3, 6).reshape(rows * columns, 3, -1)  # while a pixel is one byte
        target = patches[step].reshape(ordered.shape)
        np.multiply(ordered, scale[:, None], out=target)
        target += shift[:, None]
    index, valid = window_layout(rows, columns, merge, frontend.window_size // patch)
    return VisionInput(patches, (steps, rows, columns), _positions(rows, columns, merge), index, valid)


def _positions(rows: int, columns: int, merge: int) -> NDArray[np.int64]:
    """Row and column of each patch in merge-block order, int64 [rows * columns, 2]."""
    grid = np.indices((rows, columns), dtype=np.int64).transpose(1, 2, 0)
    blocks = grid.reshape(rows // merge, merge, columns // merge, merge, 2)
    return np.ascontiguousarray(blocks.transpose(0, 2, 1, 3, 4).reshape(-1, 2))


def window_layout(rows: int, columns: int, merge: int, window: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Attention windows of one frame of rows x columns patches, windows of window x window patches.

    Follows transformers' get_vision_window_index, patch by patch and padded.

    Returns:
        index int64 [W * window**2] and valid bool [W, window**2]; see ``VisionInput``.
    """
    unit, side = merge * merge, window // merge
    height, width = rows // merge, columns // merge
    down, across = -(-height // side), -(-width // side)
    blocks = np.full((down * side, across * side), -1, np.int64)
    blocks[:height, :width] = np.arange(height * width).reshape(height, width)
    # Windows row by row; in each, its merge blocks row by row with those outside the picture moved to the end.
    windows = blocks.reshape(down, side, across, side).transpose(0, 2, 1, 3).reshape(down * across, side * side)
    windows = np.take_along_axis(windows, np.argsort(windows < 0, axis=1, kind="stable"), axis=1)
    valid = np.repeat(windows >= 0, unit, axis=1)
    index = (windows[:, :, None] * unit + np.arange(unit)).reshape(valid.shape)
    return np.where(valid, index, rows * columns).reshape(-1), valid
