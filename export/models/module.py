"""Base class of exported modules: which checkpoint tensors fill each parameter, and constants.

Modules are built on the meta device; a ``Rule`` per parameter says which checkpoint tensor fills it and how. Rules
are carried out one tensor at a time, in row blocks, so that memory stays far below the size of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from omniport.runtime.errors import CheckpointError
from torch import nn

from .ops import linear

Array = NDArray[Any]
#: source bytes handled at once while converting or transposing
BLOCK_BYTES = 32 << 20
#: what every layer gets beside the state: tensors, and for decoders the KV caches
Context = tuple[Any, ...]


class WeightReader(Protocol):
    """What rules need of a checkpoint (``export.checkpoint.Checkpoint`` is one)."""

    def shape(self, key: str) -> tuple[int, ...]: ...

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Array: ...

    def forget(self, key: str, start: int = 0, stop: int | None = None) -> None: ...


@dataclass(frozen=True)
class Copy:
    """The stored tensor as it is.

    Attributes:
        shape: as stored, where that is not the exported one.
    """

    key: str
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Transpose:
    """The stored [out, ...] tensor, flattened to [out, in], as [in, out]: what MatMul wants."""

    key: str


@dataclass(frozen=True)
class Compute:
    """Computed from stored tensors (small ones: they are held whole)."""

    keys: tuple[str, ...]
    fn: Callable[[WeightReader], Array]


@dataclass(frozen=True)
class Constant:
    """Known without any stored tensor."""

    value: Array


Rule = Copy | Transpose | Compute | Constant


class ExportModule(nn.Module):
    """Base of the modules that are exported.

    A subclass sets ``rules[name]`` for parameters whose checkpoint name or layout differs from its own, and registers
    constants with :meth:`constant`. Names default to the module path, which is the checkpoint's wherever possible.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rules: dict[str, Rule] = {}
        #: parameter -> its shape in the checkpoint, where that has other axes
        self.stored: dict[str, tuple[int, ...]] = {}
        self.following: set[str] = set()

    def constant(self, name: str, value: Array | torch.Tensor, follow: bool = False) -> None:
        """Register a buffer with a known value (kept aside while the module lives on the meta device).

        ``follow``: the buffer takes the precision of the weights; otherwise it keeps its own dtype.
        """
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        self.computed(name, array.shape, Constant(array), follow, torch.from_numpy(array).dtype)

    def computed(
        self,
        name: str,
        shape: tuple[int, ...],
        rule: Rule,
        follow: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Register a buffer whose value ``rule`` gives."""
        self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        self.rules[name] = rule
        if follow:
            self.following.add(name)

    def set_precision(self, dtype: torch.dtype) -> None:
        """Give every parameter, and the buffers that follow, this dtype (meta tensors: no data moves)."""
        for module in self.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.to(dtype), requires_grad=False)
            if isinstance(module, ExportModule):
                for name in module.following:
                    module._buffers[name] = cast(torch.Tensor, module._buffers[name]).to(dtype)

    def named_rules(self, prefix: str) -> Iterator[tuple[str, Rule]]:
        """(tensor name, rule) of every parameter and buffer; ``prefix`` is where the module sits in the checkpoint."""
        tensors = dict(self.named_parameters()) | dict(self.named_buffers())
        for path, module in self.named_modules():
            for own in (*module._parameters, *module._buffers):
                name = f"{path}.{own}" if path else own
                if name not in tensors:
                    continue
                rule = module.rules.get(own) if isinstance(module, ExportModule) else None
                if rule is not None:
                    yield name, _prefixed(rule, prefix)
                elif own == "weight" and isinstance(module, Linear):
                    yield name, Transpose(prefix + name)
                else:
                    stored = module.stored.get(own) if isinstance(module, ExportModule) else None
                    yield name, Copy(prefix + name, stored)


def _prefixed(rule: Rule, prefix: str) -> Rule:
    """Rules of modules name keys relative to the graph's root, written with a leading ``@``."""
    if isinstance(rule, Copy | Transpose) and rule.key.startswith("@"):
        return replace(rule, key=prefix + rule.key[1:])
    return rule


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

    def enter(self, *inputs: Any) -> tuple[torch.Tensor, Context]:
        """The inputs of ``forward`` -> the first layer's state, and what every layer gets beside it."""
        raise NotImplementedError

    def run_layer(self, index: int, x: torch.Tensor, context: Context) -> torch.Tensor:
        """The state after a layer."""
        raise NotImplementedError

    def leave(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        """The state after the last layer -> the output."""
        raise NotImplementedError

    def run_layers(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        """The state after all layers."""
        for index in range(self.depth):
            x = self.run_layer(index, x, context)
        return x


class Linear(ExportModule):
    """y = x @ weight + bias with the weight stored [in, out], so that the graph holds a bare MatMul."""

    def __init__(self, n_in: int, n_out: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = linear(x, self.weight)
        return y if self.bias is None else y + self.bias


def refuse_not_finite(block: torch.Tensor, name: str | None, dtype: torch.dtype) -> None:
    """Every weight is looked at once, while it is written.

    Raises:
        CheckpointError: a block of it holds NaN or infinity.
    """
    # The largest magnitude is NaN or infinite if any value is, and needs no mask as large as the block.
    if not dtype.is_floating_point or block.numel() == 0:
        return
    low, high = (float(v) for v in torch.aminmax(block))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CheckpointError(
            f"weight {name!r} holds values that are not finite in {str(dtype).removeprefix('torch.')}. If it is finite "
            "in the checkpoint, export with --precision fp32 or bf16; otherwise download the checkpoint again."
        )


def blocks(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[int, int]]:
    """Row ranges of a tensor, each about BLOCK_BYTES."""
    if not shape:
        yield 0, 1
        return
    row = max(1, int(np.prod(shape[1:], dtype=np.int64)) * itemsize)
    step = max(1, BLOCK_BYTES // row)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def evaluate(rule: Rule, reader: WeightReader) -> Array:
    """The whole tensor a rule describes (small tensors; export streams instead)."""
    if isinstance(rule, Constant):
        return rule.value
    if isinstance(rule, Compute):
        return rule.fn(reader)
    value = reader.read(rule.key)
    return value.reshape(value.shape[0], -1).T if isinstance(rule, Transpose) else value


def to_torch(array: NDArray[Any]) -> torch.Tensor:
    """numpy (bfloat16 included) to torch; only a read-only array (constants of a cached graph) is copied."""
    if not array.flags.writeable:
        array = array.copy()
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """torch (bfloat16 included) to numpy without a copy."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


@contextmanager
def torch_threads(most: int) -> Iterator[None]:
    """Let torch compute in no more threads than these. Sums come out the same on every machine in one thread only."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(most, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)
