"""Bytes that weights take in each recipe, as export and quantize store them.

Mirrors calib/weights/recipe.py, which this package may not import; a test compares the sizes with
bundles that were quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from omniport.runtime.bundle.parts import PARTS

from .weights import GraphShape, Kind, Matrix


@dataclass(frozen=True)
class Storage:
    """How one weight is stored.

    Attributes:
        bits: of a value; 0 for the graph's own precision.
        block: values along K that share a scale; 0 for one scale per output channel.
        arithmetic: format that products are computed in; empty for the graph's own.
    """

    bits: int = 0
    block: int = 0
    arithmetic: str = ""


_PLAIN = Storage()
_W8 = Storage(8)
_INT4 = Storage(4, 32)
_INT8 = Storage(8, 0, "int8")
_FP8 = Storage(8, 0, "fp8")

_LM = ("thinker", "talker")
_ENCODERS = ("audio_encoder", "vision_encoder")
_ALL_W8, _ALL_INT8, _ALL_FP8 = {Kind.PRODUCT: _W8}, {Kind.PRODUCT: _INT8}, {Kind.PRODUCT: _FP8}
_SMALL = dict.fromkeys((*_ENCODERS, "dit"), _ALL_W8)
_MIXED = {Kind.ATTENTION: _W8, Kind.PROJECTION: _W8, Kind.PRODUCT: _INT4}
_FEW = Storage(8, 128)
_W8_BLOCKS = {Kind.PRODUCT: Storage(8, 32), Kind.DOWN: Storage(8, 16), Kind.HEAD: _FEW}
_W8_FIRST = {Kind.ATTENTION: _PLAIN, Kind.DOWN: _PLAIN, Kind.PRODUCT: Storage(8, 16)}
_INT8_LM = {Kind.PRODUCT: _INT8, Kind.DOWN: _FEW, Kind.HEAD: _FEW, Kind.PROJECTION: _FEW}


@dataclass(frozen=True)
class PlanRecipe:
    """A precision, or a recipe of quantize over a bundle of the machine's own precision.

    Attributes:
        precision: of everything that is not quantized; empty for the machine's own: fp32 on a CPU, fp16 on a GPU.
        graphs: graph -> kind of weight -> storage; kinds of products that are not named are stored as `Kind.PRODUCT`.
        needs: formats that the machine must have.
        first: the same for the first layer of thinker and talker, where it is stored otherwise.
        command: what makes such a bundle.
    """

    name: str
    command: str
    precision: str = ""
    graphs: Mapping[str, Mapping[Kind, Storage]] | None = None
    needs: tuple[str, ...] = ()
    first: Mapping[Kind, Storage] | None = None

    def graph_precision(self, graph: str, own: str) -> str:
        """fp32, fp16 or bf16: token2wav stays FP32 where the rest is BF16 (`Part.bfloat16`)."""
        chosen = self.precision or own
        return "fp32" if chosen == "bf16" and not PARTS[graph].bfloat16 else chosen


_EXPORT = "omniport export CHECKPOINT BUNDLE --precision {}"
_QUANTIZE = "omniport quantize BUNDLE OUT --recipe {}"
_CALIBRATED = _QUANTIZE + " --calib CALIB"
RECIPES: Mapping[str, PlanRecipe] = {
    recipe.name: recipe
    for recipe in (
        PlanRecipe("fp32", _EXPORT.format("fp32"), "fp32", needs=("fp32",)),
        PlanRecipe("fp16", _EXPORT.format("fp16"), "fp16", needs=("fp16",)),
        PlanRecipe("bf16", _EXPORT.format("bf16"), "bf16", needs=("bf16",)),
        PlanRecipe(
            "w8",
            _QUANTIZE.format("w8"),
            graphs={**dict.fromkeys(_LM, _W8_BLOCKS), **_SMALL},
            needs=("int8",),
            first=_W8_FIRST,
        ),
        PlanRecipe(
            "int8",
            _CALIBRATED.format("int8"),
            graphs={
                **dict.fromkeys(_LM, _INT8_LM),
                **dict.fromkeys((*_ENCODERS, "dit"), _ALL_INT8),
                "bigvgan": {Kind.CONVOLUTION: _INT8},
            },
            needs=("int8",),
        ),
        PlanRecipe(
            "fp8",
            _CALIBRATED.format("fp8"),
            graphs=dict.fromkeys((*_ENCODERS, *_LM, "dit"), _ALL_FP8),
            needs=("fp8",),
        ),
        PlanRecipe("int4", _QUANTIZE.format("int4"), graphs=dict.fromkeys(_LM, _MIXED), needs=("int4", "int8")),
        PlanRecipe(
            "edge-8gb",
            _QUANTIZE.format("edge-8gb"),
            graphs={**dict.fromkeys(_LM, _MIXED), **_SMALL},
            needs=("int4", "int8"),
        ),
        PlanRecipe(
            "edge-16gb",
            _CALIBRATED.format("edge-16gb"),
            graphs={**dict.fromkeys(_LM, _INT8_LM), **_SMALL},
            needs=("int8",),
        ),
    )
}


def storage_of(recipe: PlanRecipe, graph: str, matrix: Matrix) -> Storage:
    """How a weight is stored; blocks that do not divide K fall back to a scale per channel, as in quantize."""
    first = matrix.first and recipe.first is not None
    kinds = (recipe.first if first else (recipe.graphs or {}).get(graph)) or {}
    others = kinds.get(Kind.PRODUCT, _PLAIN) if matrix.kind.product else _PLAIN
    storage = kinds.get(matrix.kind, others)
    return _W8 if storage.block and matrix.k % storage.block else storage


def matrix_bytes(matrix: Matrix, storage: Storage, itemsize: int) -> int:
    """Bytes of values and scales in the file; ``itemsize`` is the graph's own, of scales as well."""
    if not storage.bits:
        return matrix.elements * itemsize
    blocks = storage.block and (storage.bits < 8 or itemsize == 4)  # INT8 in blocks is for float32 alone
    scales = matrix.elements // storage.block if blocks else matrix.n * matrix.count
    return matrix.elements * storage.bits // 8 + scales * itemsize


def graph_bytes(shape: GraphShape, recipe: PlanRecipe, itemsize: int) -> int:
    """Bytes of a graph's weights under a recipe."""
    matrices = sum(matrix_bytes(m, storage_of(recipe, shape.name, m), itemsize) for m in shape.matrices)
    return matrices + shape.other * itemsize + shape.fixed * 4
