"""Check a coarse graph without its roundings, and the weights that it stores coarsely.

A limit that lets 8 or 4 bits pass lets other faults pass as well. So the graph's nodes, and what the host feeds them,
are compared once more in FP32 with the checkpoint's weights (`...evaluation.unrounded_graph`), and each stored weight
with the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from omniport.runtime.errors import BackendError, BundleError, ExportError, OmniportError

from ...evaluation.metrics import MIN_ENERGY
from ...evaluation.unrounded_graph import StoredWeight, Unrounded, is_rounded, open_unrounded
from ...models.part import Case
from ..comparison import Comparison, array_check
from ..context import Context
from ..types import Check

Array = NDArray[np.float32]


def unrounded_checks(context: Context, graph: str, cases: Sequence[tuple[Case, Array]]) -> Iterator[Check]:
    """One check for every case, and one for the weights of each format; none for a graph in FP32.

    Args:
        cases: each with what the reference gives.
    """
    if context.precision[graph] == "float32" and not is_rounded(context.bundle, graph):
        return
    context.progress(f"{graph}: loading without roundings")
    try:
        with open_unrounded(context.bundle, context.checkpoint, graph, context.threads) as copy:
            yield from _checks(context, graph, copy, cases)
            del copy
    except BundleError as error:
        yield Check.failed(graph, "without roundings", str(error))
    except (BackendError, ExportError, OSError) as error:
        yield Check.not_run(graph, "without roundings", str(error))


def _checks(context: Context, graph: str, copy: Unrounded, cases: Sequence[tuple[Case, Array]]) -> Iterator[Check]:
    for form in sorted({weight.format for weight in copy.weights}):
        yield _weights_check(graph, form, [weight for weight in copy.weights if weight.format == form])
    computes = context.bundle.manifest.graphs[graph].compute_dtype
    for case, wanted in cases:
        name = f"{case.name}, without roundings"
        context.progress(f"{graph}: {name}")
        try:
            got = case.ours(copy.graph)
        except OmniportError as error:
            yield Check.failed(graph, name, f"the graph did not run: {error}")
            continue
        yield array_check(graph, name, got, wanted, computes, rule="unrounded.rel_rms", logits=case.logits)


def _weights_check(graph: str, form: str, weights: Sequence[StoredWeight]) -> Check:
    """The weight that is furthest from the checkpoint's, of those that are stored in one format."""
    found = Comparison(graph, f"weights in {form}", form)
    worst = max(weights, key=lambda weight: np.nan_to_num(weight.error, nan=np.inf))
    most = max(weight.energy for weight in weights)
    found.figures = {"rel_rms": worst.error, "energy": most, "count": len(weights)}
    found.hold("rel_rms", "weights.rel_rms")
    if found.faults:
        found.fault(f"{worst.name} is not the checkpoint's, rounded")
    if not most > MIN_ENERGY:
        found.fault("all of the checkpoint's are zero, so they prove nothing")
    return found.check()
