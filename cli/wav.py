"""Write speech to a WAV file as it streams, so that only a finished file ever carries the asked-for name."""

from __future__ import annotations

import os
import wave
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["WavWriter"]


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
        self._part = path.with_name(f".{path.name}.{os.getpid()}.part")
        self._wave: wave.Wave_write | None = None

    def __enter__(self) -> WavWriter:
        if self.path.is_dir():
            raise self._error("it is a folder")
        try:
            # the wave module opens a path and leaks it when the header fails: an open file is ours to close
            self._file = open(self._part, "wb")
        except OSError as error:
            raise self._error(error.strerror or str(error)) from error
        self._wave = wave.open(self._file, "wb")
        self._wave.setnchannels(1)
        self._wave.setsampwidth(2)
        self._wave.setframerate(self.sample_rate)
        return self

    def write(self, samples: NDArray[np.float32]) -> None:
        """Append float32 [n] samples; values beyond -1..1 are clipped."""
        import numpy as np

        assert self._wave is not None, "write() outside the with block"
        pcm = np.round(np.clip(samples, -1.0, 1.0) * 32767.0).astype("<i2")
        try:
            self._wave.writeframesraw(pcm.tobytes())
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
        assert self._wave is not None
        try:
            if keep and self.samples == 0:
                self._wave.writeframesraw(b"")  # the header is written with the first frames
            self._wave.close()
            self._file.close()
            if keep:
                self._part.replace(self.path)
        finally:
            self._file.close()
            self._part.unlink(missing_ok=True)

    def _error(self, reason: str) -> Exception:
        from omniport.runtime.errors import UsageError

        return UsageError(f"cannot write {self.path}: {reason}; give a file name in an existing, writable folder")
