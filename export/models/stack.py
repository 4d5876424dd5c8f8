"""Base class of parts that are a stack of layers and can be run layer by layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .module import ExportModule

#: what every layer gets beside the state: tensors, and for decoders the KV caches
Context = tuple[Any, ...]


class Stack(ExportModule):
    """A part whose ``forward`` is ``enter``, every layer in order, ``leave``.

    Calibration takes all of its samples through one layer before it loads the next
    (`omniport.calib.calibration.layer_runner`); a graph
    is traced from ``forward``, which goes the same way.
    """

    @property
    def depth(self) -> int:
        """Number of layers."""
        raise NotImplementedError

    def enter(self, *inputs: Any) -> tuple[Tensor, Context]:
        """The inputs of ``forward`` -> the first layer's state, and what every layer gets beside it."""
        raise NotImplementedError

    def run_layer(self, index: int, x: Tensor, context: Context) -> Tensor:
        """The state after a layer."""
        raise NotImplementedError

    def leave(self, x: Tensor, context: Context) -> Tensor:
        """The state after the last layer -> the output."""
        raise NotImplementedError

    def run_layers(self, x: Tensor, context: Context) -> Tensor:
        """The state after all layers."""
        for index in range(self.depth):
            x = self.run_layer(index, x, context)
        return x
