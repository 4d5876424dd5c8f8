"""Trace a decoder layer by layer, and name the first layer outside tolerance.

The hidden state after every layer becomes an output of a copy of the graph in memory. The copy runs in ONNX Runtime on
the CPU, whatever backend is validated, with the weights read from the bundle's own files; BF16 graphs run as emulation
copies.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from omniport.runtime.bundle.graph_spec import GraphSpec, TensorSpec
from omniport.runtime.bundle.parts import decoders
from omniport.runtime.errors import BackendError, ExportError, OmniportError, UsageError
from omniport.runtime.system.host import physical_cores
from torch import nn

from ...evaluation.half_emulation import is_bfloat16, load_copy, open_graph
from ...models.decoder_stack import reference_hidden, reference_stack
from ...models.model_parts import MODEL_PARTS
from ...models.signals import generator, random_positions, random_tokens
from ..comparison import array_check
from ..context import Context
from ..reference import array_key
from ..types import FAIL, Check

Array = NDArray[np.float32]

LENGTH = 24
_RESIDUAL = re.compile(r"model\.layers\.(\d+)/Add(?:_\d+)?")


def trace_layers(context: Context, graph: str | None = None) -> Iterator[Check]:
    """One check per layer, first to last, then for the final norm where the graph gives it.

    The first check that fails says that its layer is the first to leave tolerance, later ones name it.

    Args:
        graph: ``thinker`` or ``talker``; the first of them among the context's graphs if None.

    Raises:
        UsageError: there is no such decoder.
    """
    traceable = [part.name for part in decoders()]
    name = graph or next((g for g in context.graphs if g in traceable), "")
    if name not in traceable or name not in context.bundle.manifest.graphs:
        raise UsageError(
            f"cannot trace {name or 'this bundle'!r}: {' and '.join(traceable)} are traced, if the bundle holds them"
        )
    rng = generator(f"trace {name}")
    embeds = random_tokens(context.bundle, name, LENGTH, rng)[None]
    positions = random_positions(LENGTH, rng)[:, None]
    context.progress(f"{name}: reference, layer by layer")
    wanted = _reference(context, name, embeds, positions)
    context.reference.release()
    context.progress(f"{name}: layer by layer")
    try:
        got = _states(context, name, embeds, positions)
    except OmniportError as error:
        refused = Check.not_run if isinstance(error, BackendError) else Check.failed
        yield refused(name, "trace", str(error))
        return
    first = ""
    for place, state in wanted.items():
        if place not in got:
            continue
        title = f"{place}, hidden state"
        check = array_check(name, title, got[place], state, context.precision[name], rule="layer.rel_rms")
        if check.status == FAIL:
            said = f"follows {first}, the first out of tolerance" if first else f"{place} is the first out of tolerance"
            first = first or place
            check = msgspec.structs.replace(check, message=f"{said}: {check.message}")
        yield check


def _reference(context: Context, graph: str, embeds: Array, positions: NDArray[np.int64]) -> dict[str, Array]:
    part = MODEL_PARTS[graph]

    def run(module: nn.Module) -> Mapping[str, torch.Tensor]:
        states: dict[str, torch.Tensor] = {}

        def keep(place: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
                states[place] = output[0] if isinstance(output, tuple) else output

            return hook

        layers = reference_stack(module, part).get_submodule("layers")
        hooks = [layer.register_forward_hook(keep(_place(i))) for i, layer in enumerate(layers.children())]
        if part.decoder is not None and part.decoder.projection:
            projection = module.get_submodule(part.decoder.projection)
            hooks.append(projection.register_forward_hook(keep("projection")))
        try:
            states["final norm"] = reference_hidden(module, part, embeds, positions)
        finally:
            for handle in hooks:
                handle.remove()
        return states

    found = context.reference.result(graph, f"every layer {array_key(embeds, positions)}", run)
    order = ["projection", *(_place(i) for i in range(len(found))), "final norm"]
    return {place: found[place] for place in order if place in found}


def _place(layer: int) -> str:
    return f"layer {layer}"


def _states(context: Context, name: str, embeds: Array, positions: NDArray[np.int64]) -> dict[str, Array]:
    """The graph's hidden states by place, [1, S, H]."""
    spec = context.bundle.manifest.graphs[name]
    path = context.bundle.path(spec.file)
    model, spec = load_copy(path, spec, emulate=is_bfloat16(spec))
    places = _add_outputs(model)
    threads = physical_cores() if context.threads is None else context.threads
    graph = open_graph(model, _with_outputs(spec, places), path.parent, threads)
    feeds: dict[str, NDArray[Any]] = {
        "inputs_embeds": embeds,
        "position_ids": positions,
        "kv_positions": np.arange(LENGTH, dtype=np.int64),
        "write_index": np.zeros(1, np.int64),
    }
    outputs = graph.run(feeds, graph.new_cache(context.bundle.manifest.kv.max_context))
    found = {place: outputs[output] for place, output in places.items()}
    return found | ({"final norm": outputs["hidden"]} if "hidden" in outputs else {})


def _add_outputs(model: ir.Model) -> dict[str, str]:
    """Make each layer's last residual sum an output in FP32; place -> name of the output.

    Raises:
        ExportError: the graph's nodes do not carry the names of the layers that they came from.
    """
    ends: dict[str, ir.Node] = {}
    for node in model.graph:
        if (match := _RESIDUAL.fullmatch(node.name or "")) is not None:
            ends[_place(int(match[1]))] = node  # the later one: the sum after the MLP
        elif (node.name or "").startswith("thinker_to_talker_proj/") and node.op_type == "Add":
            ends["projection"] = node
    if not ends:
        raise ExportError(
            "no node is named 'model.layers.N/Add', so layers cannot be told apart; export the bundle again"
        )
    names = {}
    for place, node in ends.items():
        cast = ir.node("Cast", [_rounded(node.outputs[0])], {"to": ir.DataType.FLOAT}, name=f"trace/{place}")
        value = cast.outputs[0]
        value.name = names[place] = f"trace {place}"
        value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(["batch", "new_tokens", None])
        model.graph.append(cast)
        model.graph.outputs.append(value)
    return names


def _rounded(value: ir.Value) -> ir.Value:
    """The value as the next layer reads it: past the two Cast of an emulation copy."""
    for node, _ in value.uses():
        if (node.name or "").endswith("/round"):
            ((up, _index),) = node.outputs[0].uses()
            return up.outputs[0]
    return value


def _with_outputs(spec: GraphSpec, places: Mapping[str, str]) -> GraphSpec:
    extra = tuple(TensorSpec(name, "float32", ("batch", "new_tokens", "width")) for name in places.values())
    return msgspec.structs.replace(spec, outputs=(*spec.outputs, *extra))
