"""Run a part in FP32 layer by layer: all calls pass a layer before the weights of the next are read.

So memory holds one layer, one call's activations and a little of the spool, whatever the number of layers and samples.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from omniport.export.models.audio_encoder import GeluConv
from omniport.export.models.bigvgan import BigVgan
from omniport.export.models.module import ExportModule, Stack, WeightReader
from omniport.export.models.ops import snake_inputs
from omniport.export.models.part import GraphDefinition
from omniport.export.models.talker import Talker
from omniport.runtime.system import host
from torch import Tensor

from .layer_weights import LazyWeights
from .observers import Observer
from .sites import SitePlan

#: a part is read once, not again and again, if its weights in float32 take no more than this, or than this share of the
#: memory that is free: the talker is called for every code that it makes
RESIDENT_BYTES, RESIDENT_SHARE = 1 << 29, 1 / 3
#: bytes of activations that stay in memory
MEMORY_BYTES = 64 << 20
#: a vocoder's filters by what `snake_inputs` gives; up_odd reads what up_even does
_FILTERS = ("up_even", "down_even", "down_odd")


@dataclass
class Call:
    """One call of a part: the inputs of its ``enter``, and for a decoder the caches of its layers, which it changes."""

    inputs: tuple[Tensor, ...]
    caches: list[Tensor] = field(default_factory=list)


class Spool:
    """Tensors by key, beyond a number of bytes in files of a folder.

    Args:
        memory: bytes kept in memory; 0 writes everything, so that another process can go on with it.
    """

    def __init__(self, folder: Path, memory: int = MEMORY_BYTES) -> None:
        self.folder = folder
        self._memory = memory
        self._held: dict[str, Any] = {}
        self._sizes: dict[str, int] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, key: str, value: Any) -> None:
        """Keep a tensor, or a tuple of tensors and numbers, in place of what was there."""
        self._forget(key)
        size = _nbytes(value)
        if sum(self._sizes.values()) + size <= self._memory:
            self._held[key], self._sizes[key] = value, size
        else:
            torch.save(value, self._path(key))

    def get(self, key: str) -> Any:
        """What was kept."""
        if key in self._held:
            return self._held[key]
        return torch.load(self._path(key), weights_only=True)

    def drop(self, key: str) -> None:
        """Forget it."""
        self._forget(key)
        self._path(key).unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget everything."""
        self._held.clear()
        self._sizes.clear()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def _forget(self, key: str) -> None:
        self._held.pop(key, None)
        self._sizes.pop(key, None)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.pt"


class LayerRunner:
    """One part, its weights read as they are needed, its sites observed.

    Attributes:
        observers: by the name of the site. One that is taken out must not be reached again.
        module: the part, on the meta device but for what is being used.
        caches: of each call that is under way.
    """

    def __init__(
        self,
        definition: GraphDefinition,
        reader: WeightReader,
        sites: Sequence[SitePlan],
        folder: Path,
        *,
        unseen: Sequence[str] = (),
        memory: int = MEMORY_BYTES,
        again: bool = True,
    ) -> None:
        """Args:
        folder: for activations. memory: bytes of them that need not go there.
        unseen: sites that the caller observes by itself.
        again: calls will follow calls, so that a small part had better stay in memory.
        """
        self.name = definition.name
        self.module = cast(Stack, definition.module())
        self.caches: list[list[Tensor]] = []
        self._spool = Spool(folder, memory)
        self._lazy = LazyWeights(self.module, reader, str(self.module.prefix))
        self._decodes = bool(definition.past)
        size = sum(tensor.numel() * 4 for tensor in self.module.parameters())
        self._resident = again and size <= max(RESIDENT_BYTES, RESIDENT_SHARE * (host.available_memory() or 0))
        if again and not self._resident:
            host.give_back_large_blocks()
        self.observers = {site.name: _observer(site) for site in sites}
        for site in sites:
            if site.output:
                _watch_output(self.module, site, self.observers)
            elif site.name not in unseen:
                _watch(self.module, site.name, self.observers)

    def run(self, calls: Sequence[Call]) -> list[Tensor]:
        """Outputs of the calls in order: those of ``leave``, or the talker's logits."""
        self.enter(calls)
        for index in range(self.module.depth):
            self.run_layer(index)
        return list(self.leave())

    @torch.no_grad()
    def enter(self, calls: Iterable[Call]) -> None:
        """Take calls up to the first layer."""
        self.caches = []
        for number, call in enumerate(calls):
            x, context = self.module.enter(*call.inputs, *([call.caches] if self._decodes else []))
            self._spool.put(f"x0-{number}", x)
            self._spool.put(f"context-{number}", context[:-1] if self._decodes else context)
            self.caches.append(call.caches)
        self._release()

    @torch.no_grad()
    def run_layer(self, index: int, keep_caches: bool = True) -> None:
        """Take all calls through one layer. What they were before stays until the layer after it.

        Args:
            keep_caches: for calls that another one follows.
        """
        for number, held in enumerate(self.caches):
            caches = held if keep_caches else list(held)
            x = self._spool.get(f"x{index % 2}-{number}")
            x = self.module.run_layer(index, x, self._context(number, caches))
            self._spool.put(f"x{(index + 1) % 2}-{number}", x)
        self._release()

    @torch.no_grad()
    def leave(self) -> Iterator[Tensor]:
        """Outputs of the calls in order."""
        for number, caches in enumerate(self.caches):
            x = self._spool.get(f"x{self.module.depth % 2}-{number}")
            out = self.module.leave(x, self._context(number, caches))
            yield self.module.logits(out) if isinstance(self.module, Talker) else out
        self._release()

    def close(self) -> None:
        """Release weights and activations."""
        self._lazy.release()
        self._spool.clear()

    def _context(self, number: int, caches: list[Tensor]) -> tuple[Any, ...]:
        context: tuple[Any, ...] = self._spool.get(f"context-{number}")
        return (*context, caches) if self._decodes else context

    def _release(self) -> None:
        if not self._resident:
            self._lazy.release()


def _observer(site: SitePlan) -> Observer:
    name = f"{site.graph}/{site.weights[0].name}"
    return Observer(name, site.axis, site.smooths, "output" if site.output else "input")


def _watch_output(module: ExportModule, site: SitePlan, observers: Mapping[str, Observer]) -> None:
    """Observe what a convolution gives."""
    part = module.get_submodule(site.weights[0].name.rpartition(".")[0])
    # GELU is part of the audio encoder's: what comes before it is computed again
    again = part.convolve if isinstance(part, GeluConv) else None
    part.register_forward_hook(
        lambda _, inputs, out: observers[site.name].see(out if again is None else again(*inputs))
    )


def _watch(module: ExportModule, weight: str, observers: Mapping[str, Observer]) -> None:
    """Observe the input of the product with this weight."""
    path, _, own = weight.rpartition(".")
    part = module.get_submodule(path)
    if own == "weight":
        part.register_forward_pre_hook(lambda _, inputs: observers[weight].see(inputs[0]))
        return
    # The filters around a snake are one operation while tracing: what they see is computed again.
    assert isinstance(module, BigVgan)
    seen = _FILTERS.index(own)
    part.register_forward_pre_hook(lambda part, inputs: observers[weight].see(_filtered(part, *inputs)[seen]))


def _filtered(part: Any, x: Tensor) -> tuple[Tensor, ...]:
    return snake_inputs(x, part.up_even, part.up_odd, part.rate, part.height)


def _nbytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return int(value.untyped_storage().nbytes())
    return sum(map(_nbytes, value)) if isinstance(value, tuple | list) else 0
