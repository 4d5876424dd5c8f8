"""Choosing a scheme for each weight of a bundle: a recipe, what was said of single graphs, and what is to be kept."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from omniport.runtime.bundle.parts import PARTS
from omniport.runtime.bundle.recipes import NONE, PRECISION_DTYPES, RECIPES, Recipe, Scheme, Weight, scheme_of
from omniport.runtime.errors import UsageError


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
        if wanted in PRECISION_DTYPES and computes[graph] != PRECISION_DTYPES[wanted]:
            token2wav = f" --token2wav {wanted}" if PARTS[graph].float32 and wanted != "fp32" else ""
            raise UsageError(
                f"--graph-recipe {graph}={wanted}: it computes in {computes[graph]}, and quantizing does not change "
                f"that. Export with --precision {wanted}{token2wav} and quantize that bundle, or say {graph}=none"
            )
        if wanted == NONE.name or wanted in PRECISION_DTYPES:
            graphs.pop(graph, None)
        elif wanted in RECIPES:
            other = RECIPES[wanted]
            graphs[graph] = other.graphs.get(graph, other.every)
        else:
            known = ", ".join((*RECIPES, NONE.name, *PRECISION_DTYPES))
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
            row.append(Choice(weight, NONE if hits else scheme_of(recipe.graphs.get(graph, ()), weight)))
        chosen[graph] = tuple(row)
    if unused:
        example = next((f"{graph}/{row[0].name}" for graph, row in weights.items() if row), "none")
        raise UsageError(f"--keep {min(unused)!r} matches no weight; a name is GRAPH/WEIGHT, for example {example!r}")
    return chosen


def _compiled(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UsageError(f"--keep {text!r} is not a regular expression: {error}") from error
