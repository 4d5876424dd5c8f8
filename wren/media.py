"""Pictures and clips of the world, drawn."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from wren import sizes
from wren.world import MOVES, Clip, Draw, Picture

Pixels = NDArray[np.uint8]
# What is where: of each pixel, 0 for the ground, 1 for the scene's first shape, 2 for its second, ...
Places = NDArray[np.uint8]

PICTURE = 112  # pixels a side: 16 tokens
FRAME = 336  # of a clip: Qwen2.5-Omni enlarges smaller videos
CLIP_SECONDS = 2.0
CLIP_FPS = 8  # frames that a clip's file has a second

RGB = {
    "red": (220, 30, 30),
    "blue": (40, 60, 230),
    "green": (30, 165, 60),
    "yellow": (245, 220, 40),
    "purple": (130, 45, 175),
    "white": (250, 250, 250),
    "orange": (245, 135, 20),
    "pink": (250, 150, 195),
}
GROUNDS = ((15, 15, 20), (55, 55, 60), (95, 95, 100))


def picture(scene: Picture, draw: Draw) -> tuple[Pixels, Places]:
    """uint8 [112, 112, 3] and [112, 112]: size, place and tint of the shapes vary, their order does not."""
    canvas, brush = _canvas(draw, PICTURE)
    places = Image.new("L", canvas.size)
    count = len(scene.shapes)
    for i, (colour, shape) in enumerate(scene.shapes):
        cell = PICTURE / count
        radius = draw.uniform(0.3, 0.45) * min(cell, 0.6 * PICTURE)
        along = (i + 0.5) * cell + draw.uniform(-0.8, 0.8) * (cell / 2 - radius)
        across = PICTURE / 2 + draw.uniform(-0.8, 0.8) * (PICTURE / 2 - radius)
        x, y = (across, along) if scene.column else (along, across)
        _shape(brush, shape, _tint(colour, draw), x, y, radius)
        _shape(ImageDraw.Draw(places), shape, i + 1, x, y, radius)
    return np.asarray(canvas), np.asarray(places)


def clip(scene: Clip, draw: Draw, times: NDArray[np.float64]) -> tuple[Pixels, Places]:
    """uint8 [F, 336, 336, 3] and [F, 336, 336] at ``times`` [F], seconds from the clip's start.

    In the places a shape of the second colour counts as a second shape.
    """
    radius = draw.uniform(0.13, 0.2) * FRAME
    ground, start = int(draw.integers(len(GROUNDS))), draw.uniform(-0.05, 0.05, 2) * FRAME
    first = _tint(scene.colour, draw)
    second = first if scene.change in MOVES else _tint(scene.change, draw)
    turn = draw.uniform(0.8, 1.2)
    reach = FRAME / 2 - radius - 0.06 * FRAME
    across, down = {MOVES[0]: (-1, 0), MOVES[1]: (1, 0), MOVES[2]: (0, -1), MOVES[3]: (0, 1)}.get(scene.change, (0, 0))
    frames, places = [], []
    for time in times:
        way = 2 * min(1.0, time / CLIP_SECONDS) - 1
        canvas = Image.new("RGB", (FRAME, FRAME), GROUNDS[ground])
        x, y = FRAME / 2 + start[0] + across * way * reach, FRAME / 2 + start[1] + down * way * reach
        _shape(ImageDraw.Draw(canvas), scene.shape, first if time < turn else second, x, y, radius)
        place = Image.new("L", canvas.size)
        _shape(ImageDraw.Draw(place), scene.shape, 1 if time < turn or scene.change in MOVES else 2, x, y, radius)
        frames.append(np.asarray(canvas))
        places.append(np.asarray(place))
    return np.stack(frames), np.stack(places)


def clip_sound(word: NDArray[np.float32], draw: Draw) -> NDArray[np.float32]:
    """float32 [n] at 16 kHz, as long as the clip: the word somewhere in it."""
    sound = np.zeros(round(CLIP_SECONDS * sizes.QUESTION_RATE), np.float32)
    word = word[: len(sound)]
    at = int(draw.integers(len(sound) - len(word) + 1))
    sound[at : at + len(word)] = word
    return sound


def _canvas(draw: Draw, side: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    canvas = Image.new("RGB", (side, side), GROUNDS[int(draw.integers(len(GROUNDS)))])
    return canvas, ImageDraw.Draw(canvas)


def _tint(colour: str, draw: Draw) -> tuple[int, int, int]:
    red, green, blue = (max(0, min(255, value + int(draw.integers(-12, 13)))) for value in RGB[colour])
    return red, green, blue


def _shape(
    brush: ImageDraw.ImageDraw, shape: str, fill: tuple[int, int, int] | int, x: float, y: float, r: float
) -> None:
    if shape == "circle":
        brush.ellipse([x - r, y - r, x + r, y + r], fill=fill)
        return
    if shape == "heart":
        angles = np.linspace(0, 2 * math.pi, 40)
        across = 16 * np.sin(angles) ** 3
        down = -(13 * np.cos(angles) - 5 * np.cos(2 * angles) - 2 * np.cos(3 * angles) - np.cos(4 * angles))
        corners = [(x + r * a / 17, y + r * d / 17) for a, d in zip(across, down, strict=True)]
    elif shape == "star":
        points = [(r if i % 2 == 0 else 0.42 * r, i * math.pi / 5) for i in range(10)]
        corners = [(x + length * math.sin(a), y - length * math.cos(a)) for length, a in points]
    elif shape == "triangle":
        corners = [(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)]
    else:
        half = 0.85 * r
        corners = [(x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half)]
    brush.polygon(corners, fill=fill)


def write_clip(path: Path, frames: Pixels, sound: NDArray[np.float32]) -> None:
    """A file of frames [F, h, w, 3], ``CLIP_FPS`` a second, with sound [n] at 16 kHz; both without loss."""
    samples = np.round(np.clip(sound, -1, 1) * 32767).astype(np.int16)
    # bitexact: no random ids, so that equal clips are equal files
    with av.open(str(path), "w", format="matroska", options={"fflags": "+bitexact"}) as file:
        video: Any = file.add_stream("ffv1", rate=CLIP_FPS)
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], "bgr0"
        audio: Any = file.add_stream("pcm_s16le", rate=sizes.QUESTION_RATE, layout="mono")
        for frame in frames:
            file.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(video.encode())
        block = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        block.sample_rate, block.pts, block.time_base = sizes.QUESTION_RATE, 0, Fraction(1, sizes.QUESTION_RATE)
        file.mux(audio.encode(block))
        file.mux(audio.encode())
