"""The tensors of a graph that products read, as its traced form has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
from omniport.export.graph_defs import GraphDefinition
from omniport.export.trace import trace

from .weights import CHANNELS_LAST, Weight, find_weights

__all__ = ["SitePlan", "find_sites", "plan_sites"]


@dataclass(frozen=True)
class SitePlan:
    """One tensor and the weights that multiply it, in the graph's order; the first names it."""

    graph: str
    weights: tuple[Weight, ...]

    @property
    def name(self) -> str:
        return self.weights[0].name

    @property
    def kind(self) -> str:
        return self.weights[0].kind

    @property
    def axis(self) -> int:
        """Where the tensor's channels are: last for a matrix product, second for a convolution."""
        return -1 if self.kind == "matmul" else 1

    @property
    def smooths(self) -> bool:
        """Whether factors can move between the tensor and its weights: matrix products alone."""
        return self.kind == "matmul" and all(weight.layout == CHANNELS_LAST for weight in self.weights)


def plan_sites(definition: GraphDefinition) -> tuple[SitePlan, ...]:
    """The sites of a graph, in its order; weights that `find_weights` leaves out have none."""
    model, _ = trace(definition)
    return find_sites(definition.name, model)


def find_sites(graph: str, model: ir.Model) -> tuple[SitePlan, ...]:
    """The sites of an ONNX graph, in its order."""
    weights = {weight.name: weight for weight in find_weights(model)}
    groups: dict[tuple[int, str], list[Weight]] = {}
    for node in model.graph:
        read = node.inputs[:2]
        if len(read) == 2 and read[0] is not None and read[1] is not None and read[1].name in weights:
            weight = weights[read[1].name]
            # products of one tensor whose channels lie elsewhere are another site
            groups.setdefault((id(read[0]), weight.kind), []).append(weight)
    return tuple(SitePlan(graph, tuple(_unique(group))) for group in groups.values())


def _unique(weights: Sequence[Weight]) -> list[Weight]:
    return list(dict.fromkeys(weights))
