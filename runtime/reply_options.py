"""The options of a reply: one object that travels from the session to the workers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .bundle.manifest import SamplingConfig
from .errors import UsageError
from .speech.ode_methods import Solver
from .speech.windows import Window


@dataclass(frozen=True, kw_only=True, eq=False)
class ReplyOptions:
    """The options of `OmniSession.reply` and `OmniSession.turn`, which say what each means.

    Raises:
        UsageError: a seed that is none.
    """

    speak: bool = True
    voice: str | None = None
    thinker: SamplingConfig | None = None
    talker: SamplingConfig | None = None
    seed: int = 0
    noise: NDArray[np.float32] | None = None
    window: Window = "stream"
    solver: Solver = "rk4"
    threads: bool = True
    exact: bool = False
    ignore_stop: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise UsageError(f"seed is {self.seed!r}; a whole number of at least 0 was expected")

    def generators(self) -> list[np.random.Generator]:
        """Separate streams of the seed for thinker, talker and noise, so that one does not change another."""
        return [np.random.default_rng(stream) for stream in np.random.SeedSequence(self.seed).spawn(3)]
