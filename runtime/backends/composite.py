"""A backend that combines others: engines for the graphs that have one, ONNX Runtime for the rest."""

from __future__ import annotations

from .base import Backend, Graph
from .tensorrt.backend import TrtBackend


class MixedBackend:
    """Two backends over one bundle. A KV cache belongs to its graph, so graphs can run in different ones.

    Attributes:
        name: says which graphs run where, ``tensorrt (thinker, talker) + ort-cuda``.
    """

    def __init__(self, engines: TrtBackend, others: Backend) -> None:
        self.engines, self.others = engines, others
        self.name = f"{engines.name} ({', '.join(engines.engines)}) + {others.name}"

    def graph(self, name: str) -> Graph:
        """See ``Backend.graph``."""
        return (self.engines if name in self.engines.engines else self.others).graph(name)

    def max_context(self) -> int | None:
        """Most tokens that the engines' KV caches hold."""
        return self.engines.max_context()

    def close(self) -> None:
        """Release every graph."""
        self.engines.close()
        self.others.close()
