"""GraphSpec: the contract between exported graphs and the runtime.

The runtime owns these types; ``export`` fills them in. One spec per graph says the name, dtype and symbolic shape
of every input and output, the range of every symbolic dimension, and which outputs alias which inputs (KV cache).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

#: dtype names used in specs, with their size in bytes
DTYPES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1, "bool": 1}


class DimRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Smallest, typical and largest value of one symbolic dimension. Only a cache that grows may be empty."""

    min: int
    opt: int
    max: int


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One graph input or output. ``shape`` mixes integers and symbolic dimension names."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def sized(self, dims: Mapping[str, DimRange], end: Literal["min", "opt", "max"]) -> tuple[int, ...]:
        """The shape with every symbolic dimension at one end of its range."""

        def size(dim: int | str) -> int:
            if isinstance(dim, int):
                return dim
            factor, _, name = dim.rpartition("*")
            return int(factor or 1) * int(getattr(dims[name], end))

        return tuple(map(size, self.shape))


class GraphSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One ONNX graph.

    Attributes:
        file: path of the ONNX file, relative to the bundle.
        data: paths of its external weight files, relative to the bundle.
        precision: dtype of weights and of the matrix products; ``int8`` or ``int4`` (the coarsest) for weights that are
            stored so.
        compute: dtype of the values between quantized layers; empty where it is ``precision``.
        dims: range of each symbolic dimension named in the tensor shapes. A shape may also say ``"<k>*<name>"``: k
            times that dimension.
        aliases: output name -> input name, for outputs that share the input's buffer (static KV cache).
        grows: output name -> input name, for outputs that are that input of the next call (concat KV cache).
        float32_values: values of a half-precision graph that are float32 and never narrowed, named as in ranges.json.
        inputs_key: sha256 over everything the graph was made from; a rerun of export skips graphs with an equal key.
    """

    name: str
    file: str
    data: tuple[str, ...]
    precision: str
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: dict[str, DimRange]
    aliases: dict[str, str] = {}
    inputs_key: str = ""
    grows: dict[str, str] = {}
    float32_values: tuple[str, ...] = ()
    compute: str = ""

    @property
    def cache(self) -> dict[str, str]:
        """Input that holds the KV cache -> output that is the cache after the call, in either form."""
        return {source: output for output, source in (*self.aliases.items(), *self.grows.items())}

    @property
    def compute_dtype(self) -> str:
        """Dtype in which the graph computes, whatever its weights are stored in."""
        return self.compute or self.precision

    def input(self, name: str) -> TensorSpec:
        """The input of that name (KeyError if there is none)."""
        return next_named(self.inputs, name)

    def output(self, name: str) -> TensorSpec:
        """The output of that name (KeyError if there is none)."""
        return next_named(self.outputs, name)


def next_named(specs: tuple[TensorSpec, ...], name: str) -> TensorSpec:
    """The spec of that name; KeyError lists the known names."""
    for spec in specs:
        if spec.name == name:
            return spec
    raise KeyError(f"no tensor {name!r}; known: {', '.join(s.name for s in specs)}")
