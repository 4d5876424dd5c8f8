"""Make a small calibration set: texts, drawn pictures, voice-like sounds, a clip with sound.

A first run needs no data with it. For a checkpoint that is to be used, bring conversations like those it will hold.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omniport.export.models.signals import RATE, picture, voice
from omniport.runtime.errors import UsageError
from omniport.runtime.media.source import require

_FPS = 5


def write_samples(folder: Path) -> Path:
    """Write ``calib.jsonl`` and its media to ``folder``; returns the file. The same bytes on every call.

    Raises:
        UsageError: the folder holds something already, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not an empty folder: name a new one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sound(folder / "greeting.wav", 2.4, 0.0)
        _sound(folder / "question.wav", 4.1, 3.0)
        _still(folder / "wide.png", 196, 336, 0.1)
        _still(folder / "tall.png", 280, 168, 0.8)
        _clip(folder / "clip.mp4", 3.0)
        path = folder / "calib.jsonl"
        path.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in _entries()), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error}. Choose a folder that can be written to") from error
    return path


def _entries() -> list[dict[str, Any]]:
    """What is asked and answered: every modality alone and mixed, some languages, digits, code, a second turn."""
    return [
        _entry("It is a disc over striped ground.", _image("wide.png"), "What is in this picture?"),
        _entry("Hello! Yes, I can hear you well. What would you like to know?", _audio("greeting.wav")),
        _entry("A red disc moves from left to right while somebody speaks.", _video("clip.mp4"), "What happens?"),
        _entry(
            "Tides come from the pull of the moon and, less, of the sun: the sea rises on the near side and on the far "
            "side of the earth, twice a day in most places.",
            "Why are there tides?",
        ),
        _entry(
            "The square is dark blue, and the voice asks about its colour.", _audio("question.wav"), _image("tall.png")
        ),
        _entry("Gern. Zum Beispiel: 17 mal 23 ist 391, und die Hälfte davon 195,5.", "Rechne mir etwas vor, bitte."),
        _entry("def area(w, h):\n    return w * h", "Write a function for the area of a rectangle, nothing else."),
        _entry("好的。今天天气很好，我们可以去公园散步。", "请用中文回答：今天做什么好？"),  # noqa: RUF001
        {
            "messages": [
                {"role": "user", "content": [_part("Look at this, please."), _image("tall.png")]},
                {"role": "assistant", "content": "I see a disc, a square and stripes."},
                {"role": "user", "content": "Which of them is the largest?"},
            ],
            "reply": "The stripes: they fill the whole lower third.",
        },
    ]


def _entry(reply: str, *parts: str | dict[str, Any]) -> dict[str, Any]:
    content = [_part(part) if isinstance(part, str) else part for part in parts]
    return {"messages": [{"role": "user", "content": content}], "reply": reply}


def _part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _image(name: str) -> dict[str, Any]:
    return {"type": "image", "image": name}


def _audio(name: str) -> dict[str, Any]:
    return {"type": "audio", "audio": name}


def _video(name: str) -> dict[str, Any]:
    return {"type": "video", "video": name, "use_audio": True}


def _sound(path: Path, seconds: float, skip: float) -> None:
    """Voice-like sound from ``skip`` on, so that two files differ."""
    require("soundfile").write(path, _voice(seconds, skip), RATE, subtype="PCM_16")


def _still(path: Path, height: int, width: int, shift: float) -> None:
    require("PIL.Image").fromarray(picture(height, width, shift)).save(path)


def _clip(path: Path, seconds: float) -> None:
    """A disc that crosses the picture, with sound (MPEG-4, AAC)."""
    av = require("av")
    # no encoder versions or dates in the file; one thread, because some encoders cut their work by threads
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as out:
        track: Any = out.add_stream("mpeg4", rate=_FPS, options={"flags": "+bitexact", "threads": "1"})
        track.height, track.width, track.pix_fmt = 112, 168, "yuv420p"
        sound: Any = out.add_stream("aac", rate=RATE, layout="mono", options={"flags": "+bitexact"})
        count = round(seconds * _FPS)
        for i in range(count):
            out.mux(track.encode(av.VideoFrame.from_ndarray(picture(112, 168, i / count), format="rgb24")))
        out.mux(track.encode())
        block = av.AudioFrame.from_ndarray(_voice(seconds, 1.0)[None], format="fltp", layout="mono")
        block.sample_rate, block.pts = RATE, 0
        out.mux(sound.encode(block))
        out.mux(sound.encode())


def _voice(seconds: float, skip: float) -> NDArray[np.float32]:
    return voice(skip + seconds)[round(skip * RATE) :]
