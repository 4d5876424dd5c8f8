"""Find a graph's sites: the tensors that matrix products and convolutions read, and that convolutions produce."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
from omniport.export.graphs.trace import trace
from omniport.export.models.part import GraphDefinition
from omniport.runtime.bundle.recipes import CHANNELS_LAST, Weight

from ..calibration_file import site_name
from ..weights.tensors import find_weights


@dataclass(frozen=True)
class SitePlan:
    """One tensor and the weights that multiply it, in the graph's order; the first names it.

    With ``output`` it is what the convolution with its one weight gives.
    """

    graph: str
    weights: tuple[Weight, ...]
    output: bool = False

    @property
    def name(self) -> str:
        return site_name(self.weights[0].name, self.output)

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
    """The sites of an ONNX graph, in its order: what products read, then what convolutions give."""
    weights = {weight.name: weight for weight in find_weights(model)}
    groups: dict[tuple[int, str], list[Weight]] = {}
    for node in model.graph:
        read = node.inputs[:2]
        if len(read) == 2 and read[0] is not None and read[1] is not None and read[1].name in weights:
            weight = weights[read[1].name]
            # products of one tensor whose channels lie elsewhere are another site
            groups.setdefault((id(read[0]), weight.kind), []).append(weight)
    outputs = [weights[name] for name in map(_convolved_by, model.graph) if name in weights]
    return (
        *(SitePlan(graph, tuple(_unique(group))) for group in groups.values()),
        *(SitePlan(graph, (weight,), output=True) for weight in _unique(outputs)),
    )


def _convolved_by(node: ir.Node) -> str | None:
    """The weight of a convolution whose output is a site: grouped ones, the vocoder's filters, are never rounded."""
    group = node.attributes.get("group")
    if node.op_type != "Conv" or (group is not None and group.as_int() > 1) or node.inputs[1] is None:
        return None
    return node.inputs[1].name


def _unique(weights: Sequence[Weight]) -> list[Weight]:
    return list(dict.fromkeys(weights))
