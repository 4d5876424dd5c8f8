"""Microphone and loudspeaker through PortAudio (the package ``sounddevice``)."""

from __future__ import annotations

import importlib
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .playback import Playback

if TYPE_CHECKING:
    from omniport.runtime.live.echo import EchoCanceller

    from .playback import Samples

FILES = "; or talk through files: --input-wav question.wav --output-wav reply.wav"
#: seconds for which the microphone's reader waits at most, so that a key is seen
PATIENCE = 0.1
#: pieces that a loudspeaker remembers for a microphone: a second or more, and little where nobody asks for them
KEPT = 256


def sounddevice() -> Any:
    """The package.

    Raises:
        UsageError: it, or PortAudio, is not installed.
    """
    from omniport.runtime.errors import UsageError

    try:
        return importlib.import_module("sounddevice")
    except ImportError as error:
        raise UsageError(
            f"microphone and loudspeaker need the 'sounddevice' package, which does not load here ({error}); "
            f"run: pip install 'omniport[live]'{FILES}"
        ) from error
    except OSError as error:  # the wheels for Linux do not bring PortAudio
        raise UsageError(
            f"microphone and loudspeaker need the PortAudio library, which was not found ({error}); on Debian and "
            f"Ubuntu run: sudo apt install libportaudio2{FILES}"
        ) from error


def find(device: str | None, kind: str) -> dict[str, Any]:
    """What PortAudio says of a device.

    Args:
        device: its number or a part of its name; the system's own if None.
        kind: ``input`` or ``output``.

    Raises:
        UsageError: there is none.
    """
    from omniport.runtime.errors import UsageError

    sd = sounddevice()
    try:
        found: dict[str, Any] = sd.query_devices(_number(device), kind)
    except (sd.PortAudioError, ValueError) as error:
        name = "microphone" if kind == "input" else "loudspeaker"
        wanted = f"no {name} was found" if device is None else f"no {name} is called {device!r}"
        raise UsageError(
            f"{wanted} ({str(error).strip() or 'no device'}); `python -m sounddevice` lists them: connect one, or "
            f"choose with --{kind}-device{FILES}"
        ) from error
    return found


def _number(device: str | None) -> int | str | None:
    return int(device) if device is not None and device.isdecimal() else device


def _open(kind: str, device: str | None, sample_rate: float, callback: Any) -> Any:
    from omniport.runtime.errors import UsageError

    sd = sounddevice()
    index = find(device, kind)["index"]
    make = sd.InputStream if kind == "input" else sd.OutputStream
    try:
        return make(samplerate=sample_rate, device=index, channels=1, dtype="float32", callback=callback)
    except sd.PortAudioError as error:
        raise UsageError(
            f"the {kind} device {index} does not open at {sample_rate:g} Hz ({error}); `python -m sounddevice` lists "
            f"devices, --{kind}-device chooses one, best one that resamples, as default or pulse do{FILES}"
        ) from error


class DeviceMicrophone:
    """Records from a microphone while the ``with`` block lasts: at its own rate, or at 16 kHz without a loudspeaker's
    echo.

    Raises:
        UsageError: no package, no library or no device.
    """

    def __init__(self, device: str | None = None) -> None:
        self.sample_rate = float(find(device, "input")["default_samplerate"])
        self._queue: queue.SimpleQueue[tuple[Samples, list[Samples]]] = queue.SimpleQueue()
        self._speaker: DeviceLoudspeaker | None = None
        self._canceller: EchoCanceller | None = None
        self._stopped = threading.Event()
        self._stream = _open("input", device, self.sample_rate, self._take)

    def __enter__(self) -> DeviceMicrophone:
        self._stream.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def cancel_echo(self, speaker: DeviceLoudspeaker) -> None:
        """Take out of ``blocks``, which did not begin, what a loudspeaker plays that was not started.

        Raises:
            UsageError: ``pywebrtc-audio`` is not installed.
        """
        from omniport.runtime.live.echo import RATE, EchoCanceller

        latency = float(self._stream.latency) + speaker.latency
        self._canceller = EchoCanceller(self.sample_rate, speaker.sample_rate, delay_ms=1000 * latency)
        self._speaker, self.sample_rate = speaker, float(RATE)

    def blocks(self) -> Iterator[Samples]:
        """As ``Microphone.blocks``.

        Raises:
            UsageError: the device has stopped, for example because it was unplugged.
        """
        import numpy as np
        from omniport.runtime.errors import UsageError

        while not self._stopped.is_set():
            try:
                recorded, played = self._queue.get(timeout=PATIENCE)
            except queue.Empty:
                if not self._stream.active:
                    raise UsageError("the microphone has stopped; connect it again, or choose another one") from None
                yield np.zeros(0, np.float32)
                continue
            if self._canceller is None:
                yield recorded
            else:
                yield self._canceller.clean(recorded, np.concatenate([np.zeros(0, np.float32), *played]))

    def stop(self) -> None:
        self._stopped.set()

    def _take(self, block: Any, frames: int, timing: Any, status: Any) -> None:
        """PortAudio's thread: no computing here."""
        self._queue.put((block[:, 0].copy(), [] if self._speaker is None else self._speaker.given()))


class DeviceLoudspeaker:
    """Plays on a loudspeaker while the ``with`` block lasts.

    Raises:
        UsageError: no package, no library or no device.
    """

    def __init__(self, sample_rate: int, device: str | None = None) -> None:
        self.sample_rate = sample_rate
        self._given: deque[Samples] = deque(maxlen=KEPT)
        self._playback = Playback()
        self._stream = _open("output", device, sample_rate, self._give)
        self.begin, self.play, self.stop = self._playback.begin, self._playback.play, self._playback.stop

    def __enter__(self) -> DeviceLoudspeaker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def start(self) -> None:
        self._stream.start()

    @property
    def latency(self) -> float:
        """Seconds from a sample's way to the device to its sound, as the device says."""
        return float(self._stream.latency)

    def given(self) -> list[Samples]:
        """What the device was given since the last call, silence included; from the microphone's thread."""
        given = []
        while self._given:
            given.append(self._given.popleft())
        return given

    def heard(self) -> float:
        """As ``Loudspeaker.heard``: what the device has taken, less what lies in its own buffer."""
        taken = self._playback.played / self.sample_rate
        return max(0.0, taken - self.latency) if self._playback.waiting else taken

    def drain(self) -> None:
        while self._playback.waiting and self._stream.active:
            time.sleep(0.02)
        time.sleep(self.latency)

    def _give(self, block: Any, frames: int, timing: Any, status: Any) -> None:
        """PortAudio's thread."""
        samples = self._playback.take(frames)
        block[:, 0] = samples
        self._given.append(samples)
