"""Media and text that are refused cost little memory before they are: peaks of a process of its own."""

from __future__ import annotations

import io
import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from support.bundles import make_bundle
from support.interpreters import in_fresh_python

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc")
MEGABYTES = 300

#: prints, for each message of stdin, what refused it and by how many MB the peak rose over what was there before
PROBE = """
import json, sys
from pathlib import Path
import numpy as np
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import UserError
from omniport.runtime.prompt.builder import build_prompt
from omniport.runtime.prompt.tokenizer import TextCodec

bundle = Bundle.open(Path(sys.argv[1]))
codec = TextCodec.from_file(bundle.path(bundle.manifest.tokenizer_file), bundle.manifest.tokens)

def memory(field):
    status = Path("/proc/self/status").read_text()
    return int(status.split(field + ":")[1].split()[0]) / 1024

def ask(part):
    try:
        build_prompt([{"role": "user", "content": [part]}], bundle.manifest, codec)
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return "taken"

ask({"type": "image", "image": np.zeros((56, 56, 3), np.uint8)})
for line in sys.stdin:
    part = json.loads(line)
    if part.get("text"):
        part["text"] *= 1_700_000
    idle = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    verdict = ask(part)
    print(json.dumps([verdict, memory("VmHWM") - idle]))
"""


def hole(path: Path) -> dict[str, object]:
    """An hour that has two sounds of 10 ms."""
    with av.open(str(path), "w", format="matroska") as file:
        stream = file.add_stream("pcm_s16le", rate=192000, layout="mono")
        for second in (0, 3590):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1920), np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts = 192000, second * 192000
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return {"type": "audio", "audio": str(path)}


def silence(path: Path, rate: int, seconds: int, channels: int = 1) -> dict[str, object]:
    zeros = np.zeros((rate, channels), np.int16)
    with soundfile.SoundFile(str(path), "w", rate, channels, format=path.suffix[1:].upper()) as file:
        for _ in range(seconds):
            file.write(zeros)
    return {"type": "audio", "audio": str(path)}


def film(path: Path) -> dict[str, object]:
    """Many large frames of one colour: few bytes each."""
    with av.open(str(path), "w", format="matroska") as file:
        stream = file.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 1440, 1080, "yuv420p", 250
        frame = av.VideoFrame(1440, 1080, "yuv420p")
        for plane in frame.planes:
            plane.update(b"\x80" * plane.buffer_size)
        for number in range(120):
            frame.pts = number
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return {"type": "video", "video": str(path)}


def picture(path: Path) -> dict[str, object]:
    """9,400 x 9,400 pixels of one colour: few enough for Pillow, 350 MB of them."""
    rows = zlib.compressobj(1)
    body = b"".join(rows.compress(bytes(3 * 9400 + 1) * 100) for _ in range(94)) + rows.flush()
    out = io.BytesIO(b"\x89PNG\r\n\x1a\n")
    out.seek(0, 2)
    header = (9400).to_bytes(4, "big") * 2 + bytes((8, 2, 0, 0, 0))
    for kind, data in ((b"IHDR", header), (b"IDAT", body), (b"IEND", b"")):
        out.write(len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big"))
    path.write_bytes(out.getvalue())
    return {"type": "image", "image": str(path)}


def test_what_is_refused_costs_little_memory(tmp_path: Path) -> None:
    cases: dict[str, Callable[[], dict[str, object]]] = {
        "hole": lambda: hole(tmp_path / "hole.mka"),
        "long": lambda: silence(tmp_path / "long.flac", 192_000, 400),
        "fast": lambda: silence(tmp_path / "fast.flac", 655_350, 60),
        "wide": lambda: silence(tmp_path / "wide.wav", 8000, 4, 1024),
        "film": lambda: film(tmp_path / "film.mkv"),
        "picture": lambda: picture(tmp_path / "picture.png"),
        "text": lambda: {"type": "text", "text": "hello world "},
    }
    bundle = make_bundle(tmp_path / "bundle")
    lines = "\n".join(json.dumps(make()) for make in cases.values())
    answers = in_fresh_python(PROBE, bundle, stdin=lines).splitlines()
    found = dict(zip(cases, map(json.loads, answers), strict=True))
    assert {name: verdict for name, (verdict, _) in found.items() if verdict == "taken" and name != "film"} == {}
    assert {name: round(risen) for name, (_, risen) in found.items() if risen > MEGABYTES} == {}, sys.version
