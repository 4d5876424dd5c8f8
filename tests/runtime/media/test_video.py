"""Video in: frames at real times and the sound beside them, on clips written here with PyAV."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from omniport.runtime.bundle.manifest import VisionFrontend
from omniport.runtime.errors import MediaError
from omniport.runtime.media import video
from omniport.runtime.media.limits import VisionLimits, sample_frames
from omniport.runtime.media.video import load_video
from PIL import Image

FRONTEND = VisionFrontend(
    image_mean=(0.5, 0.5, 0.5), image_std=(0.25, 0.25, 0.25), min_pixels=3136, max_pixels=12845056
)
HEIGHT, WIDTH, CELL = 48, 128, 16
TICKS = 1000  # time base of the clips: milliseconds


def frontend(**changes: Any) -> VisionFrontend:
    fields = {name: getattr(FRONTEND, name) for name in FRONTEND.__struct_fields__}
    return VisionFrontend(**{**fields, **changes})


def draw(number: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> NDArray[np.uint8]:
    """Frame number in binary, 10 white or black cells above a square that moves."""
    image = np.full((*size, 3), 60, np.uint8)
    for bit in range(8):
        image[:CELL, bit * CELL : (bit + 1) * CELL] = 255 * (number >> bit & 1)
    at = number * 4 % (size[1] - CELL)
    image[CELL : 2 * CELL, at : at + CELL] = (220, 30, 30)
    return image


def number(image: NDArray[np.uint8]) -> int:
    """Read a drawn frame's number back."""
    means = [image[4:12, bit * CELL + 4 : bit * CELL + 12].mean() for bit in range(8)]
    assert all(mean < 60 or mean > 195 for mean in means), means
    return sum(1 << bit for bit, mean in enumerate(means) if mean > 128)


def beep(seconds: float, start: float, end: float, rate: int = 44100) -> NDArray[np.float32]:
    t = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * 880 * t) * ((t >= start) & (t < end))).astype(np.float32)


def timed(packets: list[Any], times: Sequence[float], last: float) -> list[Any]:
    """Give packets the time to the next frame as their duration, which encoders leave out."""
    ends = dict(zip((round(t * TICKS) for t in times), [*times[1:], times[-1] + last], strict=True))
    for packet in packets:
        packet.duration = round(ends[packet.pts] * TICKS) - packet.pts
    return packets


def write(
    path: Path,
    times: Sequence[float],
    last: float,
    sound: NDArray[np.float32] | None = None,
    codec: str = "mpeg4",
    sound_start: float = 0.0,
    size: tuple[int, int] = (HEIGHT, WIDTH),
) -> Path:
    """A clip whose frame i, the drawing of i, comes at times[i]; the last stays for ``last`` seconds."""
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream(codec, rate=25) if times else None
        track: Any = out.add_stream("aac", rate=44100, layout="mono") if sound is not None else None
        if stream:
            stream.width, stream.height, stream.pix_fmt = size[1], size[0], "yuv420p"
            stream.bit_rate = 4_000_000
            stream.codec_context.time_base = Fraction(1, TICKS)
            for i, start in enumerate(times):
                frame = av.VideoFrame.from_ndarray(draw(i, size), format="rgb24")
                frame.pts, frame.time_base = round(start * TICKS), Fraction(1, TICKS)
                out.mux(timed(stream.encode(frame), times, last))
            out.mux(timed(stream.encode(None), times, last))
        if track and sound is not None:
            for at in range(0, sound.shape[0], 1024):
                block = av.AudioFrame.from_ndarray(sound[None, at : at + 1024], format="fltp", layout="mono")
                block.sample_rate, block.pts = 44100, at + round(sound_start * 44100)
                block.time_base = Fraction(1, 44100)
                out.mux(track.encode(block))
            out.mux(track.encode(None))
    return path


def steady(seconds: float, fps: float = 25) -> tuple[list[float], float]:
    """Frame times and the last frame's length."""
    count = round(seconds * fps)
    return [i / fps for i in range(count)], seconds - (count - 1) / fps


def onset(samples: NDArray[np.float32], rate: int = 16000) -> float:
    loud = np.flatnonzero(np.abs(samples) > 0.2)
    assert loud.size > 0.1 * rate
    return float(loud[0]) / rate


# --- frames ------------------------------------------------------------------------------------------------------


def tool(total: int, rate: float, **ele: Any) -> list[int]:
    """qwen-omni-utils' choice of frames, after its documentation, with torch's linspace."""
    import torch

    if "nframes" in ele:
        count = min(round(ele["nframes"] / 2) * 2, total)
    else:
        least = math.ceil(ele.get("min_frames", 4) / 2) * 2
        most = math.floor(ele.get("max_frames", min(768, total)) / 2) * 2
        count = math.floor(min(min(max(total / rate * ele.get("fps", 2.0), least), most), total) / 2) * 2
    found: list[int] = torch.linspace(0, total - 1, count).round().long().tolist()
    return found


def test_frames_as_qwens_tool_chooses_them() -> None:
    rng = np.random.default_rng(0)
    for trial in range(400):
        rate = float(rng.choice([8, 10, 15, 24000 / 1001, 25, 30000 / 1001, 50, 60, rng.uniform(3, 120)]))
        total = int(rng.integers(2, 40_000 if trial % 4 == 0 else 600))
        options: dict[str, Any] = {}
        if trial % 3 == 1:
            options = {"fps": float(rng.uniform(0.2, 8)), "min_frames": int(rng.integers(1, 9))}
        elif trial % 3 == 2:
            options = {"max_frames": int(rng.integers(8, 60))} if trial % 2 else {"nframes": int(rng.integers(2, 90))}
        got = sample_frames(total, rate, FRONTEND, VisionLimits(**options))
        assert got.indices.tolist() == tool(total, rate, **options), (total, rate, options)


@pytest.mark.parametrize(
    ("seconds", "grids"), [(0.04, 1), (0.08, 1), (0.3, 2), (1.0, 2), (2.5, 2), (5.4, 5), (10.2, 10)]
)
def test_grids_of_a_file(tmp_path: Path, seconds: float, grids: int) -> None:
    """At least 4 frames where there are so many, floored to even, from the first to the last."""
    path = write(tmp_path / "clip.mkv", *steady(seconds))
    total = round(seconds * 25)
    clip = load_video(path, FRONTEND, with_audio=False)
    assert clip.frames.shape[0] == 2 * grids
    expected = [0, 0] if total == 1 else tool(total, 25.0)
    assert [number(frame) for frame in clip.frames] == [index % 256 for index in expected]


def test_the_time_of_a_grid() -> None:
    """Nominal while the rate decides, as the processor has it; real where the number of frames was bounded."""
    second = lambda total, **options: sample_frames(total, 25, FRONTEND, VisionLimits(**options)).second_per_grid  # noqa: E731
    assert second(25) == second(135) == second(255) == 1.0
    assert second(250, fps=4.0) == 0.5
    assert second(250, max_frames=10) == pytest.approx(2.0)
    assert second(250, nframes=4) == pytest.approx(5.0)
    assert second(768 * 25) == pytest.approx(2.0)


def test_a_part_of_a_video(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", *steady(4.0), sound=beep(4.0, 2.5, 3.0))
    limits = VisionLimits(video_start=2.0, video_end=3.2)
    clip = load_video(path, FRONTEND, with_audio=True, limits=limits)
    shown = [number(frame) for frame in clip.frames]
    assert (shown[0], shown[-1], len(shown)) == (50, 80, 4)
    assert clip.audio is not None
    assert len(clip.audio) == round(1.2 * 16000)
    assert onset(clip.audio) == pytest.approx(0.5, abs=0.03)
    with pytest.raises(MediaError, match=r"leave no frame of 4\.00 s"):
        load_video(path, FRONTEND, with_audio=False, limits=VisionLimits(video_start=5.0))


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_bytes_as_the_file(tmp_path: Path, codec: str, suffix: str) -> None:
    path = write(tmp_path / f"clip{suffix}", *steady(5.0), codec=codec)
    clip = load_video(path, FRONTEND, with_audio=False)
    assert clip.frames.shape == (10, HEIGHT, WIDTH, 3)
    assert clip.frames.dtype == np.uint8
    assert clip.audio is None
    assert [number(frame) for frame in clip.frames] == tool(125, 25.0)
    again = load_video(path.read_bytes(), FRONTEND, with_audio=False)
    np.testing.assert_array_equal(again.frames, clip.frames)


def test_lists_and_arrays_of_frames(tmp_path: Path) -> None:
    """All of them are shown, at 2 a second unless ``fps`` says otherwise; the last again where they are odd."""
    import torch

    frames = [draw(i) for i in range(5)]
    paths = []
    for i, frame in enumerate(frames):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(frame).save(paths[-1])
    stack = np.stack(frames)
    for source in (frames, paths, [p.as_uri() for p in paths], stack, torch.from_numpy(stack).permute(0, 3, 1, 2)):
        clip = load_video(source, FRONTEND, with_audio=True)
        assert [number(frame) for frame in clip.frames] == [0, 1, 2, 3, 4, 4]
        assert (clip.second_per_grid, clip.audio) == (1.0, None)
    assert load_video(frames, FRONTEND, with_audio=False, limits=VisionLimits(fps=4.0)).second_per_grid == 0.5
    for source, words in (
        ([], "without frames"),
        ([frames[0], draw(1, (64, 200))], "frame 1 has 200x64 pixels, the first 128x48"),
        ([frames[0], 7], "type int"),
        (stack[0, :, :, 0], r"shape \[48, 128\]"),
    ):
        with pytest.raises(MediaError, match=words):
            load_video(source, FRONTEND, with_audio=False)


def test_colours_survive(tmp_path: Path) -> None:
    clip = load_video(write(tmp_path / "clip.mp4", *steady(1.0)), FRONTEND, with_audio=False)
    square = clip.frames[0, CELL + 4 : 2 * CELL - 4, 4 : CELL - 4].mean(axis=(0, 1))
    assert square[0] > 180
    assert square[1:].max() < 80


def test_slow_video_is_not_shown_twice(tmp_path: Path) -> None:
    clip = load_video(write(tmp_path / "slow.mkv", [0.0, 1.0, 2.0, 3.0], 1.0), FRONTEND, with_audio=False)
    assert [number(frame) for frame in clip.frames] == [0, 1, 2, 3]
    assert clip.second_per_grid == pytest.approx(2.0)


def test_clip_that_starts_late(tmp_path: Path) -> None:
    """Times count from the first frame, in a container whose clock starts at 7 s."""
    times = [7.0 + i / 25 for i in range(50)]
    sound = beep(2.0, 0.8, 1.2)
    path = write(tmp_path / "late.mkv", times, 0.04, sound, sound_start=7.0)
    clip = load_video(path, FRONTEND, with_audio=True)
    assert [number(frame) for frame in clip.frames] == [0, 16, 33, 49]
    assert clip.audio is not None
    assert onset(clip.audio) == pytest.approx(0.8, abs=0.03)


def test_stream_without_time_stamps(tmp_path: Path) -> None:
    """A raw MPEG-4 stream: frames follow each other at the nominal rate."""
    path = write(tmp_path / "raw.m4v", *steady(2.0))
    clip = load_video(path, FRONTEND, with_audio=True)
    assert clip.audio is None
    assert clip.frames.shape[0] == 4
    assert [number(frame) for frame in clip.frames] == [0, 16, 33, 49]


@pytest.mark.parametrize("quarter", [1, 2, 3])
def test_rotation_is_applied(tmp_path: Path, quarter: int) -> None:
    """Phones store frames lying down and a matrix in the track header."""
    path = write(tmp_path / "phone.mp4", *steady(1.0))
    upright = load_video(path, FRONTEND, with_audio=False).frames
    one = 0x10000
    cos, sin = {1: (0, one), 2: (-one, 0), 3: (0, -one)}[quarter]
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40
    assert struct.unpack_from(">i", content, at)[0] == one
    struct.pack_into(">9i", content, at, cos, sin, 0, -sin, cos, 0, 0, 0, 1 << 30)
    turned = load_video(bytes(content), FRONTEND, with_audio=False).frames
    # The matrix (0, 1; -1, 0) turns a point of the picture clockwise on the screen, whose y axis points down.
    np.testing.assert_array_equal(turned, np.rot90(upright, -quarter, axes=(1, 2)))


# --- sound -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("late", [0.0, 0.6])
def test_sound_is_aligned(tmp_path: Path, suffix: str, late: float) -> None:
    """The beep comes at its time in the picture, in a track that starts with the video and in one that starts later."""
    path = write(tmp_path / f"clip{suffix}", *steady(3.0), sound=beep(2.4, 0.9, 1.4), sound_start=late)
    clip = load_video(path, FRONTEND, with_audio=True)
    assert clip.audio is not None
    assert clip.audio.dtype == np.float32
    assert clip.audio.shape[0] / 16000 == pytest.approx(2.4 + late, abs=0.06)
    assert onset(clip.audio) == pytest.approx(0.9 + late, abs=0.03)
    end = clip.audio.shape[0] - onset(clip.audio[::-1]) * 16000
    assert end / 16000 == pytest.approx(1.4 + late, abs=0.03)


def test_sound_is_not_decoded_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "clip.mp4", *steady(1.0), sound=beep(1.0, 0.2, 0.8))
    monkeypatch.setattr(video, "read_track", lambda *_, **__: pytest.fail("decoded"))
    assert load_video(path, FRONTEND, with_audio=False).audio is None


def test_no_sound_track(tmp_path: Path) -> None:
    assert load_video(write(tmp_path / "clip.mp4", *steady(1.0)), FRONTEND, with_audio=True).audio is None


# --- what cannot be used -----------------------------------------------------------------------------------------


def test_video_without_frames(tmp_path: Path) -> None:
    path = write(tmp_path / "sound.mp4", [], 0.0, sound=beep(1.0, 0.0, 1.0))
    with pytest.raises(MediaError, match="video without frames"):
        load_video(path, FRONTEND, with_audio=False)


def test_empty_video_stream(tmp_path: Path) -> None:
    path = tmp_path / "none.mkv"
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        out.start_encoding()
    with pytest.raises(MediaError, match=r"video without frames|cannot be decoded"):
        load_video(path, FRONTEND, with_audio=False)


@pytest.mark.parametrize("content", [b"", b"not a video" * 100, b"\0\0\0\x18ftypmp42" + bytes(100)])
def test_unreadable_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.mp4"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(MediaError, match=r"empty|cannot be decoded|without frames"):
            load_video(source, FRONTEND, with_audio=True)


def test_unknown_codec(tmp_path: Path) -> None:
    content = write(tmp_path / "clip.mkv", *steady(1.0)).read_bytes()
    assert content.count(b"V_MPEG4/ISO/ASP") == 1
    with pytest.raises(MediaError, match="codec that FFmpeg does not know"):
        load_video(content.replace(b"V_MPEG4/ISO/ASP", b"V_NOBODY/KNOWS/"), FRONTEND, with_audio=False)


def test_truncated_file(tmp_path: Path) -> None:
    content = write(tmp_path / "clip.mp4", *steady(2.0)).read_bytes()
    with pytest.raises(MediaError, match="cannot be decoded"):
        load_video(content[: len(content) // 2], FRONTEND, with_audio=False)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="does not exist"):
        load_video(tmp_path / "nowhere.mp4", FRONTEND, with_audio=False)


def test_size_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "clip.mp4", *steady(2.0))
    monkeypatch.setattr(video, "MAX_BYTES", 4 * HEIGHT * WIDTH * 3)
    assert load_video(path, FRONTEND, with_audio=False).frames.shape[0] == 4
    monkeypatch.setattr(video, "MAX_BYTES", 4 * HEIGHT * WIDTH * 3 - 1)
    with pytest.raises(MediaError, match=f"4 frames of {WIDTH}x{HEIGHT}"):
        load_video(path, FRONTEND, with_audio=False)
    monkeypatch.setattr(video, "MAX_FRAME_PIXELS", HEIGHT * WIDTH - 1)
    with pytest.raises(MediaError, match="pixels a frame"):
        load_video(path, FRONTEND, with_audio=False)


def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    path = write(tmp_path / "clip.mp4", *steady(1.0))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MediaError, match=r"pip install 'omniport\[media\]'"):
        load_video(path, FRONTEND, with_audio=False)
