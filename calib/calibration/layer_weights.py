"""Load the weights of a layer from the checkpoint just before it runs, and release them afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omniport.export.models.module import Copy, ExportModule, Rule, Transpose, WeightReader, blocks, evaluate, to_torch
from torch import nn


class LazyWeights:
    """Fills a module that lives on the meta device, piece by piece, in float32.

    Every submodule reads its own tensors in a hook before it runs. What was read stays until `release`.
    """

    def __init__(self, module: ExportModule, reader: WeightReader, prefix: str) -> None:
        self._reader = reader
        self._rules = dict(module.named_rules(prefix))
        self._held: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        for path, part in module.named_modules():
            part.register_forward_pre_hook(lambda _, __, path=path, part=part: self._fill(path, part))
        # What the part itself owns is read by its own methods, which no hook sees: constants, all of them small.
        for path, part in module.named_modules():
            if part._buffers and not part._parameters and not _runs(part):
                self._fill(path, part)
        self._fill("", module)
        self._held.clear()

    def release(self) -> None:
        """Release everything that was read."""
        for owner, name, empty in self._held:
            owner[name] = empty
        self._held.clear()

    @property
    def held_bytes(self) -> int:
        """Bytes of weights in memory that `release` would free."""
        return sum(int(owner[name].nbytes) for owner, name, _ in self._held)

    def _fill(self, path: str, part: nn.Module) -> None:
        """Read the tensors of a module, and of those inside it that are mere tables."""
        self._fill_own(path, part)
        for name, child in part.named_children():
            if not _runs(child):
                self._fill_own(f"{path}.{name}" if path else name, child)

    def _fill_own(self, path: str, part: nn.Module) -> None:
        owners: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for owner in owners:
            for name, tensor in owner.items():
                if tensor is None or not tensor.is_meta:
                    continue
                rule = self._rules[f"{path}.{name}" if path else name]
                value = read_weight(rule, self._reader).reshape(tensor.shape).to(tensor.dtype)
                owner[name] = nn.Parameter(value, requires_grad=False) if owner is part._parameters else value
                self._held.append((owner, name, tensor))


def _runs(part: nn.Module) -> bool:
    """Whether a module defines forward; containers and tables do not."""
    return type(part).forward is not nn.Module.forward


def read_weight(rule: Rule, reader: WeightReader) -> torch.Tensor:
    """A whole tensor as a rule gives it, floats in float32; [in, out] is a view of what is stored."""
    if not isinstance(rule, Copy | Transpose):
        return _tensor(np.ascontiguousarray(evaluate(rule, reader)))
    shape = reader.shape(rule.key)
    out = torch.empty(shape)
    for start, stop, rows in read_rows(rule.key, reader):
        out[start:stop] = rows
    return out.reshape(shape[0], -1).T if isinstance(rule, Transpose) else out


def read_rows(key: str, reader: WeightReader) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(start, stop, rows in float32) of a stored tensor, in blocks."""
    for start, stop in blocks(reader.shape(key), 4):
        yield start, stop, _tensor(reader.read(key, start, stop))


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    """numpy to torch, floats as float32."""
    tensor = to_torch(array)
    return tensor.float() if tensor.is_floating_point() else tensor
