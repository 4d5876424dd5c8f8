"""A backend that combines two: engines, or OpenVINO, for some graphs, ONNX Runtime for the rest."""

from __future__ import annotations

from collections.abc import Collection

from .base import Backend, Graph


class CompositeBackend(Backend):
    """Two backends over one bundle. A KV cache belongs to its graph, so graphs can run in different ones.

    Args:
        chosen: runs the graphs named ``held``.
        others: runs all the others.

    Attributes:
        name: says which graphs run where, ``tensorrt (thinker, talker) + ort-cuda``.
    """

    def __init__(self, chosen: Backend, held: Collection[str], others: Backend) -> None:
        self.name = f"{chosen.name} ({', '.join(held)}) + {others.name}"
        self.host_nodes = others.host_nodes  # an engine runs on the GPU alone, OpenVINO on the CPU
        self._chosen, self._held, self._others = chosen, held, others

    def graph(self, name: str) -> Graph:
        return self._member(name).graph(name)

    def at_once(self) -> int | None:
        """The bound of the members that have one: they share the same cores."""
        return _least(self._chosen.at_once(), self._others.at_once())

    def shares_cores(self, graph: str) -> bool:
        """As its member says: graphs on a GPU are not held back by those on the CPU."""
        return self._member(graph).shares_cores(graph)

    def max_context(self) -> int | None:
        return _least(self._chosen.max_context(), self._others.max_context())

    def close(self) -> None:
        self._chosen.close()
        self._others.close()

    def _member(self, graph: str) -> Backend:
        return self._chosen if graph in self._held else self._others


def _least(*bounds: int | None) -> int | None:
    return min((bound for bound in bounds if bound is not None), default=None)
