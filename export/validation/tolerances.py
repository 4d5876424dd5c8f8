"""Every limit that validation holds a bundle to, in one table, with its reason.

A limit may never be met by a reference without energy: `Limit` figures are only read after that was checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["LIMITS", "Limit", "limit"]


@dataclass(frozen=True)
class Limit:
    """Largest value of a figure that still passes (smallest, where ``at_least``), and why."""

    value: float
    reason: str
    at_least: bool = False


_ORDER = "the same float32 arithmetic in another order of summation"
_HALF = "every activation is rounded to 11 bits once per operation"
_BRAIN = "every activation is rounded to 8 bits once per operation"
_WEIGHTS = "INT8 or INT4 weights: the quantization report states the loss, this bound catches broken graphs"

#: (what, dtype of the weights) -> limit. ``what`` is a figure of a group of checks.
LIMITS: Mapping[tuple[str, str], Limit] = {
    ("graph.rel_rms", "float32"): Limit(1e-4, _ORDER),
    ("graph.rel_rms", "float16"): Limit(2e-2, _HALF),
    ("graph.rel_rms", "bfloat16"): Limit(8e-2, _BRAIN),
    ("graph.rel_rms", "int8"): Limit(0.35, _WEIGHTS),
    ("graph.rel_rms", "int4"): Limit(0.5, _WEIGHTS),
    ("logits.kl", "float32"): Limit(1e-6, _ORDER),
    ("logits.kl", "float16"): Limit(1e-2, _HALF),
    ("logits.kl", "bfloat16"): Limit(0.1, _BRAIN),
    ("logits.kl", "int8"): Limit(1.0, _WEIGHTS),
    ("logits.kl", "int4"): Limit(2.0, _WEIGHTS),
}


def limit(figure: str, precision: str) -> Limit:
    """The limit of a figure for a precision. KeyError names what has none."""
    return LIMITS[figure, precision]
