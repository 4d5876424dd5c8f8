"""Quantize a bundle so that its decoders meet a goal (SQNR or KL)."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from omniport.runtime.backends.onnxruntime.backend import OrtBackend
from omniport.runtime.bundle.parts import decoders
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import CheckFailed, UsageError

from .quantize import QuantizeReport
from .report.recorded_calls import Calls, Loss, loss_of, record, replay
from .search import SearchResult, Target, parts_of, search

Progress = Callable[[str, int, int], None]
#: writes a quantized bundle: folder, patterns of weights to keep, graph -> recipe, progress
Quantizer = Callable[[Path, Sequence[str], Mapping[str, str], Progress | None], QuantizeReport]


class TargetReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was found and written.

    Attributes:
        target: as text.
        searches: decoder -> its search.
        reached: decoder -> loss of the bundle that was written, measured on it.
        keep: the patterns of weights that were kept for it.
        written: the report of quantizing.
    """

    target: str
    searches: dict[str, SearchResult]
    reached: dict[str, Loss]
    keep: tuple[str, ...]
    written: QuantizeReport


def quantize_to_target(
    bundle: Path,
    out: Path,
    quantize: Quantizer,
    target: Target,
    *,
    keep: Sequence[str] = (),
    graph_recipes: Mapping[str, str] | None = None,
    data: Path | None = None,
    progress: Progress | None = None,
) -> TargetReport:
    """Quantize, with the fewest parts of thinker and talker kept as they are that meet the target.

    The target holds for each decoder by itself, on recorded calls (`omniport.calib.report.recorded_calls`) in ONNX
    Runtime on the CPU.
    A measurement quantizes one decoder into a folder beside ``out`` and loads it; time and disk are those of that, for
    each of the measurements that `omniport.calib.search.search` tells of. Memory is one loaded graph.

    Args:
        bundle: not quantized.
        quantize: quantizes ``bundle`` by some recipe.
        keep, graph_recipes: kept, and given another recipe, in any case.
        data: JSON lines with ``messages``; built-in conversations without.
        progress: called with what is measured, and measurements done and in all.

    Raises:
        UsageError: the target cannot be met, no decoder is quantized, or ``data`` is not usable.
        CheckFailed: the bundle as written misses the target; nothing is left at ``out``.
        BundleError, ExportError: as `omniport.calib.quantize.quantize_bundle`.
    """
    opened, chosen = Bundle.open(bundle), dict(graph_recipes or {})
    folder = out.absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    searches: dict[str, SearchResult] = {}
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.search-", dir=folder) as room:
        work = _Work(opened, Path(room), quantize, tuple(keep), chosen)
        quantized = work.quantized()
        calls = record(opened, data=data, sound=False, progress=progress).calls
        for name in quantized:
            searches[name] = work.search(name, calls[name], target, progress)
        kept = tuple(work.pattern(name, part) for name, found in searches.items() for part in found.kept)
        whole = Path(room) / "whole"
        quantize(whole, (*keep, *kept), chosen, None)
        reached = {name: _measure(whole, name, calls[name]) for name in quantized}
        missed = [name for name, loss in reached.items() if not target.met(loss)]
        if missed:
            raise CheckFailed(
                f"the {missed[0]} as written has {reached[missed[0]].sqnr_db:.2f} dB, although the same choice met "
                f"{target} while it was searched for. Report this as a bug"
            )
        written = quantize(out, (*keep, *kept), chosen, progress)
    return TargetReport(target=str(target), searches=searches, reached=reached, keep=kept, written=written)


class _Work:
    """Bundles that a search writes, one at a time."""

    def __init__(
        self, bundle: Bundle, room: Path, quantize: Quantizer, keep: tuple[str, ...], recipes: dict[str, str]
    ) -> None:
        self.bundle, self.room, self.quantize, self.keep, self.recipes = bundle, room, quantize, keep, recipes
        self.parts: dict[str, dict[str, tuple[str, ...]]] = {}

    def quantized(self) -> list[str]:
        """Decoders that the recipe quantizes; finds their parts.

        Raises:
            UsageError: there is none.
        """
        first = self.room / "first"
        self.quantize(first, self.keep, self.recipes, None)
        record = Bundle.open(first).manifest.quantization
        assert record is not None
        for part in decoders():
            name, layers = part.name, record.layers.get(part.name, {})
            weights = [weight for weight, scheme in layers.items() if scheme != "none"]
            if weights:
                self.parts[name] = parts_of(weights)
        if not self.parts:
            raise UsageError("the recipe quantizes neither thinker nor talker, and a target is about their logits")
        return list(self.parts)

    def pattern(self, name: str, part: str) -> str:
        """Pattern of the weights of a part."""
        return f"^{name}/{re.escape(part)}\\."

    def search(self, name: str, calls: Calls, target: Target, progress: Progress | None) -> SearchResult:
        def measure(kept: frozenset[str]) -> Loss:
            out = self.room / "variant"
            others = {graph: "none" for graph in self.bundle.manifest.graphs if graph != name}
            patterns = [self.pattern(name, part) for part in self.parts[name] if part in kept]
            own = {graph: recipe for graph, recipe in self.recipes.items() if graph == name}
            self.quantize(out, (*self.keep, *patterns), others | own, None)
            return _measure(out, name, calls)

        def told(what: str, done: int, total: int) -> None:
            if progress is not None:
                progress(f"{name}: {what}", done, total)

        return search(list(self.parts[name]), measure, target, told)


def _measure(root: Path, name: str, calls: Calls) -> Loss:
    backend = OrtBackend(Bundle.open(root))
    try:
        return loss_of(name, replay(backend.graph(name), name, calls).outputs, calls.wanted)
    finally:
        backend.close()


def curve_json(report: TargetReport) -> dict[str, Any]:
    """The trade-off as plain JSON values: each part's damage alone, the measured curve, what was kept and reached."""
    return {
        "target": report.target,
        "decoders": {
            name: {
                "damages": [{"part": d.part, **msgspec.to_builtins(d.loss)} for d in found.damages],
                "curve": [{"kept": p.kept, **msgspec.to_builtins(p.loss)} for p in found.curve],
                "kept": list(found.kept),
                "reached": msgspec.to_builtins(report.reached[name]),
            }
            for name, found in report.searches.items()
        },
    }
