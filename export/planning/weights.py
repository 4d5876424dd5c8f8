"""The weights of a graph without any of their values, and the bytes that they take in each recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from omniport.runtime.bundle.graph_spec import DTYPES
from omniport.runtime.bundle.parts import PARTS
from omniport.runtime.bundle.recipes import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    PRECISION_DTYPES,
    Recipe,
    Rule,
    Scheme,
    Weight,
    find_recipe,
    scheme_of,
)


@dataclass(frozen=True)
class Matrix:
    """``count`` weights [k, n] of one kind, each applied to ``steps`` rows for one row of the graph's input.

    Attributes:
        name: of one of them, by which recipes tell them apart.
        convolves: they are of convolutions, not of products.
    """

    name: str
    k: int
    n: int
    count: int = 1
    steps: float = 1.0
    convolves: bool = False

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


@dataclass(frozen=True)
class PlanRecipe:
    """A precision, or a recipe of quantize over a bundle of the machine's own precision.

    Attributes:
        precision: of everything that is not quantized; empty for the machine's own: fp32 on a CPU, fp16 on a GPU.
        quantized: the recipe; None for a precision.
        token2wav: precision of DiT and vocoder where the rest is not FP32; what a recipe is made over has FP16.
    """

    name: str
    precision: str = ""
    quantized: Recipe | None = None
    token2wav: str = "fp32"

    @property
    def command(self) -> str:
        """What makes such a bundle."""
        if self.quantized is None:
            asked = f" --token2wav {self.token2wav}" if "fp32" not in (self.name, self.token2wav) else ""
            return f"omniport export CHECKPOINT BUNDLE --precision {self.name}{asked}"
        calibration = " --calib CALIB" if self.quantized.activations else ""
        return f"omniport quantize BUNDLE OUT --recipe {self.name}{calibration}"

    @property
    def needs(self) -> tuple[str, ...]:
        """Number formats that the machine must have."""
        schemes = () if self.quantized is None else self.quantized.schemes
        return tuple(sorted({scheme.format for scheme in schemes})) or (self.precision,)

    def graph_precision(self, graph: str, own: str) -> str:
        """fp32, fp16 or bf16: DiT and vocoder stay FP32 (`Part.float32`) unless asked otherwise."""
        chosen = self.precision or own
        token2wav = self.token2wav if self.quantized is None else "fp16"
        return token2wav if chosen != "fp32" and PARTS[graph].float32 else chosen

    def scheme(self, graph: str, matrix: Matrix, precision: str) -> Scheme:
        """How a weight of a graph in that precision is stored."""
        rules = () if self.quantized is None else self.quantized.graphs.get(graph, ())
        return _scheme(rules, matrix, precision)


#: what a plan compares
RECIPES: Mapping[str, PlanRecipe] = {
    **{name: PlanRecipe(name, name) for name in PRECISION_DTYPES},
    **{
        name: PlanRecipe(name, quantized=find_recipe(name))
        for name in ("w8", "int8", "fp8", "int4", "edge-8gb", "edge-16gb")
    },
}


@lru_cache(maxsize=4096)
def _scheme(rules: tuple[Rule, ...], matrix: Matrix, precision: str) -> Scheme:
    kind, layout = ("conv", CHANNELS_FIRST) if matrix.convolves else ("matmul", CHANNELS_LAST)
    return scheme_of(rules, Weight(matrix.name, kind, layout, (matrix.k, matrix.n), PRECISION_DTYPES[precision]))


def itemsize(precision: str) -> int:
    """Bytes of a value in fp32, fp16 or bf16."""
    return DTYPES[PRECISION_DTYPES[precision]]


def matrix_bytes(matrix: Matrix, scheme: Scheme, precision: str) -> int:
    """Bytes of values and scales in the file; scales are in the graph's precision."""
    if not scheme.bits:
        return matrix.elements * itemsize(precision)
    scales = matrix.elements // scheme.block if scheme.block else matrix.n * matrix.count
    return matrix.elements * scheme.bits // 8 + scales * itemsize(precision)


def graph_bytes(shape: GraphShape, recipe: PlanRecipe, precision: str) -> int:
    """Bytes of a graph's weights in that precision, under a recipe."""
    matrices = sum(matrix_bytes(m, recipe.scheme(shape.name, m, precision), precision) for m in shape.matrices)
    return matrices + shape.other * itemsize(precision) + shape.fixed * 4
