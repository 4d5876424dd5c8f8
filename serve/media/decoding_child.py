"""The process in which what clients send is decoded: it may crash, hang or run out of memory, and nobody else does.

    python -m omniport.serve.media.decoding_child BYTES

It reads requests from stdin and writes answers to stdout, see ``decoding_messages``, until stdin ends. ``BYTES``:
memory at most.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import IO, Any

import numpy as np
from omniport.runtime.errors import MediaError
from omniport.runtime.media.audio import load_audio, open_av
from omniport.runtime.media.image import load_image, picture_size
from omniport.runtime.media.limits import VisionLimits
from omniport.runtime.media.source import parsing, require, stream
from omniport.runtime.media.video import open_video

from . import decoding_messages as messages

#: seconds that the server gives up sooner than the child ends itself
_MARGIN = 2.0


def main() -> None:
    """Answer until nobody asks any more."""
    memory = int(sys.argv[1])
    requests, answers = _take_pipes()
    for package in ("av", "PIL.Image", "soundfile", "soxr"):
        with suppress(MediaError):  # told when it is needed
            require(package)
    _confine(memory)
    while True:
        try:
            request = messages.receive(requests, messages.Request)
        except messages.NotAnAnswer:
            return
        _end_after(request.seconds + _MARGIN)
        _answer(answers, request.asked, bytes(messages.exactly(requests, request.size)), memory)
        _end_after(0.0)


def _take_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """The two pipes; whatever a library prints goes nowhere."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nowhere, number)
    os.close(nowhere)
    return requests, answers


def _confine(memory: int) -> None:
    """Limits that the system keeps; where it has none, that of time is the server's alone."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")  # where memory ends for all, this process goes first
    if sys.platform == "win32":
        return
    import resource

    # What mpg123 says of a damaged file goes to a small temporary one, see ``dropped_from_stderr``.
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 1 << 20, resource.RLIMIT_DATA: memory}
    # Of the address space threads and files take much that is never memory.
    limits[resource.RLIMIT_AS] = memory + (4 << 30)
    for name, most in limits.items():
        with suppress(OSError, ValueError):  # a lower one is set already
            resource.setrlimit(name, (most, most))


def _end_after(seconds: float) -> None:
    """Let the system end this process, whatever it does then; 0: not any more."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _answer(answers: IO[bytes], asked: messages.Asked, data: bytes, memory: int) -> None:
    try:
        made = decode(asked, data)
    except MemoryError:
        made = messages.Refused(f"it takes more than {memory >> 20} MiB to read; send it smaller or shorter")
    except MediaError as error:
        made = messages.Refused(str(error)[: messages.MAX_PROBLEM])
    except Exception as error:  # noqa: BLE001 - whatever it is, the next one is read
        made = messages.Refused(f"it cannot be read: {type(error).__name__}; convert it or check the file")
    if isinstance(made, np.ndarray):
        array = np.ascontiguousarray(made)
        told = messages.Decoded(array.dtype.str, list(array.shape))  # type: ignore[arg-type]
        messages.send(answers, told, array.reshape(-1).view(np.uint8).data)
    else:
        messages.send(answers, made)


def decode(asked: messages.Asked, data: bytes) -> Any:
    """An answer, or the array that one is.

    Raises:
        MediaError: it cannot be read, or is beyond a limit.
    """
    if isinstance(asked, messages.Sound):
        return load_audio(data, asked.rate, max_seconds=asked.max_seconds)
    if isinstance(asked, messages.Picture):
        height, width = picture_size(data)
        if height * width > asked.max_pixels:
            most = asked.max_pixels / 1e6
            raise MediaError(f"the picture has {width}x{height} pixels; at most {most:g} million are taken: shrink it")
        return load_image(data)
    if isinstance(asked, messages.OpenVideo):
        return _open_video(data, asked.max_seconds)
    video = open_video(data)
    if isinstance(asked, messages.Frames):
        return video.read(np.asarray(asked.indices, np.int64), asked.size)
    limits = VisionLimits(video_start=asked.start, video_end=asked.end)
    sound = video.sound(limits, asked.max_seconds)
    return messages.Nothing() if sound is None else sound


def _open_video(data: bytes, most: float) -> messages.Opened:
    """The length is what the container says; however long it is, no more frames are shown than the model takes."""
    problem = "the video cannot be read", "send mp4, webm, mov or another format that FFmpeg reads"
    with parsing(*problem), stream(data) as opened, open_av(opened) as container:
        seconds = (container.duration or 0) / 1e6
    if seconds > most:
        raise MediaError(f"the video lasts {seconds:.0f} s; at most {most:g} s are taken: cut it")
    video = open_video(data)
    assert video.rate is not None, "a file has a rate"
    return messages.Opened(video.frames, video.height, video.width, video.rate)


if __name__ == "__main__":
    main()
