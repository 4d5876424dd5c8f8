"""Decoders of damaged files write nothing to stderr, and nothing of others is lost meanwhile."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from omniport.runtime.system.stderr import dropped_from_stderr
from PIL import Image


def mp3() -> bytes:
    content = io.BytesIO()
    soundfile.write(content, 0.3 * np.sin(np.arange(32000) / 9), 16000, format="MP3")
    return content.getvalue()


def tiff() -> bytes:
    """Whose copies Pillow logs an error of: some say that a pixel has 2048 samples."""
    content = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
    Image.fromarray(pixels).save(content, "TIFF")
    return content.getvalue()


#: loads damaged copies of a file, and prints how many were refused; pytest itself takes what would be logged to stderr
LOAD = """
import random, sys
from pathlib import Path
from omniport.runtime.errors import MediaError
from omniport.runtime.media.audio import load_audio
from omniport.runtime.media.image import load_image

load, whole = {"mp3": load_audio, "tiff": load_image}[sys.argv[2]], Path(sys.argv[1]).read_bytes()
draw, refused = random.Random(0), 0
load(whole)
samples_per_pixel = bytes((21, 1, 3, 0, 1, 0, 0, 0))  # a TIFF's tag 277, one short
for number in range(150):
    damaged = bytearray(whole)
    if number == 0 and samples_per_pixel in whole:
        damaged[whole.index(samples_per_pixel) + 9] = 8
    for _ in range(draw.choice([1, 5, 50])):
        damaged[draw.randrange(len(damaged))] = draw.randrange(256)
    if draw.random() < 0.3:
        damaged = damaged[: draw.randrange(10, len(damaged))]
    try:
        load(bytes(damaged))
    except MediaError:
        refused += 1
print(refused)
"""


@pytest.mark.parametrize(("kind", "make"), [("mp3", mp3), ("tiff", tiff)])
def test_damaged_files(tmp_path: Path, kind: str, make: Callable[[], bytes]) -> None:
    path = tmp_path / "whole"
    path.write_bytes(make())
    done = subprocess.run([sys.executable, "-c", LOAD, path, kind], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert int(done.stdout) > 5


def test_lines_of_others_come_late(capfd: pytest.CaptureFixture[str]) -> None:
    with dropped_from_stderr(re.compile(rb"Note: ")):
        os.write(2, b"Note: skipped\nmine\n")
        assert capfd.readouterr().err == ""
        os.write(2, b"Note: again\nno end")
    assert capfd.readouterr().err == "mine\nno end"


def test_an_error_inside_brings_stderr_back(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="inside"), dropped_from_stderr(re.compile(rb"Note: ")):
        raise ValueError("inside")
    os.write(2, b"Note: after\n")
    assert capfd.readouterr().err == "Note: after\n"
