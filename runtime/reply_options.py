"""The options of a reply: one object that travels from the session to the workers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle.manifest import SamplingConfig
from .errors import UsageError
from .speech.ode_methods import SolverChoice
from .speech.windows import Window

#: stop strings at most, as chat clients know it, and characters of each
_STOPS, _STOP_LENGTH = 4, 256
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True, eq=False)
class ReplyOptions:
    """The options of `OmniSession.reply` and `OmniSession.turn`, which say what each means.

    Raises:
        UsageError: a seed or stop strings that are none.
    """

    speak: bool = True
    voice: str | None = None
    thinker: SamplingConfig | None = None
    talker: SamplingConfig | None = None
    seed: int = 0
    noise: NDArray[np.float32] | None = None
    window: Window = "stream"
    solver: SolverChoice = "rk4"
    threads: bool = True
    exact: bool = False
    ignore_stop: bool = False
    stop: str | Sequence[str] = ()
    say: str | None = None
    tools: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise UsageError(f"seed is {self.seed!r}; a whole number of at least 0 was expected")
        self.stop_strings()

    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, checked."""
        given = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(given, Sequence) or len(given) > _STOPS:
            raise UsageError(f"stop is {given!r:.200}; a string, or a list of at most {_STOPS}, was expected")
        for text in given:
            if not isinstance(text, str) or not 1 <= len(text) <= _STOP_LENGTH or _SURROGATE.search(text):
                raise UsageError(f"stop holds {text!r:.200}; text of 1 to {_STOP_LENGTH} characters was expected")
        return tuple(given)

    def generators(self) -> list[np.random.Generator]:
        """Separate streams of the seed for thinker, talker and noise, so that one does not change another."""
        return [np.random.default_rng(stream) for stream in np.random.SeedSequence(self.seed).spawn(3)]
