"""Images in, against transformers' PIL-based Qwen2-VL image processor and its vision utilities."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from omniport.runtime.bundle.manifest import VisionFrontend
from omniport.runtime.errors import MediaError
from omniport.runtime.media import image as vision
from omniport.runtime.media import limits
from omniport.runtime.media.image import VisionInput, image_input, load_image, video_input
from PIL import Image

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FRONTEND = VisionFrontend(image_mean=MEAN, image_std=STD, min_pixels=3136, max_pixels=12845056)


def reference(image: Any, max_pixels: int = 12845056) -> tuple[NDArray[np.float32], list[int]]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": max_pixels})
    out = processor(image, return_tensors="np")
    return out["pixel_values"], out["image_grid_thw"][0].tolist()


def assert_layout(got: VisionInput) -> None:
    """Positions and windows against the reference's functions, frame by frame."""
    import torch
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    steps, rows, columns = got.grid_thw
    count = rows * columns
    assert got.patches.shape == (steps, count, 1176)
    assert got.patches.dtype == np.float32
    assert got.tokens == steps * count // 4
    grid = torch.tensor([[steps, rows, columns]])
    np.testing.assert_array_equal(np.tile(got.grid_hw, (steps, 1)), get_vision_position_ids(grid, 2).numpy())
    blocks, ends = get_vision_window_index(grid, 2, 112, 14)
    expected = (blocks[:, None] * 4 + torch.arange(4)).flatten().numpy()
    windows = got.window_index.reshape(-1, 64)
    valid = got.window_valid
    assert windows.shape == valid.shape
    assert got.window_index.dtype == got.grid_hw.dtype == np.int64
    assert (np.diff(valid.astype(int), axis=1) <= 0).all()  # used slots first
    assert valid.any(axis=1).all()
    assert (windows[~valid] == count).all()
    per_frame = [windows[valid] + step * count for step in range(steps)]
    np.testing.assert_array_equal(np.concatenate(per_frame), expected)
    np.testing.assert_array_equal(np.tile(valid.sum(axis=1), steps), np.diff(ends.numpy()))


def assert_equal_to_reference(image: Any) -> VisionInput:
    pixels, grid = reference(image)
    assert pixels.std() > 0.05
    got = image_input(load_image(image), FRONTEND)
    assert list(got.grid_thw) == grid
    assert np.abs(got.patches[0] - pixels).max() <= 1e-3
    assert_layout(got)
    return got


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def png(array: NDArray[np.uint8], **kwargs: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", **kwargs)
    return buffer.getvalue()


# --- parity ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "camera.png", "logo.png"])
def test_photos(name: str) -> None:
    skimage = pytest.importorskip("skimage", reason="scikit-image, which ships the photos, is not installed")
    path = Path(skimage.__file__).parent / "data" / name
    if not path.exists():
        pytest.skip(f"this scikit-image does not ship {name}")
    with Image.open(path) as image:
        image.load()
        assert_equal_to_reference(image)
        np.testing.assert_array_equal(load_image(path), load_image(path.read_bytes()))


@pytest.mark.parametrize("size", [(14, 14), (15, 2999), (28, 5600), (113, 57), (112, 112), (111, 225), (300, 451)])
def test_odd_sizes(size: tuple[int, int]) -> None:
    assert_equal_to_reference(Image.fromarray(noise(*size)))


@pytest.mark.parametrize("size", [(1, 1), (10, 10), (13, 100), (600, 8), (1, 200), (27, 27), (14, 13)])
def test_small_pictures_are_enlarged(size: tuple[int, int]) -> None:
    pixels, grid = reference(Image.fromarray(noise(*size)))
    got = image_input(noise(*size), FRONTEND)
    assert list(got.grid_thw) == grid
    np.testing.assert_allclose(got.patches.reshape(pixels.shape), pixels, atol=1e-5)
    frames = video_input(np.stack([noise(*size)] * 2), FRONTEND)
    least = FRONTEND.video_min_pixels
    assert 196 * frames.grid_hw.shape[0] >= least


def test_max_pixels_shrinks() -> None:
    image = noise(700, 500)
    pixels, grid = reference(Image.fromarray(image), max_pixels=100 * 784)
    frontend = VisionFrontend(image_mean=MEAN, image_std=STD, min_pixels=3136, max_pixels=100 * 784)
    got = image_input(image, frontend)
    assert list(got.grid_thw) == grid
    assert grid[1] * grid[2] <= 400
    assert np.abs(got.patches[0] - pixels).max() <= 1e-3


def test_sizes_as_the_reference() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    generator = np.random.default_rng(3)
    for _ in range(500):
        height, width = (int(side) for side in generator.integers(14, 4000, 2))
        if max(height, width) > 200 * min(height, width):
            continue
        expected = smart_resize(height, width, 28, 3136, 500_000)
        assert limits.target_size(height, width, FRONTEND, 3136, 500_000) == expected


def test_transparency_is_composited_as_in_the_reference() -> None:
    image = noise(60, 84, 4)
    assert_equal_to_reference(Image.fromarray(image))
    np.testing.assert_array_equal(load_image(image), load_image(Image.fromarray(image)))
    image[..., 3] = 0
    assert (load_image(image) == 255).all()


def test_still_image_is_two_equal_frames() -> None:
    got = image_input(noise(56, 84), FRONTEND)
    frames = got.patches.reshape(1, 24, 3, 2, 14, 14)
    assert frames.std() > 0.5
    np.testing.assert_array_equal(frames[:, :, :, 0], frames[:, :, :, 1])


def test_video_frames_are_paired_in_order() -> None:
    """Each frame's half of a temporal patch is that picture's, for pictures within the video's pixel bounds."""
    frames = np.stack([noise(364, 448, seed=i) for i in range(5)])
    got = video_input(frames, FRONTEND)
    assert got.grid_thw == (3, 26, 32)
    assert_layout(got)
    halves = got.patches.reshape(3, 26 * 32, 3, 2, 14, 14)
    for i in range(6):
        still = image_input(frames[min(i, 4)], FRONTEND).patches.reshape(26 * 32, 3, 2, 14, 14)
        np.testing.assert_array_equal(halves[i // 2, :, :, i % 2], still[:, :, 0])


@pytest.mark.parametrize(("size", "axes"), [((280, 500), 1), ((401, 392), 1), ((270, 480), 2), ((720, 1280), 2)])
def test_video_resize_is_the_reference_kernel(size: tuple[int, int], axes: int) -> None:
    """torchvision's antialiased bicubic, which is torch's: within one level where one axis changes.

    With both, Pillow clips overshoot at hard edges between its passes and torch does not.
    """
    import torch
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    image = np.stack([x % 200, 200 * (y // 16 % 2), (x * y // 64) % 256], axis=-1).astype(np.uint8)
    target = smart_resize(*size, 28, FRONTEND.video_min_pixels, FRONTEND.video_max_pixels)
    assert (target[0] != size[0]) + (target[1] != size[1]) == axes
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    resized = torch.nn.functional.interpolate(planes, target, mode="bicubic", antialias=True).round().clamp(0, 255)
    expected = image_input(resized[0].permute(1, 2, 0).numpy().astype(np.uint8), FRONTEND)
    got = video_input(image[None], FRONTEND)
    assert expected.grid_thw == got.grid_thw
    levels = np.abs(expected.patches - got.patches) * 255 * min(STD)
    assert np.quantile(levels, 1.0 if axes == 1 else 0.95) <= 1.01
    assert levels.mean() < 0.3


# --- decoding ----------------------------------------------------------------------------------------------------


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = noise(40, 60)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated clockwise
    turned = load_image(png(image, exif=exif))
    np.testing.assert_array_equal(turned, np.rot90(image, -1))


def entry(tag: int, kind: int, value: bytes, at: int) -> bytes:
    """One EXIF entry; a value of more than 4 bytes stands at ``at``."""
    return struct.pack("<HHI", tag, kind, 1) + (value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<I", at))


EXIF_VALUES = {
    1: b"\1",
    2: b"a\0",
    3: struct.pack("<H", 3),
    4: struct.pack("<I", 70000),
    5: struct.pack("<II", 1, 1),
    7: b"\2",
    9: struct.pack("<i", -5),
    10: struct.pack("<ii", -72, 1),
    11: struct.pack("<f", 1.0),
    12: struct.pack("<d", 1.0),
    13: struct.pack("<I", 5),
}


@pytest.mark.parametrize("kind", EXIF_VALUES)
def test_odd_exif_entries_do_not_matter(kind: int) -> None:
    """Orientation 6 and one entry whose type is not what its tag asks for, as real cameras write them."""
    image = noise(28, 56)
    for tag in (0x102, 0x10F, 0x11A, 0x128, 0x131, 0x132, 0x213, 0x8298, 0x8769, 0x8825, 0x9000, 0x927C, 0xA005):
        entries = sorted([entry(0x112, 3, struct.pack("<H", 6), 0), entry(tag, kind, EXIF_VALUES[kind], 38)])
        directory = b"II*\0" + struct.pack("<IH", 8, 2) + b"".join(entries) + bytes(4)
        turned = load_image(png(image, exif=b"Exif\0\0" + directory + EXIF_VALUES[kind]))
        np.testing.assert_array_equal(turned, np.rot90(image, -1), err_msg=f"{tag:#x}")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_as_pillow(orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    for form in ("PNG", "TIFF"):
        buffer = io.BytesIO()
        Image.fromarray(noise(20, 33)).save(buffer, form, exif=exif)
        with Image.open(io.BytesIO(buffer.getvalue())) as opened:
            expected = np.asarray(ImageOps.exif_transpose(opened))
        np.testing.assert_array_equal(load_image(buffer.getvalue()), expected)
        with Image.open(io.BytesIO(buffer.getvalue())) as opened:
            np.testing.assert_array_equal(load_image(opened), expected)
            np.testing.assert_array_equal(load_image(opened), expected)  # the caller's picture is left as it was


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("deep"), AssertionError(), KeyError("x")])
def test_whatever_a_decoder_raises_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = tmp_path / "p.png"
    path.write_bytes(png(noise(20, 20)))

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(MediaError, match=r"p\.png' is corrupt: .*; open it in another program"):
        load_image(path)


def test_modes_become_rgb() -> None:
    image = Image.fromarray(noise(30, 40))
    rgb = np.asarray(image)
    grey = np.asarray(image.convert("L"))
    for source in (rgb, image, png(rgb)):
        np.testing.assert_array_equal(load_image(source), rgb)
    for source in (grey, grey[:, :, None], image.convert("L"), png(grey)):
        np.testing.assert_array_equal(load_image(source), np.repeat(grey[:, :, None], 3, axis=2))
    for mode in ("P", "CMYK", "YCbCr", "1", "LA", "HSV"):
        assert load_image(image.convert(mode)).shape == (30, 40, 3)


def test_sixteen_bit_grey_is_scaled(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 40 * 50).reshape(40, 50).astype(np.uint16)
    path = tmp_path / "deep.png"
    Image.fromarray(ramp).save(path)
    expected = np.round(ramp / 257).astype(np.uint8)
    np.testing.assert_array_equal(load_image(path)[..., 0], expected)
    assert np.unique(expected).size == 256


@pytest.mark.parametrize("mode", ["I", "F", "LA", "PA", "RGBa", "RGBX", "LAB", "HSV", "CMYK", "YCbCr", "1", "P"])
@pytest.mark.parametrize("transparent", [False, True])
def test_modes_of_pillow_are_read_as_by_the_reference(mode: str, transparent: bool) -> None:
    source = noise(60, 84, 4)
    source[..., 3] = source[..., 3] // 2 + 60
    flat = Image.fromarray(source).convert("P" if mode == "PA" else "RGBA" if mode == "RGBa" else "RGB")
    image = Image.new(mode, (84, 60), (99, 150, 110)) if mode == "LAB" else flat.convert(mode)
    if transparent:
        image.info["transparency"] = {"1": 255, "P": 3}.get(mode)
    assert_equal_to_reference(image)


def test_premultiplied_grey_is_read_as_grey_with_alpha() -> None:
    image = Image.fromarray(noise(60, 84, 4)).convert("LA").convert("La")
    np.testing.assert_array_equal(load_image(image), load_image(image.convert("LA")))


def test_whole_and_floating_point_numbers_beyond_8_bits() -> None:
    """The reference clips them to white."""
    deep = Image.fromarray(np.array([[0, 257, 65535]], np.int32))
    np.testing.assert_array_equal(load_image(deep)[0, :, 0], [0, 1, 255])
    for wrong in ([[0, 70000]], [[-1, 5]]):
        with pytest.raises(MediaError, match="8 or 16 bits"):
            load_image(Image.fromarray(np.array(wrong, np.int32)))
    for values, words in (([[0.0, 0.9]], r"0\.\.0\.9.*times 255"), ([[-1.0, 5.0]], "-1"), ([[3.0, 300.0]], "300")):
        with pytest.raises(MediaError, match=words):
            load_image(Image.fromarray(np.array(values, np.float32)))
    with pytest.raises(MediaError, match="nan"):
        load_image(Image.fromarray(np.array([[np.nan, 5.0]], np.float32)))
    np.testing.assert_array_equal(load_image(Image.fromarray(np.array([[0, 0]], np.float32))), np.zeros((1, 2, 3)))


def test_float_arrays_are_scaled() -> None:
    image = noise(20, 30)
    np.testing.assert_array_equal(load_image(image / 255.0), image)
    np.testing.assert_array_equal(load_image((image / 255.0).astype(np.float32)), image)


# --- what cannot be used -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.full((20, 20, 3), np.nan), "NaN"),
        (np.full((20, 20, 3), 200.0), r"float64 lies in 200..200"),
        (np.full((20, 20, 3), -0.1), r"expected uint8, or float in 0..1"),
        (np.zeros((20, 20, 3), np.int64), "dtype int64"),
        (np.zeros((20, 20, 3), np.uint16), "dtype uint16"),
        (np.zeros((3, 20, 20), np.uint8), "channels last"),
        (np.zeros((20, 20, 2), np.uint8), r"\[20, 20, 2\]"),
        (np.zeros((1, 20, 20, 3), np.uint8), r"\[1, 20, 20, 3\]"),
        (np.zeros((0, 20, 3), np.uint8), "no pixels"),
    ],
)
def test_arrays_that_are_not_pictures(array: NDArray[Any], words: str) -> None:
    with pytest.raises(MediaError, match=words):
        load_image(array)


@pytest.mark.parametrize(
    ("size", "words"),
    [((20, 20000), "too elongated"), ((20000, 20), "too elongated")],
)
def test_unusable_sizes(size: tuple[int, int], words: str) -> None:
    for image in (noise(*size), load_image(png(noise(*size)))):
        with pytest.raises(MediaError, match=words):
            image_input(image, FRONTEND)
        with pytest.raises(MediaError, match=words):
            video_input(image[None], FRONTEND)


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"not a picture at all" * 20, b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_unreadable_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(MediaError, match=r"empty|corrupt|not a picture"):
            load_image(source)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_files(form: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(noise(200, 200)).save(buffer, form)
    assert load_image(buffer.getvalue()).shape == (200, 200, 3)
    with pytest.raises(MediaError):
        load_image(buffer.getvalue()[: len(buffer.getvalue()) // 2])


def test_missing_file_and_wrong_type(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="does not exist"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(MediaError, match="type int"):
        load_image(3)


@pytest.mark.parametrize("side", [10_000, 30_000])
def test_decompression_bombs_are_not_decoded(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PNG of a few bytes that claims a huge picture is refused by its header."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    monkeypatch.setattr(vision, "_decode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(MediaError, match="too large"):
        load_image(bomb)


def test_postscript_is_not_run() -> None:
    with pytest.raises(MediaError, match="not a picture"):
        load_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF\n")


def test_inputs_must_be_uint8() -> None:
    with pytest.raises(MediaError, match=r"float64 \[1, 20, 20, 3\]"):
        image_input(np.zeros((20, 20, 3)), FRONTEND)  # type: ignore[arg-type]
    with pytest.raises(MediaError, match=r"\[F, H, W, 3\]"):
        video_input(np.zeros((20, 20, 3), np.uint8), FRONTEND)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "TIFF", "JPEG", "WEBP"])
def test_the_size_by_the_header_is_that_of_the_upright_picture(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(noise(20, 33)).save(buffer, form, exif=exif)
    assert vision.picture_size(buffer.getvalue()) == load_image(buffer.getvalue()).shape[:2]


@pytest.mark.parametrize("prefix", ["file://", "FILE://", "file:", "file://localhost"])
def test_urls_of_files(tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "a b.png"
    path.write_bytes(png(noise(20, 33)))
    assert load_image(f"{prefix}{tmp_path}/a%20b.png").shape == (20, 33, 3)


@pytest.mark.parametrize("prefix", ["data:image/png;base64,", "data:image;base64,", "DATA:;BASE64,"])
def test_urls_that_hold_the_file(prefix: str) -> None:
    """As Qwen's own tool takes them."""
    pixels = noise(20, 33)
    url = prefix + base64.b64encode(png(pixels)).decode()
    np.testing.assert_array_equal(load_image(url), pixels)
    with pytest.raises(MediaError, match="is damaged") as refused:
        load_image(url[:-1])
    assert len(str(refused.value)) < 300
    with pytest.raises(MediaError, match="is corrupt") as refused:
        load_image(prefix + base64.b64encode(png(pixels)[:90]).decode())
    assert len(str(refused.value)) < 300


def test_strings_and_bytes_of_numpy_are_names_and_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(noise(20, 33)))
    assert load_image(np.str_(tmp_path / "a.png")).shape == (20, 33, 3)
    assert load_image(np.bytes_(png(noise(20, 33)))).shape == (20, 33, 3)
