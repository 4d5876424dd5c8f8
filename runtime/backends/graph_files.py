"""Graph files of a bundle as a backend takes them: known to the bundle, harmless, and of the signature it promises."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from ..bundle.graph_spec import GraphSpec
from ..bundle.onnx_scan import check_graph_file
from ..errors import BackendError, BundleError

if TYPE_CHECKING:
    from ..bundle.reader import Bundle


def graph_file(bundle: Bundle, name: str) -> tuple[Path, GraphSpec]:
    """The ONNX file of a graph, whose weights are beside it, and its spec.

    Raises:
        BackendError: the bundle has no such graph.
        BundleError: the graph uses non-standard operators or data outside the bundle.
    """
    known = bundle.manifest.graphs
    if name not in known:
        raise BackendError(
            f"{bundle.root} has no graph {name!r}; it has {', '.join(known) or 'none'}. "
            "Export it again without --graphs, or with this graph among them"
        )
    spec = known[name]
    path = bundle.path(spec.file)
    check_graph_file(path, spec)
    for file in spec.data:
        bundle.path(file)
    return path, spec


def check_signature(spec: GraphSpec, inputs: Collection[str], outputs: Collection[str]) -> None:
    """A file's inputs and outputs are those of the GraphSpec, by name.

    Raises:
        BundleError: they are not.
    """
    for kind, found, tensors in (("inputs", inputs, spec.inputs), ("outputs", outputs, spec.outputs)):
        expected = {tensor.name for tensor in tensors}
        if set(found) != expected:
            raise BundleError(
                f"graph {spec.name!r} has {kind} {sorted(found)}; bundle.json says {sorted(expected)}. Export it again"
            )
