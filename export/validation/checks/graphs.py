"""Check every graph alone against its transformers module, at several shapes, on random and real inputs.

References come first, all of them, and are then released: the largest reference part and the graphs are never in memory
at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from omniport.runtime.backends.base import Backend, Graph
from omniport.runtime.bundle.parts import PARTS
from omniport.runtime.errors import BackendError, BundleError, OmniportError
from omniport.runtime.system.files import cache_folder

from ...evaluation.half_emulation import EmulatedBackend
from ...evaluation.metrics import MAX_SATURATED, MIN_ENERGY, Figures, compare, logit_figures
from ...models.part import Case
from ...models.registry import MODEL_PARTS
from ..context import Context
from ..reference import array_key
from ..tolerances import limit
from ..types import FAIL, NOT_RUN, PASS, Check
from .decode_reference import decoder_references

Array = NDArray[np.float32]


def graph_checks(context: Context) -> Iterator[Check]:
    """One check for every output of every case of every graph; stages are the graphs' names."""
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


def load_graph(backend: Backend, name: str) -> Graph | Check:
    """The backend's graph, or the check that says why there is none: not run, or failed if the bundle is at fault."""
    try:
        return backend.graph(name)
    except BackendError as error:
        return Check(stage=name, name="load", status=NOT_RUN, message=str(error))
    except BundleError as error:
        return Check(stage=name, name="load", status=FAIL, message=str(error))


def _check(context: Context, case: Case, graph: Graph, wanted: Array) -> Check:
    try:
        got = case.ours(graph)
    except OmniportError as error:  # loaded, but refuses an input that its spec allows: broken, not absent
        return Check(stage=case.graph, name=case.name, status=FAIL, message=f"the graph did not run: {error}")
    return array_check(case.graph, case.name, got, wanted, context.precision[case.graph], logits=case.logits)


def array_check(
    stage: str,
    name: str,
    got: Array,
    wanted: Array,
    precision: str,
    *,
    rule: str = "graph.rel_rms",
    logits: bool = False,
) -> Check:
    """Compare an array with its reference.

    Passes if the reference is finite, varies, has energy and is not saturated, and ours is finite and within the
    limits of ``rule`` and, for logits [N, V], of ``logits.kl``.
    """
    if got.shape != wanted.shape:
        message = f"shape {got.shape}; the reference has {wanted.shape}"
        return Check(stage=stage, name=name, status=FAIL, message=message)
    if not np.isfinite(wanted).all():
        return Check(stage=stage, name=name, status=FAIL, message="the reference is not finite, so it proves nothing")
    figures = compare(got, wanted)
    limits = {"rel_rms": limit(rule, precision)}
    if logits:
        figures |= logit_figures(got, wanted) if figures["finite"] else {"kl": float("inf")}
        limits["kl"] = limit("logits.kl", precision)
    problems = _problems(figures)
    for figure, bound in limits.items():
        value = figures[figure]
        if not (isinstance(value, float) and value <= bound.value):
            problems.append(f"{figure} is {value:.3g}, at most {bound.value:g} is allowed")
    if problems:
        problems.append(_where(got, wanted))
    return Check(
        stage=stage,
        name=name,
        status=FAIL if problems else PASS,
        figures=figures,
        limits={figure: bound.value for figure, bound in limits.items()},
        reasons={figure: bound.reason for figure, bound in limits.items()},
        message="; ".join(problems),
    )


def _problems(figures: Figures) -> list[str]:
    problems = []
    value = figures["energy"]
    if not (isinstance(value, float) and value > MIN_ENERGY):
        problems.append(
            f"the reference is silent (RMS {value:.1e}; above {MIN_ENERGY:g} is needed), so it proves nothing"
        )
    elif not figures["varies"]:
        problems.append("the reference is constant, so it proves nothing")
    elif float(figures["saturation"] or 0) > MAX_SATURATED:
        problems.append(f"{figures['saturation']:.0%} of the reference is at its largest value, so it proves nothing")
    if not figures["finite"]:
        problems.append("the output holds values that are not finite")
    return problems


def _where(got: Array, wanted: Array) -> str:
    """The first value that is not finite, else the one that is furthest off."""
    bad = ~np.isfinite(got)
    flat = int(bad.argmax()) if bad.any() else int(np.abs(got - wanted).argmax())
    at = tuple(int(i) for i in np.unravel_index(flat, got.shape))
    what = "first at" if bad.any() else "furthest off at"
    return f"{what} {list(at)}: {got[at]:.6g}, the reference has {wanted[at]:.6g}"
