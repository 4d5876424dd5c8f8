"""Write sample media to a folder: a spoken question, a drawn picture, a short clip with sound.

Usage: python -m scripts.sample_media OUT

Nothing is downloaded. Speech comes from espeak-ng where it is installed, else from a vowel-like synthesiser.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

QUESTION = "What shapes do you see in this picture?"
CLIP_SECONDS = 5
CLIP_FPS = 10
CLIP_SIZE = (224, 168)  # width, height
RATE = 16000


def make_media(out: Path) -> dict[str, Path]:
    """Write question.wav, picture.png and clip.mp4; returns their paths by name (audio, image, video)."""
    out.mkdir(parents=True, exist_ok=True)
    paths = {"audio": out / "question.wav", "image": out / "picture.png", "video": out / "clip.mp4"}
    speak(QUESTION, paths["audio"])
    picture(336, 252).save(paths["image"])
    clip(paths["video"])
    return paths


def speak(text: str, path: Path) -> None:
    """Say ``text`` into a mono WAV file."""
    program = shutil.which("espeak-ng")
    if program is not None:
        subprocess.run([program, "-s", "150", "-w", str(path), text], check=True, capture_output=True)
        return
    import soundfile  # type: ignore[import-untyped]

    soundfile.write(path, vowels(2.5), RATE, subtype="PCM_16")


def vowels(seconds: float) -> NDArray[np.float32]:
    """Speech-like sound, float32 [n] at 16 kHz: a gliding harmonic voice through three formants, in syllables."""
    time = np.arange(round(seconds * RATE)) / RATE
    pitch = 120 + 25 * np.sin(2 * np.pi * 0.4 * time)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    first = 500 + 250 * np.sin(2 * np.pi * 0.9 * time)  # opening and closing of the mouth
    voice = np.zeros_like(time)
    for harmonic in range(1, 30):
        frequency = harmonic * pitch
        gain = sum(np.exp(-(((frequency - centre) / 120) ** 2)) for centre in (first, 1500.0, 2500.0))
        voice += gain * np.sin(harmonic * phase) / harmonic
    syllables = np.clip(np.sin(2 * np.pi * 2.2 * time), 0, 1) ** 0.5
    voice *= syllables
    return np.asarray(0.5 * voice / np.abs(voice).max(), np.float32)


def picture(width: int, height: int, shift: float = 0.0) -> Any:
    """A PIL image of a sky with a red circle, a blue square and a green triangle; ``shift`` (0..1) moves the circle."""
    from PIL import Image, ImageDraw

    ramp = np.linspace(200, 255, height, dtype=np.uint8)[:, None].repeat(width, 1)
    image = Image.fromarray(np.stack([ramp - 40, ramp - 15, ramp], axis=-1))
    draw = ImageDraw.Draw(image)
    unit = min(width, height) / 6
    left = unit / 2 + shift * (width - 3 * unit)
    draw.ellipse((left, unit / 2, left + 2 * unit, unit / 2 + 2 * unit), fill=(220, 40, 40))
    draw.rectangle((unit, 3.5 * unit, 2.5 * unit, 5 * unit), fill=(40, 70, 200))
    draw.polygon([(4 * unit, 5 * unit), (6 * unit, 5 * unit), (5 * unit, 3 * unit)], fill=(30, 150, 60))
    return image


def clip(path: Path) -> None:
    """Five seconds of the circle crossing the picture, with speech-like sound (MPEG-4, AAC)."""
    import av

    width, height = CLIP_SIZE
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=CLIP_FPS)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        audio = container.add_stream("aac", rate=RATE, layout="mono")
        count = CLIP_SECONDS * CLIP_FPS
        for index in range(count):
            pixels = np.asarray(picture(width, height, index / count))
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode())
        sound = av.AudioFrame.from_ndarray(vowels(CLIP_SECONDS)[None], format="fltp", layout="mono")
        sound.sample_rate = RATE
        sound.pts = 0
        container.mux(audio.encode(sound))
        container.mux(audio.encode())


def main() -> None:
    """Write the media and print their paths."""
    parser = argparse.ArgumentParser(description="Write a spoken question, a picture and a clip with sound.")
    parser.add_argument("out", type=Path, help="folder to write to")
    for path in make_media(parser.parse_args().out).values():
        print(path)


if __name__ == "__main__":
    main()
