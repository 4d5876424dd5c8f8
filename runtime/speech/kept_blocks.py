"""Keys and values of the DiT that one window leaves to the next: those of the last block before it.

A layer that looks back sees one block before its own. With what was computed for the last block of a window, at every
evaluation of the solver, the next window begins where that one ended: nothing before it is solved again, and what its
blocks look back at is what a whole utterance has there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import DitGeometry

#: rows of a batch: with the voice and without, for guidance
_ROWS = 2

Array = NDArray[Any]


class KeptBlocks:
    """What an utterance's windows leave to each other.

    Args:
        dit: of a bundle whose DiT takes keys and values (`DitGeometry.past_layers`).
    """

    def __init__(self, dit: DitGeometry) -> None:
        self._nothing = nothing_before(dit)
        self._names = dit.past_names
        self._held: list[dict[str, Array]] = []

    def feeds(self, evaluation: int, keep_block: int) -> dict[str, Array]:
        """Inputs of the DiT besides those that every bundle's has.

        Args:
            evaluation: its number within the window: keys and values belong to its time point.
            keep_block: block of this window that the next one begins behind.
        """
        held = self._held[evaluation] if evaluation < len(self._held) else {}
        chosen = {"keep_block": np.asarray([keep_block], np.int64), "has_past": np.asarray([bool(held)], np.int64)}
        return {**self._nothing, **held, **chosen}

    def take(self, evaluation: int, outputs: Mapping[str, Array]) -> None:
        """Keep what an evaluation gives, in place of what the window before it left."""
        given = {f"past_{name}": outputs[f"present_{name}"] for name in self._names}
        self._held[evaluation : evaluation + 1] = [given]

    def clear(self) -> None:
        """Nothing was before."""
        self._held.clear()

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(array.nbytes for given in self._held for array in given.values())


def nothing_before(dit: DitGeometry) -> dict[str, Array]:
    """Inputs of the DiT for codes with nothing before them, besides those that every bundle's has."""
    if not dit.past_layers:
        return {}
    nothing = np.zeros((_ROWS, dit.block_size, dit.past_width), np.float32)
    none = np.zeros(1, np.int64)
    past = dict.fromkeys((f"past_{name}" for name in dit.past_names), nothing)
    return {"has_past": none, "keep_block": none, **past}


def kept_bytes(dit: DitGeometry, evaluations: int) -> int:
    """Bytes that an utterance holds between two windows."""
    return evaluations * len(dit.past_names) * _ROWS * dit.block_size * dit.past_width * 4
