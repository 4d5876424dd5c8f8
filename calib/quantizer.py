"""Quantize a bundle: rewrite its graphs one at a time, and take over everything else.

The new bundle is written aside and put in place when it is complete, as an export is. Memory is a few blocks of one
weight: it depends neither on the model's size nor on its number of layers.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from omniport.export.source_code import json_key
from omniport.runtime.bundle.data_file import ALIGNMENT
from omniport.runtime.bundle.graph_spec import GraphSpec
from omniport.runtime.bundle.listed_files import file_record
from omniport.runtime.bundle.manifest import SCHEMA_VERSION, FileRecord, Quantization
from omniport.runtime.bundle.onnx_scan import check_graph_file
from omniport.runtime.bundle.reader import MANIFEST_FILE, Bundle
from omniport.runtime.bundle.recipes import Weight, find_recipe
from omniport.runtime.bundle.staging import check_space, previous_manifest, staging, take_over, unlisted
from omniport.runtime.errors import BundleError, UsageError
from omniport.runtime.system.foreign import foreign
from omniport.runtime.system.path_arguments import paths_checked
from omniport.runtime.system.progress import Progress, StageProgress

from .calibration_file import Calibration
from .weights.choices import Choice, choose, resolve
from .weights.qdq import ActivationPass, OutputPass, opset_with
from .weights.quantized_writer import write_quantized
from .weights.scales import check_sites, input_scales, output_scales, smoothing
from .weights.smoothing_pass import SmoothPass
from .weights.tensors import Stored, find_weights, stored

#: where a file of a graph lies, by its name in the bundle
Locate = Callable[[str], Path]


@dataclass(frozen=True)
class GraphResult:
    """One graph: how many of its weights got which scheme, and its size in bytes before and after."""

    name: str
    precision: str
    weights: Mapping[str, int]
    bytes_before: int
    bytes_after: int
    seconds: float


@dataclass(frozen=True)
class QuantizeReport:
    """What was written."""

    path: Path
    recipe: str
    seconds: float
    graphs: tuple[GraphResult, ...]


@dataclass(frozen=True, kw_only=True)
class QuantizationPlan:
    """What quantizing a bundle is going to write.

    Attributes:
        recipe: its name.
        keep, graph_recipes, calibration: as they were asked for.
        choices: graph -> the scheme of each of its weights.
        strangers: files at ``out`` that no bundle lists, and that stay there.
        weight_bytes: of the graphs to rewrite.
        disk_bytes: what the new bundle takes, or a little less.
    """

    bundle: Bundle
    out: Path
    recipe: str
    keep: tuple[str, ...]
    graph_recipes: Mapping[str, str]
    calibration: Calibration | None
    choices: Mapping[str, tuple[Choice, ...]]
    strangers: tuple[str, ...]
    weight_bytes: int
    disk_bytes: int

    @property
    def rewritten(self) -> tuple[str, ...]:
        """Graphs of which a weight is quantized."""
        return _rewritten(self.choices)


@paths_checked
def quantize(
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str],
    recipe: str,
    *,
    keep: Sequence[str] = (),
    graph_recipes: Mapping[str, str] | None = None,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Quantize a bundle.

    A bundle that is at ``out`` already is replaced; files there that it does not list are kept.

    Args:
        bundle: folder of a bundle that is not quantized, in any precision.
        out: folder of the new bundle.
        recipe: name in `omniport.runtime.bundle.recipes.RECIPES`.
        keep: patterns of weights (``graph/weight``) that stay as they are.
        graph_recipes: graph -> another recipe's name, ``none``, or the precision it has.
        calibration: needed by recipes that round what weights multiply; others smooth by it.
        progress: called with the stage, and the bytes of weights read so far and in total.

    Raises:
        BundleError: the bundle is damaged, or quantized already.
        UsageError: no such recipe, a graph or pattern that fits nothing, nothing to do, or a calibration that is
            missing, of another checkpoint, or without a weight that needs it.
        ExportError: ``out`` cannot be written, holds something else, or the disk is full.
    """
    started = time.perf_counter()
    plan = plan_quantization(bundle, out, recipe, keep=keep, graph_recipes=graph_recipes or {}, calibration=calibration)
    check_space(plan.out, plan.disk_bytes)
    with staging(plan.out) as folder:
        graphs = write_bundle(plan, folder, progress)
    return QuantizeReport(plan.out, plan.recipe, round(time.perf_counter() - started, 3), graphs)


def plan_quantization(
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str],
    recipe: str,
    *,
    keep: Sequence[str] = (),
    graph_recipes: Mapping[str, str] | None = None,
    calibration: Calibration | None = None,
) -> QuantizationPlan:
    """Read the graphs, without their weights, and choose; arguments and errors as of `quantize`."""
    chosen, out = find_recipe(recipe), Path(out)
    opened = Bundle.open(bundle)
    manifest, specs = opened.manifest, opened.manifest.graphs
    if manifest.quantization is not None:
        raise BundleError(
            f"{opened.root} is quantized already (recipe {manifest.quantization.recipe}): rounding twice adds up. "
            "Quantize the bundle that it was made from"
        )
    _require_apart(opened.root, out)
    previous = previous_manifest(out)
    overrides = dict(graph_recipes or {})
    resolved = resolve(chosen, overrides, {name: spec.compute_dtype for name, spec in specs.items()})
    sources, weights = {}, {}
    for name, spec in specs.items():
        sources[name], weights[name] = graph_weights(spec, opened.path)
    choices = choose(resolved, weights, tuple(keep))
    if calibration is not None:
        calibration.check(manifest.source.fingerprint, opened.root)
    check_sites(calibration, choices)
    rewritten = _rewritten(choices)
    if not rewritten:
        raise UsageError(f"recipe {recipe} quantizes no weight of {opened.root}: nothing to do")
    kept = sum(_bytes(manifest.files, spec) for name, spec in specs.items() if name not in rewritten)
    return QuantizationPlan(
        bundle=opened,
        out=out,
        recipe=chosen.name,
        keep=tuple(keep),
        graph_recipes=overrides,
        calibration=calibration,
        choices=choices,
        strangers=() if previous is None else tuple(unlisted(out, previous)),
        weight_bytes=sum(tensor.nbytes for name in rewritten for tensor in sources[name].values()),
        disk_bytes=kept + sum(_new_bytes(choices[name], sources[name]) for name in rewritten),
    )


def write_bundle(plan: QuantizationPlan, folder: Path, progress: Progress | None = None) -> tuple[GraphResult, ...]:
    """Write a planned bundle into an empty folder; returns what became of each graph.

    Raises:
        BundleError: weights that cannot be read or are not finite.
    """
    told = StageProgress(progress, plan.weight_bytes)
    manifest = plan.bundle.manifest
    specs, files = dict(manifest.graphs), _take_over(plan, folder)
    rows = []
    for name, spec in manifest.graphs.items():
        started = time.perf_counter()
        if name in plan.rewritten:
            told.enter(f"quantizing {name}")
            specs[name], records = rewrite_graph(
                spec, plan.bundle.path, folder, plan.choices[name], plan.calibration, told.advance
            )
            files |= records
        rows.append(
            GraphResult(
                name=name,
                precision=specs[name].precision,
                weights=Counter(choice.scheme.name for choice in plan.choices[name]),
                bytes_before=_bytes(manifest.files, spec),
                bytes_after=_bytes(files, specs[name]),
                seconds=round(time.perf_counter() - started, 3),
            )
        )
    made = msgspec.structs.replace(
        manifest,
        schema_version=SCHEMA_VERSION,
        created_by=f"omniport {importlib.metadata.version('omniport')}",
        precision=plan.recipe,
        graphs=specs,
        files=files,
        quantization=_record(plan),
    )
    (folder / MANIFEST_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(made), indent=1) + b"\n")
    for stranger in plan.strangers:
        if not (folder / stranger).exists():
            take_over(plan.out / stranger, folder / stranger)
    return tuple(rows)


def _take_over(plan: QuantizationPlan, folder: Path) -> dict[str, FileRecord]:
    """Everything that stays as it is, put into the new folder."""
    manifest = plan.bundle.manifest
    replaced = {file for name in plan.rewritten for file in _files(manifest.graphs[name])}
    weights = {file for spec in manifest.graphs.values() for file in spec.data}
    files = {file: record for file, record in manifest.files.items() if file not in replaced}
    for file in files:
        take_over(plan.bundle.path(file), folder / file, link=file not in weights)
    return files


def graph_weights(spec: GraphSpec, path: Locate) -> tuple[dict[str, Stored], list[Weight]]:
    """Where the tensors of a graph lie that are not inside it, and those of them that could be quantized.

    Args:
        path: where a file of the graph lies, by its name.

    Raises:
        BundleError: it cannot be read.
    """
    model = _model(path, spec)
    sources = _sources(path, spec, model)
    return sources, [weight for weight in find_weights(model) if weight.name in sources]


def rewrite_graph(
    spec: GraphSpec,
    path: Locate,
    folder: Path,
    choices: Sequence[Choice],
    calibration: Calibration | None,
    advance: Callable[[int], None],
) -> tuple[GraphSpec, dict[str, FileRecord]]:
    """Write a quantized graph below ``folder``; returns its spec, and size and sha256 of its files.

    Args:
        path: where a file of the graph that is read lies, by its name.
        advance: called with the bytes of weights that were read.

    Raises:
        BundleError: weights that cannot be read or are not finite.
    """
    model = _model(path, spec)
    opset = model.graph.opset_imports[""] = opset_with(choices, model.graph.opset_imports[""])
    file = folder / spec.file
    file.parent.mkdir(parents=True, exist_ok=True)
    sources = _sources(path, spec, model)
    smoothed = SmoothPass(choices, smoothing(calibration, spec.name, choices), _reader(model, sources))
    smoothed(model)
    ActivationPass(choices, input_scales(calibration, spec.name, choices, smoothed.factors))(model)
    OutputPass(choices, output_scales(calibration, spec.name, choices))(model)
    written = write_quantized(model, choices, sources, file, advance, smoothed.factors)
    data = {name.relative_to(folder).as_posix(): record for name, record in written.items()}
    made = msgspec.structs.replace(
        spec,
        data=tuple(data),
        precision=_coarsest(choices),
        compute=spec.compute_dtype,
        opset=opset,
        inputs_key=_key(spec, choices, calibration),
    )
    return made, {spec.file: file_record(file)} | data


def _record(plan: QuantizationPlan) -> Quantization:
    return Quantization(
        recipe=plan.recipe,
        precision=plan.bundle.manifest.precision,
        calibration=digest(plan.calibration),
        keep=plan.keep,
        graph_recipes=dict(plan.graph_recipes),
        layers={name: {c.weight.name: c.scheme.name for c in plan.choices[name]} for name in plan.rewritten},
    )


def _rewritten(choices: Mapping[str, Sequence[Choice]]) -> tuple[str, ...]:
    return tuple(name for name, row in choices.items() if any(choice.scheme.bits for choice in row))


def _require_apart(root: Path, out: Path) -> None:
    source, target = root.resolve(), out.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise UsageError(f"{out} and the bundle {root} are one inside the other: choose another OUT")


def _new_bytes(choices: Sequence[Choice], sources: Mapping[str, Stored]) -> int:
    """Bytes of a graph's data file, a little more than it will have: alignment, and scales as if in FP32."""
    total = sum(tensor.nbytes for tensor in sources.values())
    for choice in choices:
        bits, block = choice.scheme.bits, choice.scheme.block
        if bits:
            values = math.prod(choice.weight.shape)
            scales = values // block if block else max(choice.weight.shape)
            total += values * bits // 8 + 4 * scales - sources[choice.weight.name].nbytes
    return total + 2 * ALIGNMENT * len(sources)


def _model(locate: Locate, spec: GraphSpec) -> ir.Model:
    """The graph, its weights left in their files."""
    path = locate(spec.file)
    check_graph_file(path, spec)
    with foreign(BundleError, f"cannot read {path} as ONNX", "Copy or export the bundle again"):
        return ir.from_proto(onnx.load(path, load_external_data=False))


def _sources(locate: Locate, spec: GraphSpec, model: ir.Model) -> dict[str, Stored]:
    return stored(model, Path(PurePosixPath(spec.file).parent), {file: locate(file) for file in spec.data})


def _files(spec: GraphSpec) -> tuple[str, ...]:
    return (spec.file, *spec.data)


def _bytes(files: Mapping[str, FileRecord], spec: GraphSpec) -> int:
    return sum(files[file].size for file in _files(spec))


def _reader(model: ir.Model, sources: Mapping[str, Stored]) -> Callable[[str], NDArray[Any]]:
    """Reads a small initializer, wherever it lies."""

    def read(name: str) -> NDArray[Any]:
        if name in sources:
            return sources[name].read(0, sources[name].shape[0])
        value = model.graph.initializers[name].const_value
        assert value is not None
        return value.numpy()

    return read


def _coarsest(choices: Sequence[Choice]) -> str:
    """Format of the fewest bits, integers before floats."""
    return min((c.scheme for c in choices if c.scheme.bits), key=lambda s: (s.bits, s.float8)).format


def digest(calibration: Calibration | None) -> str:
    """sha256 of a calibration file; empty without one."""
    return "" if calibration is None else hashlib.sha256(calibration.encode()).hexdigest()


def _key(spec: GraphSpec, choices: Sequence[Choice], calibration: Calibration | None) -> str:
    """sha256 over what a quantized graph is made from; never the key of an export, which would take it over."""
    chosen = sorted((choice.weight.name, choice.scheme.name) for choice in choices)
    return json_key(spec.inputs_key, chosen, digest(calibration))
