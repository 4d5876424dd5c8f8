"""Recipes: the quantization scheme of each weight of each graph, as data (docs/quantize.md describes them).

A recipe holds an ordered list of rules for each graph; the first whose pattern is found in a weight's name decides. A
graph without rules stays as it is in the bundle. ``quantize`` carries a recipe out, ``plan`` counts what it makes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass

from ..errors import UsageError
from .parts import PARTS

#: [K, N]: MatMul, and Gemm that does not transpose
CHANNELS_LAST = "channels_last"
#: [out, in, ...]: Conv, and Gemm that transposes
CHANNELS_FIRST = "channels_first"
#: names of precisions -> dtype that a graph computes in
PRECISION_DTYPES: Mapping[str, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Weight:
    """A constant that one kind of operator multiplies by.

    Attributes:
        name: of the initializer.
        kind: ``matmul`` or ``conv``.
        layout: where its output channels are: ``channels_last`` or ``channels_first``.
        shape: of the initializer.
        dtype: of the initializer.
    """

    name: str
    kind: str
    layout: str
    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class Scheme:
    """How one weight is stored, and what it is multiplied with: symmetric (no zero point), with scales.

    Attributes:
        bits: 8 or 4; 0 leaves the weight as it is.
        block: values along K that share a scale; 0 for one scale per output channel.
        float8: 8 bits are E4M3, not an integer.
        activations: the other factor is rounded to 8 bits of the same kind, with one scale that calibration chose.
        outputs: so is the product: ONNX Runtime fuses a convolution no other way. For float32, which runs on CPUs.
        clip: way in which these scales were chosen (`omniport.calib.calibration_file.CLIPS`).
        factors: array of a calibration by whose numbers input channels are smoothed, where there is a calibration.
        otherwise: name of the scheme of weights that cannot be stored so.
    """

    name: str
    bits: int
    block: int
    about: str
    _: KW_ONLY
    float8: bool = False
    activations: bool = False
    outputs: bool = False
    clip: str = "max"
    factors: str = ""
    otherwise: str = "w8"

    @property
    def format(self) -> str:
        """``int8``, ``int4`` or ``fp8``; empty for weights that stay as they are."""
        return "fp8" if self.float8 else f"int{self.bits}" if self.bits else ""

    def takes(self, weight: Weight) -> bool:
        """Whether the weight can be stored so: blocks need [K, N] with K a multiple of the block.

        INT8 in blocks is for float32, which runs on CPUs: TensorRT-RTX widens most of it (docs/quantize.md).
        """
        if self.outputs and weight.dtype != "float32":
            return False
        fits = weight.layout == CHANNELS_LAST and weight.shape[0] % max(1, self.block) == 0
        return self.block == 0 or (fits and (self.bits < 8 or weight.dtype == "float32"))


NONE = Scheme("none", 0, 0, "as it is in the bundle")
SCHEMES: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        NONE,
        Scheme("w8", 8, 0, "INT8, a scale per output channel", factors="smooth"),
        Scheme("w8-16", 8, 16, "INT8, a scale per 16 values along K", factors="smooth"),
        Scheme("w8-32", 8, 32, "INT8, a scale per 32 values along K", factors="smooth"),
        Scheme("w8-128", 8, 128, "INT8, a scale per 128 values along K", factors="smooth"),
        Scheme("int4-32", 4, 32, "INT4, a scale per 32 values along K", factors="awq-32"),
        Scheme("int4-128", 4, 128, "INT4, a scale per 128 values along K", factors="awq-128"),
        Scheme("w8a8", 8, 0, "INT8 times INT8, a scale per output channel and one", activations=True, clip="mse"),
        Scheme(
            "w8a8-out",
            8,
            0,
            "as w8a8, what a convolution gives is INT8 as well",
            activations=True,
            outputs=True,
            clip="mse",
            otherwise="w8a8",
        ),
        Scheme("w8a8-smooth", 8, 0, "as w8a8, input channels smoothed", activations=True, factors="smooth"),
        Scheme("fp8", 8, 0, "E4M3 times E4M3, a scale per output channel and one", float8=True, activations=True),
    )
}


@dataclass(frozen=True)
class Rule:
    """Weights whose name holds ``pattern`` and whose operator is of ``kinds`` get ``scheme``."""

    pattern: str
    scheme: str
    kinds: tuple[str, ...] = ("matmul",)


@dataclass(frozen=True)
class Recipe:
    """A named choice for every graph.

    Attributes:
        graphs: graph -> its rules; graphs that are not named stay as they are.
        every: the rules of a graph that is given this recipe by name and has no rules in it.
    """

    name: str
    about: str
    graphs: Mapping[str, tuple[Rule, ...]]
    every: tuple[Rule, ...]

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """What its rules give to some weight."""
        named = {rule.scheme for rules in self.graphs.values() for rule in rules}
        return tuple(scheme for scheme in SCHEMES.values() if scheme.name in named and scheme.bits)

    @property
    def activations(self) -> bool:
        """Whether it rounds what weights multiply, for which it needs a calibration."""
        return any(scheme.activations for scheme in self.schemes)


_W8 = (Rule("", "w8"),)
# What the first layer gets wrong reaches all others, small blocks lose less, and the head, which nothing follows, is
# fastest in large ones (docs/quantize.md).
_W8_LM = (
    Rule(r"model\.layers\.0\.(self_attn|mlp\.down_proj)", "none"),
    Rule(r"model\.layers\.0\.|down_proj", "w8-16"),
    Rule("head", "w8-128"),
    Rule("", "w8-32"),
)
# an eighth of a layer's weights, whose errors a softmax multiplies, and the talker's first product, which is all that
# it hears of the thinker: 4 dB of the logits each (docs/quantize.md)
_INT4 = (Rule(r"self_attn|thinker_to_talker_proj", "w8"), Rule("", "int4-32"))
# One scale for what down_proj multiplies costs 8 dB: its input has the largest outliers. The head and the talker's
# first product multiply what graphs exchange (docs/quantize.md).
_INT8 = (Rule("down_proj|head|thinker_to_talker_proj", "w8-128"), Rule("", "w8a8-smooth"))
_W8A8 = (Rule("", "w8a8"),)
_FP8 = (Rule("", "fp8"),)
# the convolutions of the residual blocks: neither the filters that resample, nor the first and the last
_VOCODER = (Rule(r"\.convs\d\.", "w8a8-out", ("conv",)),)
RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "int8",
            "INT8 times INT8: smoothed in thinker and talker, whose down_proj and head have INT8 weights alone",
            {
                "thinker": _INT8,
                "talker": _INT8,
                "audio_encoder": _W8A8,
                "vision_encoder": _W8A8,
                "dit": _W8A8,
                "bigvgan": _VOCODER,
            },
            _W8A8,
        ),
        Recipe(
            "w8",
            "INT8 weights in matrix products; convolutions and half of the decoders' first layer as they are",
            # the vocoder is all convolutions, and no runtime has a kernel for one with integer weights alone
            {"thinker": _W8_LM, "talker": _W8_LM, **dict.fromkeys(("audio_encoder", "vision_encoder", "dit"), _W8)},
            (Rule("", "w8", ("matmul", "conv")),),
        ),
        Recipe(
            "int4",
            "INT4 weights, INT8 in attention, in thinker and talker; the other graphs as they are",
            {"thinker": _INT4, "talker": _INT4},
            _INT4,
        ),
        Recipe(
            "fp8",
            "E4M3 times E4M3 in all matrix products; GPUs from SM89 on",
            {name: _FP8 for name in PARTS if name != "bigvgan"},
            _FP8,
        ),
        Recipe(
            "edge-8gb",
            "INT4 in thinker and talker, INT8 weights in encoders and DiT: the 3B in 8 GB",
            {"thinker": _INT4, "talker": _INT4, **dict.fromkeys(("audio_encoder", "vision_encoder", "dit"), _W8)},
            _W8,
        ),
        Recipe(
            "edge-16gb",
            "thinker and talker as in int8, INT8 weights in encoders and DiT: the 7B in 16 GB",
            {"thinker": _INT8, "talker": _INT8, **dict.fromkeys(("audio_encoder", "vision_encoder", "dit"), _W8)},
            _W8,
        ),
        Recipe(
            "int8-plain",
            "INT8 times INT8 without smoothing, to compare with",
            {name: (Rule("", "w8a8"),) for name in PARTS if name != "bigvgan"},
            _W8A8,
        ),
    )
}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        UsageError: there is none; lists those there are.
    """
    if name not in RECIPES:
        raise UsageError(f"no recipe {name!r}; known: {', '.join(RECIPES)}")
    return RECIPES[name]


def scheme_of(rules: Sequence[Rule], weight: Weight) -> Scheme:
    """The scheme that a graph's rules give to a weight, or the one that stands in where it cannot be stored so."""
    for rule in rules:
        if weight.kind in rule.kinds and re.search(rule.pattern, weight.name):
            scheme = SCHEMES[rule.scheme]
            return scheme if scheme.takes(weight) else SCHEMES[scheme.otherwise]
    return NONE
