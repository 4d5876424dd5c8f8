"""Quantize a bundle so that its decoders meet a goal (SQNR or KL)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from omniport.runtime.backends.onnxruntime.backend import OrtBackend
from omniport.runtime.bundle.parts import decoders
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import CheckFailed, UsageError
from omniport.runtime.system.files import scratch_folder
from omniport.runtime.system.path_arguments import paths_checked
from omniport.runtime.system.progress import Progress

from .calibration_file import Calibration
from .quantizer import QuantizationPlan, QuantizeReport, plan_quantization, quantize
from .report.recorded_calls import Calls, Loss, loss_of, record, replay
from .search import Goal, SearchResult, parts_of, search


class GoalReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was found and written.

    Attributes:
        goal: as text.
        searches: decoder -> its search.
        reached: decoder -> loss of the bundle that was written, measured on it.
        keep: the patterns of weights that were kept for it.
        written: the report of quantizing.
    """

    goal: str
    searches: dict[str, SearchResult]
    reached: dict[str, Loss]
    keep: tuple[str, ...]
    written: QuantizeReport

    def as_json(self) -> dict[str, Any]:
        """As JSON values: each part's damage alone, the measured curve, what was kept and reached."""
        return {
            "target": self.goal,
            "decoders": {
                name: {
                    "damages": [{"part": d.part, **msgspec.to_builtins(d.loss)} for d in found.damages],
                    "curve": [{"kept": p.kept, **msgspec.to_builtins(p.loss)} for p in found.curve],
                    "kept": list(found.kept),
                    "reached": msgspec.to_builtins(self.reached[name]),
                }
                for name, found in self.searches.items()
            },
        }


@paths_checked
def quantize_to_goal(
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str],
    recipe: str,
    goal: Goal,
    *,
    keep: Sequence[str] = (),
    graph_recipes: Mapping[str, str] | None = None,
    calibration: Calibration | None = None,
    data: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> GoalReport:
    """Quantize, with the fewest parts of thinker and talker kept as they are that meet the goal.

    The goal holds for each decoder by itself, on recorded calls (`omniport.calib.report.recorded_calls`) in ONNX
    Runtime on the CPU.
    A measurement quantizes one decoder into a folder beside ``out`` and loads it; time and disk are those of that, for
    each of the measurements that `omniport.calib.search.search` tells of. Memory is one loaded graph.

    Args:
        bundle, out, recipe, calibration: as for `omniport.calib.quantizer.quantize`.
        keep, graph_recipes: kept, and given another recipe, in any case.
        data: JSON lines with ``messages``; built-in conversations without.
        progress: called with what is measured, and measurements done and in all.

    Raises:
        UsageError: the goal cannot be met, no decoder is quantized, or ``data`` is not usable.
        CheckFailed: the bundle as written misses the goal; nothing is left at ``out``.
        BundleError, ExportError: as `omniport.calib.quantizer.quantize`.
    """
    plan = plan_quantization(bundle, out, recipe, keep=keep, graph_recipes=graph_recipes, calibration=calibration)
    parts = _decoder_parts(plan)
    folder = plan.out.absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    with scratch_folder(f".{plan.out.name}.search-", folder) as room:
        calls = record(plan.bundle, data=data, sound=False, progress=progress).calls
        searches = {}
        for name, held in parts.items():
            measured = _Variants(plan, name, calls[name], room / "variant")
            searches[name] = search(list(held), measured.loss, goal, _prefixed(name, progress))
        kept = tuple(_pattern(name, part) for name, found in searches.items() for part in found.kept)
        whole = room / "whole"
        _quantize(plan, whole, kept, plan.graph_recipes)
        reached = {name: _measure(whole, name, calls[name]) for name in parts}
        missed = [name for name, loss in reached.items() if not goal.met(loss)]
        if missed:
            raise CheckFailed(
                f"the {missed[0]} as written has {reached[missed[0]].sqnr_db:.2f} dB, although the same choice met "
                f"{goal} while it was searched for. Report this as a bug"
            )
        written = _quantize(plan, plan.out, kept, plan.graph_recipes, progress)
    return GoalReport(goal=str(goal), searches=searches, reached=reached, keep=kept, written=written)


def _decoder_parts(plan: QuantizationPlan) -> dict[str, dict[str, tuple[str, ...]]]:
    """Decoder -> the parts of it that the recipe quantizes -> their weights.

    Raises:
        UsageError: there is none.
    """
    names = [part.name for part in decoders()]
    weights = {name: [c.weight.name for c in plan.choices.get(name, ()) if c.scheme.bits] for name in names}
    if not any(weights.values()):
        raise UsageError("the recipe quantizes neither thinker nor talker, and a target is about their logits")
    return {name: parts_of(found) for name, found in weights.items() if found}


class _Variants:
    """Bundles in which one decoder alone is quantized, at one place, one at a time."""

    def __init__(self, plan: QuantizationPlan, name: str, calls: Calls, place: Path) -> None:
        self._plan, self._name, self._calls, self._place = plan, name, calls, place

    def loss(self, kept: frozenset[str]) -> Loss:
        """What the decoder loses with these parts kept and its others quantized."""
        name, wanted = self._name, self._plan.graph_recipes
        recipes = {graph: "none" for graph in self._plan.bundle.manifest.graphs if graph != name}
        if name in wanted:
            recipes[name] = wanted[name]
        _quantize(self._plan, self._place, [_pattern(name, part) for part in sorted(kept)], recipes)
        return _measure(self._place, name, self._calls)


def _quantize(
    plan: QuantizationPlan, out: Path, kept: Sequence[str], recipes: Mapping[str, str], progress: Progress | None = None
) -> QuantizeReport:
    """The planned bundle with more weights kept, or other graphs left out."""
    return quantize(
        plan.bundle.root,
        out,
        plan.recipe,
        keep=(*plan.keep, *kept),
        graph_recipes=recipes,
        calibration=plan.calibration,
        progress=progress,
    )


def _pattern(name: str, part: str) -> str:
    """Pattern of the weights of a part."""
    return f"^{name}/{re.escape(part)}\\."


def _prefixed(name: str, progress: Progress | None) -> Progress | None:
    return progress and (lambda what, done, total: progress(f"{name}: {what}", done, total))


def _measure(root: Path, name: str, calls: Calls) -> Loss:
    backend = OrtBackend(Bundle.open(root))
    try:
        return loss_of(name, replay(backend.graph(name), name, calls).outputs, calls.wanted)
    finally:
        backend.close()
