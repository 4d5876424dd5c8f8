"""Decoders of damaged files write nothing to stderr, and nothing of others is lost meanwhile."""

from __future__ import annotations

import io
import os
import random
import re
from collections.abc import Callable

import numpy as np
import pytest
import soundfile
from omniport.runtime.errors import MediaError
from omniport.runtime.media.audio import load_audio
from omniport.runtime.media.image import load_image
from omniport.runtime.system.stderr import dropped_from_stderr
from PIL import Image


def mp3() -> bytes:
    content = io.BytesIO()
    soundfile.write(content, 0.3 * np.sin(np.arange(32000) / 9), 16000, format="MP3")
    return content.getvalue()


def tiff() -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
    Image.fromarray(pixels).save(content, "TIFF")
    return content.getvalue()


@pytest.mark.parametrize(("whole", "load"), [(mp3(), load_audio), (tiff(), load_image)], ids=["mp3", "tiff"])
def test_damaged_files(whole: bytes, load: Callable[[bytes], object], capfd: pytest.CaptureFixture[str]) -> None:
    draw, refused = random.Random(0), 0
    load(whole)
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(draw.choice([1, 5, 50])):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        if draw.random() < 0.3:
            damaged = damaged[: draw.randrange(10, len(damaged))]
        try:
            load(bytes(damaged))
        except MediaError:
            refused += 1
    assert refused > 5
    assert capfd.readouterr() == ("", "")


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
