"""What clients send is decoded by a process that may die of it."""

from __future__ import annotations

import base64
import io
import os
import pickle
import signal
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import soundfile
from omniport.runtime.errors import MediaError
from omniport.runtime.media.audio import load_audio
from omniport.runtime.media.image import load_image
from omniport.runtime.media.limits import VisionLimits
from omniport.runtime.media.video import open_video
from omniport.serve.media.decoders import COMMAND, Decoders
from omniport.serve.media.decoding_messages import Picture, Sound
from omniport.serve.media.medium import DecodedVideo, Medium, plain_wav, read_medium
from omniport.serve.settings import Limits
from PIL import Image
from support.planted_decoder import COMMAND as PLANTED
from support.served import Served

POSIX = pytest.mark.skipif(os.name != "posix", reason="ends by signal, and limits of memory, are POSIX's")
ASKED = Picture(16_000_000)


def encoded(pixels: Any, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


@pytest.fixture(scope="module")
def noise() -> Any:
    return np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8)


@pytest.fixture
def planted() -> Iterator[Decoders]:
    made = Decoders(Limits(decode_seconds=3.0, decode_memory=1 << 30), PLANTED)
    yield made
    made.close()


@pytest.fixture(scope="module")
def decoders() -> Iterator[Decoders]:
    made = Decoders(Limits())
    made.warm()
    yield made
    made.close()


@POSIX
@pytest.mark.parametrize(
    ("file", "problem"),
    [
        (b"crash", "its decoder crashed (SIGSEGV)"),
        (b"exit", "its decoder crashed (exit code 0)"),
        (b"bomb", "it takes more than 1024 MiB"),
        (b"hang", "it took more than 3 s"),
        (b"raise", "it cannot be read: KeyError"),
    ],
    ids=lambda value: value.decode() if isinstance(value, bytes) else "",
)
def test_a_hostile_file_ends_no_more_than_its_decoder(planted: Decoders, noise: Any, file: bytes, problem: str) -> None:
    with pytest.raises(MediaError, match="it ") as caught:
        planted.decode(ASKED, file + b" " + b"x" * (3 << 20))  # more than a pipe holds
    assert problem in str(caught.value)
    assert "what it holds" not in str(caught.value)
    np.testing.assert_array_equal(planted.decode(ASKED, encoded(noise)), noise)


def record(value: Any) -> bytes:
    data = value if isinstance(value, bytes) else msgspec.msgpack.encode(value)
    return struct.pack("<I", len(data)) + data


ANSWERS = {
    "too long a record": b"\xff" * 4,
    "no record": record(b"hello"),
    "a pickle": record(pickle.dumps(print)),
    "a pickle for an array": record({"type": "decoded", "dtype": "|O", "shape": [2, 2, 3]})
    + pickle.dumps([print] * 12),
    "more than there is memory": record({"type": "decoded", "dtype": "|u1", "shape": [1 << 30, 1 << 8, 3]}),
    "more pixels than asked for": record({"type": "decoded", "dtype": "|u1", "shape": [4001, 4000, 3]}),
    "no pixel": record({"type": "decoded", "dtype": "|u1", "shape": [0, 4, 3]}),
    "less than none": record({"type": "decoded", "dtype": "|u1", "shape": [-1, -1, 3]}),
    "sound for a picture": record({"type": "decoded", "dtype": "<f4", "shape": [9]}),
    "half an array": record({"type": "decoded", "dtype": "|u1", "shape": [2, 2, 3]}) + b"half",
}


@POSIX
@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_a_decoder_that_was_taken_over_is_not_believed(planted: Decoders, noise: Any, answer: bytes) -> None:
    with pytest.raises(MediaError, match="it cannot be read"):
        planted.decode(ASKED, b"lie " + answer)
    np.testing.assert_array_equal(planted.decode(ASKED, encoded(noise)), noise)


def test_a_decoder_that_does_not_keep_its_own_time_is_ended() -> None:
    """Its alarm is what a child that was taken over takes back first."""
    silent = Decoders(Limits(decode_seconds=1.0), (sys.executable, "-c", "import time; time.sleep(600)"))
    try:
        with pytest.raises(MediaError, match="it took more than 1 s"):
            silent.decode(ASKED, b"x")
    finally:
        silent.close()


def test_what_a_library_prints_is_no_answer(planted: Decoders) -> None:
    assert planted.decode(ASKED, b"chatter").shape == (2, 2, 3)  # type: ignore[union-attr]


def test_a_decoder_has_no_key(planted: Decoders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNIPORT_API_KEY", "sk-1")
    with pytest.raises(MediaError) as caught:
        planted.decode(ASKED, b"environment")
    assert "PATH" in str(caught.value)
    assert "KEY" not in str(caught.value)


@POSIX
def test_a_decoder_that_died_meanwhile_is_replaced(planted: Decoders, noise: Any) -> None:
    planted.warm()
    (worker,) = planted._workers
    os.kill(worker._process.pid, signal.SIGKILL)
    worker._process.wait()
    np.testing.assert_array_equal(planted.decode(ASKED, encoded(noise)), noise)
    assert len(planted._workers) == 1
    assert worker not in planted._workers


@POSIX
def test_a_decoder_ends_with_its_server(noise: Any) -> None:
    """Even if it hangs: the alarm is its own. An idle one sees that its pipe has ended."""
    import subprocess

    code = (
        "import os, sys, threading, time\n"
        "from omniport.serve.media.decoders import Decoders\n"
        "from omniport.serve.media.decoding_messages import Picture\n"
        "from omniport.serve.settings import Limits\n"
        "made = Decoders(Limits(decode_seconds=0.5), sys.argv[1:])\n"
        "made.warm()\n"
        "threading.Thread(target=made.decode, args=(Picture(9), b'hang'), daemon=True).start()\n"
        "time.sleep(0.3)\n"
        "made._places.put(made._begin())\n"
        "print(*(worker._process.pid for worker in made._workers), flush=True)\n"
        "os._exit(0)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, *PLANTED], capture_output=True, text=True, timeout=60)
    numbers = [int(number) for number in ended.stdout.split()]
    assert len(numbers) == 2, ended.stderr
    due = time.monotonic() + 15
    while any(Path(f"/proc/{number}/stat").exists() for number in numbers):
        assert time.monotonic() < due
        time.sleep(0.05)


def wav(samples: Any, rate: int = 16000, subtype: str | None = "PCM_16", format: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, subtype=subtype)
    return file.getvalue()


def test_the_same_comes_out_as_without(decoders: Decoders, noise: Any) -> None:
    sound = np.random.default_rng(1).uniform(-1, 1, (9000, 2)).astype(np.float32)
    files = [wav(sound, 22050), wav(sound, 22050, "PCM_24"), wav(sound[:, 0], 48000, "FLOAT")]
    files += [wav(sound, 24000, None, format) for format in ("MP3", "FLAC", "OGG")]
    for data in files:
        read = read_medium(Medium(kind="audio", data=data), Limits(), decoders)["audio"]
        assert read[1] == 16000
        np.testing.assert_array_equal(read[0], load_audio(data))
    for data in (encoded(noise), encoded(noise, "JPEG")):
        np.testing.assert_array_equal(
            read_medium(Medium(kind="image", data=data), Limits(), decoders)["image"], load_image(data)
        )


def clip(seconds: int = 2) -> bytes:
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        video, track = container.add_stream("mpeg4", rate=4), container.add_stream("aac", rate=16000)
        video.width, video.height = 56, 84
        for i in range(4 * seconds):
            frame = av.VideoFrame.from_ndarray(np.full((84, 56, 3), 20 * i, np.uint8))
            container.mux(video.encode(frame))
        tone = (np.sin(np.arange(16000 * seconds) / 9) * 9000).astype(np.int16)
        sound = av.AudioFrame.from_ndarray(tone[None], format="s16", layout="mono")
        sound.sample_rate = 16000
        container.mux(track.encode(sound))
        container.mux(track.encode(None))
        container.mux(video.encode(None))
    return file.getvalue()


def test_a_video_is_read_alike(decoders: Decoders, served: Served) -> None:
    data, frontend = clip(), served.service.session.manifest.vision
    assert frontend is not None
    here, there = open_video(data), DecodedVideo(data, Limits(), decoders)
    assert (there.frames, there.height, there.width, there.rate) == (here.frames, here.height, here.width, here.rate)
    shown, limits = here.sample(frontend, VisionLimits()), VisionLimits()
    np.testing.assert_array_equal(there.sample(frontend, limits).indices, shown.indices)
    for size in (None, (28, 28)):
        np.testing.assert_array_equal(there.read(shown.indices, size), here.read(shown.indices, size))
    there_sound, here_sound = there.sound(limits), here.sound(limits)
    assert there_sound is not None
    np.testing.assert_array_equal(there_sound, here_sound)


def test_plain_wav_needs_no_decoder() -> None:
    class None_:
        def decode(self, asked: Sound, data: bytes) -> None:
            raise AssertionError("a decoder was asked")

    whole = wav(np.zeros(100))
    read = read_medium(Medium(kind="audio", data=whole), Limits(), None_())  # type: ignore[arg-type]
    assert len(read["audio"][0]) == 100
    others = {
        "cut off": whole[:-1],
        "24 bits": wav(np.zeros(100), subtype="PCM_24"),
        "no length": whole.replace(struct.pack("<I", 200), b"\xff" * 4),
        "no rate": whole[:24] + bytes(4) + whole[28:],
        "no channel": whole[:22] + bytes(2) + whole[24:],
        "nothing": b"",
        "head": whole[:43],
        "long form": whole[:16] + b"\xff\xff\xff\xff" + whole[20:],
        "flac": b"fLaC" + bytes(60),
    }
    for name, data in others.items():
        assert plain_wav(data) is None, name


def test_the_next_client_is_served(served: Served, monkeypatch: pytest.MonkeyPatch, noise: Any) -> None:
    """The whole way: 400 with the path of the part, and no harm to others."""
    decoders = Decoders(Limits(decode_seconds=3.0), PLANTED)
    monkeypatch.setattr(served.service, "decoders", decoders)
    http = served.http()

    def ask(data: bytes) -> Any:
        url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        content = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": url}}]
        return http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]})

    for word in (b"crash", b"hang", b"bomb"):
        told = ask(word)
        error = told.json()["error"]
        assert (told.status_code, error["code"]) == (400, "invalid_value")
        assert error["param"] == "messages[0].content[1].image_url"
    assert ask(encoded(noise)).status_code == 200
    assert served.quiet()
    decoders.close()


def test_the_command_is_the_module() -> None:
    assert COMMAND[1:] == ("-m", "omniport.serve.media.decoding_child")
