"""Check every graph alone against its transformers module, at several shapes, on random and real inputs.

All references are computed first and then released, so the largest reference part and the graphs are never in memory
at the same time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from omniport.runtime.backends.base import Graph
from omniport.runtime.bundle.parts import PARTS
from omniport.runtime.errors import OmniportError
from omniport.runtime.system.files import cache_folder

from ...evaluation.half_emulation import EmulatedBackend
from ...models.model_parts import MODEL_PARTS
from ...models.part import Case
from ..comparison import array_check, load_graph
from ..context import Context
from ..reference import array_key
from ..types import Check
from .decoding import decoder_references
from .unrounded import unrounded_checks

Array = NDArray[np.float32]


def graph_checks(context: Context) -> Iterator[Check]:
    """One check for every output of every case of every graph, two for coarse ones; stages are the graphs' names."""
    return case_checks(context, {name: list(MODEL_PARTS[name].cases(context)) for name in context.graphs})


def case_checks(context: Context, cases: Mapping[str, Sequence[Case]]) -> Iterator[Check]:
    """One check for each of the cases, given by graph."""
    wanted: dict[tuple[str, str], Array] = {}
    for graph, listed in cases.items():
        for case in listed:
            context.progress(f"{graph}: reference, {case.name}")
            wanted[graph, case.name] = _reference(context, case)
        if PARTS[graph].decodes and cache_folder() is not None:
            decoder_references(context, graph)  # for the decode checks, which follow, while the part is loaded
    context.reference.release()
    for graph, listed in cases.items():
        yield from unrounded_checks(context, graph, [(case, wanted[graph, case.name]) for case in listed])
        computes = context.bundle.manifest.graphs[graph].compute_dtype
        if computes == "float16" and context.backend.name == "ort-cpu":
            yield _rounded(context, listed[-1], wanted[graph, listed[-1].name])
        context.progress(f"{graph}: loading")
        loaded = load_graph(context.backend, graph)
        if isinstance(loaded, Check):
            yield loaded
            continue
        for case in listed:
            context.progress(f"{graph}: {case.name}")
            yield _check(context, case, loaded, wanted[graph, case.name])


def _rounded(context: Context, case: Case, wanted: Array) -> Check:
    """FP16 as a GPU computes it: on the CPU, ONNX Runtime leaves out roundings, and with them overflows."""
    case = dataclasses.replace(case, name=f"{case.name}, rounded to FP16 after every operation")
    context.progress(f"{case.graph}: {case.name}")
    backend = EmulatedBackend(context.bundle, (case.graph,), context.threads)
    try:
        loaded = load_graph(backend, case.graph)
        return loaded if isinstance(loaded, Check) else _check(context, case, loaded, wanted)
    finally:
        backend.close()


def _reference(context: Context, case: Case) -> Array:
    key = f"{case.name} {array_key(*case.inputs)}"
    return context.reference.result(case.graph, key, lambda module: {"out": case.reference(module)})["out"]


def _check(context: Context, case: Case, graph: Graph, wanted: Array) -> Check:
    try:
        got = case.ours(graph)
    except OmniportError as error:  # loaded, but refuses an input that its spec allows: broken, not absent
        return Check.failed(case.graph, case.name, f"the graph did not run: {error}")
    return array_check(case.graph, case.name, got, wanted, context.precision[case.graph], logits=case.logits)
