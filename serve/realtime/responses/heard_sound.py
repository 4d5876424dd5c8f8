"""How much of a reply's speech its user has heard."""

from __future__ import annotations

import time


class Playback:
    """What the client says; else an estimate, as if what was sent were played at once and without a break.

    Attributes:
        sent: seconds of sound.
    """

    def __init__(self) -> None:
        self.sent = 0.0
        self._end = 0.0  # when what was sent has been played, were it played at once
        self._told: float | None = None

    def written(self, seconds: float) -> None:
        """So much more was sent."""
        self.sent += seconds
        self._end = max(self._end, time.monotonic()) + seconds

    def played(self, seconds: float) -> None:
        """The client has played so much in all."""
        self._told = seconds

    @property
    def heard(self) -> float:
        """Seconds."""
        if self._told is not None:
            return min(self._told, self.sent)
        return max(0.0, self.sent - max(0.0, self._end - time.monotonic()))

    @property
    def over(self) -> bool:
        """Whether all that was sent must have been played by now."""
        return time.monotonic() >= self._end
