"""Write speech to a WAV file as it streams; the file gets its name only when it is complete."""

from __future__ import annotations

import io
import wave
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from omniport.runtime.system.files import output, writing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


#: sample count of a header whose lengths are to be ignored: near the most that 32 bits of bytes hold
_UNKNOWN = 0x7FFFFF00
_OTHER_FORMATS = frozenset({".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac", ".webm", ".mp4"})


class WavWriter:
    """PCM16 mono WAV that takes its place at ``path`` when the ``with`` block ends well.

    When the block raises, whatever was at ``path`` before is untouched. A pipe or a device is written to as sound
    arrives, under a header without lengths.

    Args:
        path: the file to make; its folder must exist.
        sample_rate: samples per second.

    Raises:
        UsageError: on entry, while writing or at the end, when the file cannot be written, or when its name promises
            another format.
    """

    def __init__(self, path: Path, sample_rate: int) -> None:
        self.path = path
        self.sample_rate = sample_rate
        self.samples = 0
        self._stack = ExitStack()
        self._file: BinaryIO | None = None

    def __enter__(self) -> WavWriter:
        refuse_other_format(self.path)
        self._file = self._stack.enter_context(output(self.path))
        # the true count comes at the end, where that can be written
        self._write(_header(self.sample_rate, 0 if self._file.seekable() else _UNKNOWN))
        return self

    def write(self, samples: NDArray[np.float32]) -> None:
        """Append float32 [n] samples; values beyond -1..1 are clipped."""
        import numpy as np

        pcm = np.round(np.clip(samples, -1.0, 1.0) * 32767.0).astype("<i2")
        self._write(pcm.tobytes())
        self.samples += int(pcm.size)

    def _write(self, data: bytes) -> None:
        assert self._file is not None, "write() outside the with block"
        with writing(self.path):
            self._file.write(data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        with ExitStack() as stack:
            # what ends the block decides whether the file takes its place
            stack.push(self._stack.__exit__ if kind is None else lambda *_: self._stack.__exit__(kind, error, trace))
            if kind is None and self._file.seekable():
                with writing(self.path):
                    self._file.seek(0)
                    self._file.write(_header(self.sample_rate, self.samples))


def refuse_other_format(path: Path) -> None:
    """UsageError when a file's name says that it holds compressed sound: what is written is WAV."""
    if path.suffix.lower() in _OTHER_FORMATS:
        from omniport.runtime.errors import UsageError

        raise UsageError(f"cannot write {path}: speech is written as WAV; name a .wav file and convert it")


def _header(sample_rate: int, samples: int) -> bytes:
    """The bytes before the samples. Made in memory: the wave module retries a failed write when it is collected."""
    memory = io.BytesIO()
    with wave.open(memory, "wb") as made:
        made.setnchannels(1)
        made.setsampwidth(2)
        made.setframerate(sample_rate)
        made.setnframes(samples)
        made.writeframesraw(b"")
        header = memory.getvalue()  # closing would set the length to what was written here: nothing
    return header
