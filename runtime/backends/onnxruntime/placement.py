"""Find the nodes that ONNX Runtime left on the CPU although it was given a GPU.

It moves shape arithmetic there on purpose, and without a word every node that the GPU's provider has no kernel for. One
such node in a decoder copies its tensors to the host and back at every step.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any

from ...bundle.parts import PARTS

_CPU = "CPUExecutionProvider"
#: what arithmetic on shapes and positions is made of
_SHAPE_OPERATORS = frozenset(
    [
        "Shape",
        "Size",
        "Gather",
        "Slice",
        "Concat",
        "Squeeze",
        "Unsqueeze",
        "Range",
        "Constant",
        "ConstantOfShape",
        "Identity",
        "Cast",
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Mod",
        "Neg",
        "Min",
        "Max",
        "ReduceProd",
        "Equal",
        "Less",
        "LessOrEqual",
        "Greater",
        "GreaterOrEqual",
        "Not",
        "And",
        "Or",
        "Where",
    ]
)


def record_placement(options: Any) -> None:
    """Let a session remember where its nodes went. Releases before 1.24 take no notice."""
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")


def host_nodes(session: Any) -> tuple[tuple[str, str], ...]:
    """(operator, name) of every node on the CPU that is no shape arithmetic; empty where ORT cannot tell."""
    ask = getattr(session, "get_provider_graph_assignment_info", None)
    if ask is None:
        return ()
    nodes = [node for part in ask() if part.ep_name == _CPU for node in part.get_nodes()]
    return tuple((node.op_type, node.name) for node in nodes if node.op_type not in _SHAPE_OPERATORS)


def warn_of_host_nodes(graph: str, provider: str, nodes: Iterable[tuple[str, str]]) -> None:
    """Warn if a graph that runs often has work on the CPU."""
    found = list(nodes)
    if not found or graph not in PARTS or not PARTS[graph].often:
        return
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(kind for kind, _ in found).most_common())
    names = ", ".join(repr(name) for _, name in found[:5])
    warnings.warn(
        f"{len(found)} nodes of graph {graph!r} run on the CPU, because {provider} has no kernels for them ({kinds}; "
        f"the first are {names}): every run copies their tensors. Upgrade ONNX Runtime, or export in another "
        "--precision",
        RuntimeWarning,
        stacklevel=2,
    )
