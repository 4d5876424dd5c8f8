"""What the model was given for an item, where what clients read back of it does not tell that."""

from __future__ import annotations

from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from .wire.wire_sound import WireFormat


class Written(Struct, tag=True):
    """An item that the client has created, as it came. ``format``: of sound in it."""

    item: dict[str, Any]
    format: WireFormat


class Spoken(Struct, tag=True):
    """What was said: 16-bit samples at ``rate``, and base64 of pictures with their seconds."""

    sound: bytes
    rate: int
    pictures: list[tuple[str, float]]

    @classmethod
    def of(cls, samples: NDArray[np.float32], rate: int, pictures: list[tuple[str, float]]) -> Spoken:
        """From samples [n] in -1..1."""
        return cls(np.round(np.clip(samples, -1, 32767 / 32768) * 32768).astype("<i2").tobytes(), rate, pictures)

    @property
    def samples(self) -> NDArray[np.float32]:
        """As they were, [n]."""
        return np.frombuffer(self.sound, "<i2").astype(np.float32) * np.float32(1 / 32768)


Given = Written | Spoken
