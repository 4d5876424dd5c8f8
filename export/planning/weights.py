"""Count the weights of a graph by kind, without reading any."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """Kinds of weights, as quantization recipes tell them apart (calib/weights/recipe.py)."""

    PRODUCT = "any product that is none of those below"
    ATTENTION = "of a decoder's attention"
    DOWN = "the last product of a decoder's layer"
    HEAD = "logits"
    PROJECTION = "the talker's first product"
    CONVOLUTION = "as many channels out as in"
    WIDENING = "other convolutions: the vocoder's first, its last, and those that resample"

    @property
    def product(self) -> bool:
        """Whether it is a product, and no convolution."""
        return self not in (Kind.CONVOLUTION, Kind.WIDENING)


@dataclass(frozen=True)
class Matrix:
    """``count`` weights [k, n] of one kind, each applied to ``steps`` rows for one row of the graph's input.

    ``first``: they are of a decoder's first layer, which some recipes treat otherwise.
    """

    kind: Kind
    k: int
    n: int
    count: int = 1
    steps: float = 1.0
    first: bool = False

    @property
    def elements(self) -> int:
        """Values in all of them."""
        return self.k * self.n * self.count


@dataclass(frozen=True)
class GraphShape:
    """Weights of one graph.

    Attributes:
        other: elements that are never quantized and take the graph's precision: biases, norms, tables.
        fixed: elements that stay float32 in every precision.
        width, ffn, heads: of its layers, for activations.
    """

    name: str
    matrices: tuple[Matrix, ...]
    other: int = 0
    fixed: int = 0
    width: int = 0
    ffn: int = 0
    heads: int = 1

    @property
    def parameters(self) -> int:
        """All elements."""
        return sum(matrix.elements for matrix in self.matrices) + self.other + self.fixed

    def operations(self, rows: float, without: Iterable[Matrix] = ()) -> float:
        """Multiplications and additions for that many rows."""
        left_out = set(without)
        return 2 * rows * sum(m.elements * m.steps for m in self.matrices if m not in left_out)
