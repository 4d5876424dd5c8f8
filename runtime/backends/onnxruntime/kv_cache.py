"""KV caches of the ONNX Runtime backend: static, updated in place, or growing."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...bundle.graph_spec import DTYPES, GraphSpec
from ...errors import BackendError, BundleError, OmniportError

#: device type, number and vendor (NVIDIA's PCI id) of the memory that a static cache lies in
_MEMORY: Mapping[str, tuple[Any, ...]] = {"cuda": ("cuda", 0), "tensorrt-rtx": ("gpu", 0, 0x10DE)}
#: onnx.TensorProto.BFLOAT16, for which numpy has no type
_BFLOAT16 = 16


class OrtCache(ABC):
    """KV cache of one decoder: a named OrtValue [1, Hkv, tokens, D] for each ``past_*`` input.

    Args:
        session: the decoder's InferenceSession.
        device: ``cpu``, ``cuda`` or ``tensorrt-rtx`` (the provider's plugin).
        module: onnxruntime.
    """

    def __init__(self, session: Any, spec: GraphSpec, capacity: int, device: str, module: Any) -> None:
        self.capacity = capacity
        self.values: dict[str, Any] = {}
        self._session, self._spec, self._device, self._ort = session, spec, device, module

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes allocated now."""

    @abstractmethod
    def bind(self, write_index: int) -> Any:
        """An IOBinding for a call that appends at ``write_index``; the cache's outputs are bound first, in order."""

    @abstractmethod
    def take(self, outputs: Mapping[str, Any]) -> None:
        """Keep what a call that went well returned: OrtValues by output name."""

    def _shape(self, source: str, tokens: int) -> tuple[list[int], str]:
        """Shape [B, Hkv, tokens, D] and dtype of an input; one conversation, so B = 1."""
        tensor = self._spec.input(source)
        heads, width = tensor.shape[1], tensor.shape[3]
        if not isinstance(heads, int) or not isinstance(width, int):
            raise BundleError(f"input {source!r} has shape {tensor.shape}; fixed heads and width were expected")
        return [1, heads, tokens, width], tensor.dtype


class StaticCache(OrtCache):
    """Allocated once for ``capacity`` tokens; input and output are one buffer, so that it is updated in place."""

    def __init__(self, session: Any, spec: GraphSpec, capacity: int, device: str, module: Any) -> None:
        super().__init__(session, spec, capacity, device, module)
        self.binding = session.io_binding()
        self._nbytes = 0
        for source, output in spec.cache.items():
            shape, dtype = self._shape(source, capacity)
            if device == "cpu":
                # Zero pages cost nothing until written; OrtValue uses this memory as it is.
                value = module.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))
            else:
                kind = _BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype).type
                value = module.OrtValue.ortvalue_from_shape_and_type(shape, kind, *_MEMORY[device])
            self.binding.bind_ortvalue_input(source, value)
            self.binding.bind_ortvalue_output(output, value)
            self.values[source] = value
            self._nbytes += math.prod(shape) * DTYPES[dtype]

    @property
    def nbytes(self) -> int:
        """Bytes allocated (touched only as far as the cache fills, on the CPU)."""
        return self._nbytes

    def bind(self, write_index: int) -> Any:
        """The binding made at the start: the graph finds the place by itself."""
        return self.binding

    def take(self, outputs: Mapping[str, Any]) -> None:
        """Nothing: the values were written where they lie."""


class GrowingCache(OrtCache):
    """What the last call returned, cut to the tokens that still count: each call gives a longer cache (concat form)."""

    def __init__(self, session: Any, spec: GraphSpec, capacity: int, device: str, module: Any) -> None:
        super().__init__(session, spec, capacity, device, module)
        self._length = 0
        for source in spec.cache:
            shape, dtype = self._shape(source, 0)
            if device not in ("cpu", "cuda") or dtype == "bfloat16":  # cutting it back goes through numpy
                raise BackendError(
                    f"graph {spec.name!r} has a growing KV cache in {dtype}, which ONNX Runtime cannot cut back on "
                    f"{device}: export with --kv static, or build a TensorRT engine"
                )
            self.values[source] = self._value(np.zeros(shape, dtype))

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens held."""
        shapes = (self._shape(source, self._length) for source in self.values)
        return sum(math.prod(shape) * DTYPES[dtype] for shape, dtype in shapes)

    def bind(self, write_index: int) -> Any:
        """A new binding over the first ``write_index`` tokens.

        Raises:
            OmniportError: the cache does not hold that many.
        """
        if write_index > self._length:
            raise OmniportError(
                f"write_index is {write_index}, and the KV cache of {self._spec.name!r} holds {self._length} tokens; "
                "at most that many was expected"
            )
        if write_index < self._length:
            self.values = {s: self._value(v.numpy()[:, :, :write_index]) for s, v in self.values.items()}
            self._length = write_index
        binding = self._session.io_binding()
        for source, output in self._spec.cache.items():
            binding.bind_ortvalue_input(source, self.values[source])
            binding.bind_output(output, self._device)
        return binding

    def take(self, outputs: Mapping[str, Any]) -> None:
        """The longer cache becomes the cache."""
        self.values = {source: outputs[output] for source, output in self._spec.cache.items()}
        self._length = int(next(iter(self.values.values())).shape()[2])

    def _value(self, array: np.ndarray[Any, Any]) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._device, 0)
