"""Recipes: the quantization scheme of each weight of each graph (docs/quantize.md describes them).

A recipe holds an ordered list of rules for each graph; the first whose pattern is found in a weight's name decides. A
graph without rules stays as it is in the bundle.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from omniport.runtime.bundle.parts import PARTS
from omniport.runtime.errors import UsageError

from .tensors import CHANNELS_LAST, Weight


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
            "fp8",
            "E4M3 times E4M3 in all matrix products; GPUs from SM89 on",
            {name: _FP8 for name in PARTS if name != "bigvgan"},
            _FP8,
        ),
        Recipe(
            "int8-plain",
            "INT8 times INT8 without smoothing, to compare with",
            {name: (Rule("", "w8a8"),) for name in PARTS if name != "bigvgan"},
            _W8A8,
        ),
    )
}

#: names by which a graph may be said to stay in what it computes in now
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        UsageError: there is none; lists those there are.
    """
    if name not in RECIPES:
        raise UsageError(f"no recipe {name!r}; known: {', '.join(RECIPES)}")
    return RECIPES[name]


def resolve(recipe: Recipe, overrides: Mapping[str, str], computes: Mapping[str, str]) -> Recipe:
    """The recipe with some graphs given another one, or kept.

    Args:
        overrides: graph -> name of a recipe, ``none``, or the precision it has and is to keep (``fp16``).
        computes: graph of the bundle -> dtype it computes in.

    Raises:
        UsageError: a graph that the bundle has not, no such recipe, or a precision that the graph does not have.
    """
    graphs = {name: rules for name, rules in recipe.graphs.items() if name in computes}
    for graph, wanted in overrides.items():
        if graph not in computes:
            raise UsageError(f"--graph-recipe: the bundle has no graph {graph!r}; it has {', '.join(computes)}")
        if wanted in _DTYPES and computes[graph] != _DTYPES[wanted]:
            raise UsageError(
                f"--graph-recipe {graph}={wanted}: it computes in {computes[graph]}, and quantizing does not change "
                f"that. Export with --precision {wanted} and quantize that bundle, or say {graph}=none"
            )
        if wanted == NONE.name or wanted in _DTYPES:
            graphs.pop(graph, None)
        elif wanted in RECIPES:
            other = RECIPES[wanted]
            graphs[graph] = other.graphs.get(graph, other.every)
        else:
            known = ", ".join((*RECIPES, NONE.name, *_DTYPES))
            raise UsageError(f"--graph-recipe {graph}={wanted}: no recipe {wanted!r}; known: {known}")
    return replace(recipe, graphs=graphs)


@dataclass(frozen=True)
class Choice:
    """A weight and the scheme that was chosen for it."""

    weight: Weight
    scheme: Scheme


def choose(
    recipe: Recipe, weights: Mapping[str, Sequence[Weight]], keep: Sequence[str] = ()
) -> dict[str, tuple[Choice, ...]]:
    """The scheme of every weight of every graph.

    Args:
        weights: graph -> weights that could be quantized.
        keep: patterns looked for in ``graph/weight``; what they are found in stays as it is.

    Raises:
        UsageError: a pattern that is no regular expression, or is found in no weight.
    """
    patterns = {text: _compiled(text) for text in keep}
    unused = set(patterns)
    chosen: dict[str, tuple[Choice, ...]] = {}
    for graph, listed in weights.items():
        row = []
        for weight in listed:
            hits = {text for text, pattern in patterns.items() if pattern.search(f"{graph}/{weight.name}")}
            unused -= hits
            row.append(Choice(weight, NONE if hits else _scheme(recipe.graphs.get(graph, ()), weight)))
        chosen[graph] = tuple(row)
    if unused:
        example = next((f"{graph}/{row[0].name}" for graph, row in weights.items() if row), "none")
        raise UsageError(f"--keep {min(unused)!r} matches no weight; a name is GRAPH/WEIGHT, for example {example!r}")
    return chosen


def _scheme(rules: Sequence[Rule], weight: Weight) -> Scheme:
    for rule in rules:
        if weight.kind in rule.kinds and re.search(rule.pattern, weight.name):
            scheme = SCHEMES[rule.scheme]
            return scheme if scheme.takes(weight) else SCHEMES[scheme.otherwise]
    return NONE


def _compiled(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UsageError(f"--keep {text!r} is not a regular expression: {error}") from error
