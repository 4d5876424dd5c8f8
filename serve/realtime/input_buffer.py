"""Sound that was appended and is not committed yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omniport.runtime import Turn
from omniport.runtime.errors import MediaError

Floats = NDArray[np.float32]


class InputBuffer:
    """Goes into a turn of the runtime as it comes, while there is no reply; else it waits.

    Belongs to the session's computing thread, but for ``add``, ``seconds`` and ``waiting``.

    Args:
        new_turn: begins a turn. most: seconds of sound.

    Attributes:
        seconds: of sound.
    """

    def __init__(self, new_turn: Callable[[], Turn], most: float) -> None:
        self._new_turn, self._most = new_turn, most
        self.seconds = 0.0
        self._pieces: list[tuple[Floats, int]] = []
        self._frames: list[tuple[Any, float, str]] = []
        self._last_frame = -1.0
        self._pushed = self._shown = 0
        self._turn: Turn | None = None

    @property
    def sound(self) -> tuple[Floats, int]:
        """All of it, and its rate."""
        return np.concatenate([samples for samples, _ in self._pieces]), self._pieces[0][1]

    def add(self, samples: Floats, rate: int) -> None:
        """More sound.

        Raises:
            MediaError: too much, or of another rate.
        """
        if self._pieces and self._pieces[0][1] != rate:
            raise MediaError(f"sound at {rate} Hz follows sound at {self._pieces[0][1]} Hz; clear the buffer before")
        if self.seconds + len(samples) / rate > self._most:
            raise MediaError(f"the buffer would hold more than {self._most:g} s of sound; commit it before")
        self._pieces.append((samples, rate))
        self.seconds += len(samples) / rate

    @property
    def pictures(self) -> list[tuple[str, float]]:
        """Base64 and seconds of each picture."""
        return [(image, seconds) for _, seconds, image in self._frames]

    def show(self, picture: Any, seconds: float | None, image: str) -> None:
        """A picture, on the clock of the sound; without a time it is shown now. Before any sound, the last counts.

        ``image``: its base64.
        """
        if not self._pieces:
            self._frames, seconds = [], 0.0
        elif seconds is None:
            seconds = self.seconds
        elif seconds <= self._last_frame:
            return
        self._frames.append((picture, seconds, image))
        self._last_frame = seconds

    @property
    def waiting(self) -> float:
        """Seconds of sound that ``advance`` would push."""
        return sum(len(samples) / rate for samples, rate in self._pieces[self._pushed :])

    def advance(self) -> None:
        """Push what waits. No reply may be under way."""
        if self._turn is None and self._pieces:
            self._turn = self._new_turn()
        while self._turn is not None and self._pushed < len(self._pieces):
            self._pushed += 1
            self._turn.push_audio(*self._pieces[self._pushed - 1])
        while self._turn is not None and self._shown < len(self._frames):
            self._shown += 1
            self._turn.push_frame(*self._frames[self._shown - 1][:2])

    def suspend(self) -> None:
        """Leave the conversation to a reply; ``advance`` pushes all of it again afterwards."""
        turn, self._turn = self._turn, None
        self._pushed = self._shown = 0
        if turn is not None:
            turn.cancel()

    def take(self) -> Turn:
        """The turn with all of the sound; the buffer is empty then."""
        try:
            self.advance()
            assert self._turn is not None
            turn, self._turn = self._turn, None
        finally:
            self.clear()
        return turn

    def message(self) -> dict[str, Any]:
        """All of it as a message of a user, for while a reply is made, beside which there is no turn.

        So pictures stand before the sound, and not in it.
        """
        pictures = [{"type": "image", "image": picture} for picture, _, _ in self._frames]
        return {"role": "user", "content": [*pictures, {"type": "audio", "audio": self.sound}]}

    def clear(self) -> None:
        """Forget the sound."""
        self.suspend()
        self._pieces, self._frames, self._last_frame, self.seconds = [], [], -1.0, 0.0
