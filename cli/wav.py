"""Write speech to a WAV file as it streams; the file gets its name only when it is complete."""

from __future__ import annotations

import io
import wave
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from omniport.runtime.system.files import partial_path, put_in_place

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from omniport.runtime.errors import UsageError


class WavWriter:
    """PCM16 mono WAV, written next to ``path`` and renamed onto it when the ``with`` block ends well.

    When the block raises, the partial file is removed and whatever was at ``path`` before is untouched.

    Args:
        path: the file to make; its folder must exist.
        sample_rate: samples per second.

    Raises:
        UsageError: on entry, while writing or at the end, when the file cannot be written.
    """

    def __init__(self, path: Path, sample_rate: int) -> None:
        self.path = path
        self.sample_rate = sample_rate
        self.samples = 0
        self._partial = partial_path(path)
        self._file: BinaryIO | None = None

    def __enter__(self) -> WavWriter:
        if self.path.is_dir():
            raise self._error("it is a folder")
        try:
            self._file = open(self._partial, "wb")
            self._file.write(_header(self.sample_rate, 0))  # the true one comes at the end
        except OSError as error:
            raise self._error(error.strerror or str(error)) from error
        return self

    def write(self, samples: NDArray[np.float32]) -> None:
        """Append float32 [n] samples; values beyond -1..1 are clipped."""
        import numpy as np

        assert self._file is not None, "write() outside the with block"
        pcm = np.round(np.clip(samples, -1.0, 1.0) * 32767.0).astype("<i2")
        try:
            self._file.write(pcm.tobytes())
        except OSError as error:
            raise self._error(error.strerror or str(error)) from error
        self.samples += int(pcm.size)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._finish(keep=kind is None)
        except OSError as failure:
            if kind is None:  # the block's own exception says more than a failed close
                raise self._error(failure.strerror or str(failure)) from failure

    def _finish(self, keep: bool) -> None:
        assert self._file is not None
        try:
            with self._file as file:
                if keep:
                    file.seek(0)
                    file.write(_header(self.sample_rate, self.samples))
            if keep:
                put_in_place(self._partial, self.path)
        finally:
            self._partial.unlink(missing_ok=True)

    def _error(self, reason: str) -> UsageError:
        from omniport.runtime.errors import UsageError

        return UsageError(f"cannot write {self.path}: {reason}; give a file name in an existing, writable folder")


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
