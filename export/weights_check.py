"""Check that a checkpoint has the weights that the graphs need, before anything is traced or written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omniport.runtime.errors import CheckpointError

from .checkpoint.checkpoint import Checkpoint
from .graphs.packed_weights import check_scales, packed_rules, stored_bytes
from .models.model_parts import parts_of
from .models.module import Compute, Constant, Copy, Rule
from .models.part import GraphDefinition


def embedding_keys(ckpt: Checkpoint) -> dict[str, str]:
    """Decoder -> key of its token-embedding table, which the bundle holds outside the graphs."""
    return {name: part.decoder.table for name, part in parts_of(ckpt.config).items() if part.decoder is not None}


def check_weights(ckpt: Checkpoint, definitions: Iterable[GraphDefinition]) -> dict[str, int]:
    """Every weight is there with the right shape, and none is left over.

    Returns:
        bytes of weights of each graph, in its precision or, about, as packed in the checkpoint.

    Raises:
        CheckpointError: names the weight that is missing, wrong-shaped, quantized, or belongs to nothing.
    """
    used, sizes = set[str](), dict[str, int]()
    for definition in definitions:
        module = definition.module()
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        rules = dict(module.named_rules(str(module.prefix)))
        for name, rule in rules.items():
            used.update(_check_rule(ckpt, rule, tensors[name]))
        packed = packed_rules(rules, ckpt.packed)
        for weight in packed.values():
            check_scales(weight, definition.precision)
        floats = sum(tensor.nbytes for name, tensor in tensors.items() if name not in packed)
        sizes[definition.name] = floats + sum(map(stored_bytes, packed.values()))
    for part in parts_of(ckpt.config).values():
        used |= part.also_reads(ckpt)
        if part.decoder is not None:
            decoder = part.decoder.sizes(ckpt.config, "static")
            ckpt.expect(part.decoder.table, (decoder.vocab_size, decoder.embedding_size))
            used.add(part.decoder.table)
    _refuse_extra(ckpt, ckpt.unused(used))
    return sizes


def _check_rule(ckpt: Checkpoint, rule: Rule, tensor: torch.Tensor) -> tuple[str, ...]:
    """Check the stored tensors behind one exported tensor; returns their keys."""
    if isinstance(rule, Constant):
        return ()
    if isinstance(rule, Copy):
        ckpt.expect(rule.key, rule.shape or tensor.shape)
        return (rule.key,)
    if isinstance(rule, Compute):
        _try_compute(ckpt, rule, tensor)
        return rule.keys
    n_in, n_out = tensor.shape
    stored = ckpt.shape(rule.key)
    # A convolution whose kernel covers its whole input is stored with its own axes and used as a matrix.
    kernel = len(stored) > 2 and stored[0] == n_out and int(np.prod(stored[1:])) == n_in
    ckpt.expect(rule.key, stored if kernel else (n_out, n_in))
    return (rule.key,)


class _Zeros:
    """A checkpoint whose weights read as zeros: a computation's shapes can be tried without reading anything."""

    def __init__(self, ckpt: Checkpoint) -> None:
        self._ckpt = ckpt

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ckpt, name)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._ckpt.shape(key)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        shape = self._ckpt.shape(key)
        return np.zeros(shape, np.float32)[start:stop] if shape else np.zeros((), np.float32)

    def forget(self, key: str, start: int = 0, stop: int | None = None) -> None:
        pass


def _try_compute(ckpt: Checkpoint, rule: Compute, tensor: torch.Tensor) -> None:
    for key in rule.keys:
        ckpt.expect(key, ckpt.shape(key))  # that it is there, and in a dtype that can be read
    try:
        fits, why = rule.fn(_Zeros(ckpt)).shape == tuple(tensor.shape), "their result has another shape"
    except (RuntimeError, ValueError, IndexError) as error:
        fits, why = False, str(error).splitlines()[0]
    if not fits:
        shapes = ", ".join(f"{key!r} {list(ckpt.shape(key))}" for key in rule.keys)
        raise CheckpointError(
            f"weights of {ckpt.name} have shapes that do not go together, or not with config.json: {shapes} ({why}). "
            "The configuration and the weights do not belong together."
        )


def _refuse_extra(ckpt: Checkpoint, extra: list[str]) -> None:
    if extra:
        shown = ", ".join(extra[:5]) + (f" and {len(extra) - 5} more" if len(extra) > 5 else "")
        raise CheckpointError(
            f"{ckpt.name} holds weights that Qwen2.5-Omni does not have: {shown}. Merge adapters into the base weights "
            "first, or remove what does not belong there."
        )
