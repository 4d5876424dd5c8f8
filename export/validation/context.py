"""Context of a validation, shared by all checks: bundle, checkpoint, backend, reference and suite."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray
from omniport.runtime.backends.base import Backend
from omniport.runtime.bundle.parts import Part
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.bundle.recipes import PRECISION_DTYPES
from omniport.runtime.system.progress import Say

from ..checkpoint.checkpoint import Checkpoint
from .reference import Reference

#: from the finest to the coarsest
_PRECISIONS = ("float32", "float16", "bfloat16", "int8", "fp8", "int4")


def judged_as(precision: str, compute: str | None) -> str:
    """The precision whose limits hold for a graph: the coarser of its own and the one that it is computed in."""
    computed = precision if compute is None else PRECISION_DTYPES[compute]
    return max(precision, computed, key=_PRECISIONS.index)


@dataclass
class Context:
    """One validation run.

    Attributes:
        suite: ``quick`` or ``full``.
        graphs: names of the graphs to check (those that the bundle holds, less what ``--graphs`` left out).
        precision: graph -> dtype of its weights.
        threads: of one operator, for graphs that are loaded besides the backend's; all physical cores if None.
        artifacts: name -> array kept for the report (waveforms float32 [n], mels float32 [80, T], ...).
        progress: called with a line that says what is being checked, before it is.
    """

    bundle: Bundle
    checkpoint: Checkpoint
    backend: Backend
    reference: Reference
    suite: str
    graphs: tuple[str, ...]
    precision: dict[str, str]
    progress: Say
    artifacts: dict[str, NDArray[Any]] = field(default_factory=dict)
    threads: int | None = None

    @property
    def full(self) -> bool:
        """Whether the long suite was asked for."""
        return self.suite == "full"

    def coarsest(self, parts: Iterable[Part]) -> str:
        """The coarsest precision among those of the parts that the bundle holds."""
        found = (self.precision[part.name] for part in parts if part.name in self.precision)
        return max(found, key=_PRECISIONS.index)

    @property
    def max_context(self) -> int:
        """Tokens that a decoder's cache can hold here."""
        exported = self.bundle.manifest.kv.max_context
        return min(exported, self.backend.max_context() or exported)
