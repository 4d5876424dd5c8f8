"""The record of a model part: its graph, its reference, and the cases on which the two are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from omniport.runtime.backends.base import Graph
from omniport.runtime.bundle.graph_spec import DimRange, TensorSpec
from omniport.runtime.bundle.manifest import SolverSpec
from omniport.runtime.bundle.parts import Part
from omniport.runtime.bundle.reader import Bundle
from torch import Tensor, nn

from ..checkpoint.checkpoint import Checkpoint
from .module import ExportModule

Array = NDArray[Any]
#: gives the reference's output for the inputs that it was made from
Asked = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Settings:
    """What a graph depends on besides the checkpoint's configuration.

    Attributes:
        precision: dtype of weights and caches, ``float16``.
        max_context: largest KV-cache capacity.
        solver: the schedule that the DiT's tables are folded for.
        tied: the thinker's head is its embedding table.
        kv_form: ``static`` or ``concat`` (`KvSpec.form`).
    """

    precision: str
    max_context: int
    solver: SolverSpec
    tied: bool
    kv_form: str = "static"


@dataclass(frozen=True)
class GraphDefinition:
    """What to trace, and all that the bundle says about it.

    Attributes:
        build: makes the module; called with the meta device as default.
        geometry: every size and constant of the architecture, as text.
        inputs: as in the GraphSpec. A symbolic dimension may be ``"<k>*<name>"``: k times another one.
        past: trailing inputs that the module takes as one list (KV cache).
        ops: ``native``, or ``decomposed`` for nodes that older parsers know (`omniport.export.graphs.lowering`).
    """

    name: str
    precision: str
    geometry: str
    build: Callable[[], ExportModule]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: dict[str, DimRange]
    past: int = 0
    aliases: dict[str, str] = field(default_factory=dict)
    grows: dict[str, str] = field(default_factory=dict)
    ops: str = "native"

    def module(self) -> ExportModule:
        """The module on the meta device, in its precision, with nothing loaded."""
        with torch.device("meta"):
            module = self.build()
        module.set_precision(getattr(torch, self.precision))
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        return module.eval()


class Subject(Protocol):
    """A bundle that is compared with the checkpoint that it was exported from."""

    @property
    def bundle(self) -> Bundle: ...

    @property
    def checkpoint(self) -> Checkpoint: ...

    @property
    def full(self) -> bool:
        """Whether the long suite was asked for."""

    @property
    def max_context(self) -> int:
        """Tokens that a decoder's cache can hold."""


@dataclass(frozen=True)
class Case:
    """One comparison of a graph with its reference.

    Attributes:
        ours: runs the graph -> array.
        reference: runs the reference's module -> array of the same shape.
        inputs: everything that the reference's result depends on besides the weights.
        logits: the arrays are logits.
    """

    graph: str
    name: str
    ours: Callable[[Graph], Array]
    reference: Asked
    inputs: tuple[Array, ...] = ()
    logits: bool = False


@dataclass(frozen=True)
class ReferenceModule:
    """The module that a graph is compared with: it shares no code with the one that is exported.

    Attributes:
        make: makes it from the checkpoint's configuration, in float32, its weights not yet filled.
        prefix: of its parameters' names in the checkpoint.
        keys: names in the checkpoint of parameters that do not follow the prefix.
        unused: beginning of the names of parameters that its forward never uses, which the checkpoint may lack.
    """

    make: Callable[[Any], nn.Module]
    prefix: str
    keys: Callable[[Checkpoint], Mapping[str, str]] = lambda _: {}
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a language model, and the form of its KV cache (`KvSpec.form`).

    Attributes:
        embedding_size: width of its token embeddings and of what it is fed.
    """

    hidden_size: int
    embedding_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float
    mrope_section: tuple[int, ...]
    rms_norm_eps: float
    kv_form: str = "static"


@dataclass(frozen=True)
class DecoderPart:
    """What a language model says of itself besides what every part does.

    Attributes:
        sizes: from the checkpoint's configuration, and the form of the KV cache.
        table: key of its token-embedding table in the checkpoint.
        stack, projection, head: submodules of the reference: its decoder (the module itself where empty), what turns
            embeddings into the decoder's input (nothing where empty), and what gives logits.
        gives_hidden: its graph gives the hidden states, too.
    """

    sizes: Callable[[Any, str], DecoderConfig]
    table: str
    head: str
    stack: str = ""
    projection: str = ""
    gives_hidden: bool = False


@dataclass(frozen=True)
class ModelPart:
    """One part of the model.

    Attributes:
        contract: what the runtime knows of it.
        define: its graph, from the checkpoint's configuration.
        cases: what it is compared on: smallest, typical and odd shapes, random inputs and real ones; in the full suite
            large ones too. The last case is not large.
        describe: fields of the manifest that it answers for.
        also_reads: weights of the checkpoint that it uses besides those of the graph.
        ask: for what a benchmark was given (`omniport.runtime.bench.workloads.Job.given`), the same of the reference;
            None where a benchmark has nothing to compare with.
        decoder: what a language model says besides; None for other parts.
    """

    contract: Part
    define: Callable[[Any, Settings], GraphDefinition]
    reference: ReferenceModule
    cases: Callable[[Subject], Iterator[Case]]
    describe: Callable[[Checkpoint, SolverSpec], Mapping[str, Any]] = lambda _ckpt, _solver: {}
    also_reads: Callable[[Checkpoint], set[str]] = lambda _: set()
    ask: Callable[[Mapping[str, Any], Bundle, Checkpoint], Asked] | None = None
    decoder: DecoderPart | None = None

    @property
    def name(self) -> str:
        """As the runtime and the bundle call it."""
        return self.contract.name


def qwen_module(class_name: str, path: str) -> Callable[[Any], nn.Module]:
    """Makes one of transformers' Qwen2.5-Omni modules from the configuration at ``path``, as its class makes it.

    Its parameters are not written: memory that nothing has touched is not used.
    """

    def make(config: Any) -> nn.Module:
        from transformers.initialization import no_init_weights
        from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as reference

        for section in path.split("."):
            config = getattr(config, section)
        config._attn_implementation = "sdpa"
        with torch.no_grad(), no_init_weights():
            module: nn.Module = getattr(reference, class_name)(config).float().eval()
        return module

    return make


def largest(subject: Subject, graph: str, dim: str, most: int) -> tuple[int, ...]:
    """The largest value of a dimension that is compared, which the full suite alone does: at most ``most``."""
    return (min(subject.bundle.manifest.graphs[graph].dims[dim].max, most),) if subject.full else ()


def f32(name: str, *shape: int | str) -> TensorSpec:
    """A float32 tensor of a graph's border."""
    return TensorSpec(name, "float32", shape)


def i64(name: str, *shape: int | str) -> TensorSpec:
    """An int64 tensor of a graph's border."""
    return TensorSpec(name, "int64", shape)
