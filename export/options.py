"""What an export was asked for, checked before any work is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omniport.runtime.errors import ExportError
from omniport.runtime.graphs import GRAPH_NAMES
from omniport.runtime.manifest import KV_FORMS

from .graph_defs import PRECISIONS
from .lowering import OPS

__all__ = ["ExportOptions"]


@dataclass(frozen=True)
class ExportOptions:
    """Options that decide what the graphs of a bundle look like.

    Attributes:
        precision: fp32, fp16 or bf16.
        max_context: KV-cache capacity in tokens.
        ops: ``native``, or ``decomposed`` for parsers older than the native operators (`omniport.export.lowering`).
        kv: form of the KV cache, ``static`` or ``concat``.
    """

    precision: str = "fp32"
    max_context: int = 8192
    ops: str = "native"
    kv: str = "static"

    def check(self, graphs: Sequence[str] | None) -> None:
        """Raises:
        ExportError: an unknown name, or options that do not go together.
        """
        for what, value, known in (
            ("precision", self.precision, PRECISIONS),
            ("--ops", self.ops, OPS),
            ("--kv", self.kv, KV_FORMS),
        ):
            if value not in known:
                raise ExportError(f"no {what} {value!r}; known: {', '.join(known)}")
        unknown = sorted(set(graphs or ()) - set(GRAPH_NAMES))
        if unknown:
            raise ExportError(f"no graph named {', '.join(unknown)}; known: {', '.join(GRAPH_NAMES)}")
        if self.ops == "decomposed" and self.kv == "static":
            raise ExportError(
                "--ops decomposed goes with --kv concat: a static KV cache is updated in place by TensorScatter, which "
                "has no equivalent before opset 24. Add --kv concat, or leave --ops native."
            )

    def check_context(self, limit: int) -> None:
        """Raises:
        ExportError: a capacity that the model has no positions for; ``limit`` is how many it has.
        """
        if not 64 <= self.max_context <= limit:
            raise ExportError(
                f"--max-context {self.max_context}: expected 64 to {limit}, the positions the model was trained on"
            )
