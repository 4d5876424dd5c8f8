"""Quantize a bundle: rewrite its graphs one at a time, and take over everything else.

The new bundle is written aside and put in place when it is complete, as an export is. Memory is a few blocks of one
weight: it depends neither on the model's size nor on its number of layers.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from omniport.runtime.backends.onnxruntime.onnx_scan import STANDARD_DOMAINS, scan_onnx
from omniport.runtime.bundle.graph_spec import GraphSpec
from omniport.runtime.bundle.listed_files import sha256_of
from omniport.runtime.bundle.manifest import SCHEMA_VERSION, FileRecord, Quantization
from omniport.runtime.bundle.reader import MANIFEST_FILE, Bundle
from omniport.runtime.bundle.staging import check_space, previous_manifest, staging, take_over, unlisted
from omniport.runtime.errors import BundleError, UsageError

from .calibration_file import Calibration
from .weights.qdq import OPSET, ActivationPass, OutputPass
from .weights.quantized_writer import ALIGNMENT, write_quantized
from .weights.recipe import Choice, choose, find_recipe, resolve
from .weights.scales import check_sites, input_scales, output_scales, smoothing
from .weights.smoothing_pass import SmoothPass
from .weights.tensors import Stored, find_weights, stored

#: progress(stage, done bytes, total bytes)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class GraphResult:
    """One graph: how many of its weights got which scheme, and its size in bytes before and after."""

    name: str
    precision: str
    schemes: Mapping[str, int]
    bytes_before: int
    bytes_after: int
    seconds: float


@dataclass
class QuantizeReport:
    """What was written."""

    path: Path
    recipe: str
    graphs: list[GraphResult] = field(default_factory=list)
    seconds: float = 0.0


def quantize_bundle(
    bundle: Path,
    out: Path,
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
        recipe: name in `omniport.calib.weights.recipe.RECIPES`.
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
    job = _Job(Path(bundle), Path(out), recipe, keep, graph_recipes or {}, calibration, progress)
    job.prepare()
    with staging(job.out) as folder:
        report = job.write(folder)
    report.seconds = time.perf_counter() - started
    return report


class _Job:
    """One run. ``prepare`` finds everything that is wrong with the input; ``write`` does the work."""

    def __init__(
        self,
        root: Path,
        out: Path,
        recipe: str,
        keep: Sequence[str],
        overrides: Mapping[str, str],
        calibration: Calibration | None,
        progress: Progress | None,
    ) -> None:
        self.recipe = find_recipe(recipe)
        self.out, self.keep, self.overrides, self.progress = out, tuple(keep), dict(overrides), progress
        self.calibration = calibration
        self.bundle = Bundle.open(root)
        self.manifest = self.bundle.manifest
        self.stage, self.done, self.total = "", 0, 0

    def prepare(self) -> None:
        """Read the graphs, without their weights, and choose."""
        if self.manifest.quantization is not None:
            raise BundleError(
                f"{self.bundle.root} is quantized already (recipe {self.manifest.quantization.recipe}): rounding twice "
                "adds up. Quantize the bundle that it was made from"
            )
        source, target = self.bundle.root.resolve(), self.out.resolve()
        if source == target or source in target.parents or target in source.parents:
            raise UsageError(f"{self.out} and the bundle {self.bundle.root} lie in each other: choose another OUT")
        previous = previous_manifest(self.out)
        self.strangers = unlisted(self.out, previous) if previous is not None else []
        specs = self.manifest.graphs
        recipe = resolve(self.recipe, self.overrides, {name: spec.compute_dtype for name, spec in specs.items()})
        sources = {name: self._sources(spec, self._model(spec)) for name, spec in specs.items()}
        found = {
            name: [weight for weight in find_weights(self._model(spec)) if weight.name in sources[name]]
            for name, spec in specs.items()
        }
        self.choices = choose(recipe, found, self.keep)
        if self.calibration is not None:
            self.calibration.check(self.manifest.source.fingerprint, self.bundle.root)
        check_sites(self.calibration, self.choices)
        self.made = [name for name in specs if any(choice.scheme.bits for choice in self.choices[name])]
        if not self.made:
            raise UsageError(f"recipe {self.recipe.name} quantizes no weight of {self.bundle.root}: nothing to do")
        for name in self.made:
            if specs[name].opset < OPSET:
                raise BundleError(
                    f"{name} is of opset {specs[name].opset}; integers in blocks need {OPSET} or later. Export with "
                    "the newest operators, or leave it out with --graph-recipe"
                )
        self.total = sum(tensor.nbytes for name in self.made for tensor in sources[name].values())
        kept = sum(self._bytes(self.manifest.files, spec) for name, spec in specs.items() if name not in self.made)
        check_space(self.out, kept + sum(self._new_bytes(name, sources[name]) for name in self.made))

    def _new_bytes(self, graph: str, sources: Mapping[str, Stored]) -> int:
        """Bytes of a graph's data file, a little more than it will have: alignment, and scales as if in FP32."""
        total = sum(tensor.nbytes for tensor in sources.values())
        for choice in self.choices[graph]:
            bits, block = choice.scheme.bits, choice.scheme.block
            if bits:
                values = math.prod(choice.weight.shape)
                scales = values // block if block else max(choice.weight.shape)
                total += values * bits // 8 + 4 * scales - sources[choice.weight.name].nbytes
        return total + 2 * ALIGNMENT * len(sources)

    def write(self, folder: Path) -> QuantizeReport:
        """Write everything into ``folder``."""
        report = QuantizeReport(self.out, self.recipe.name)
        files = dict(self.manifest.files)
        specs = dict(self.manifest.graphs)
        for name in self.made:
            for old in (specs[name].file, *specs[name].data):
                files.pop(old)
        weights = {file for spec in specs.values() for file in spec.data}
        for file in files:
            take_over(self.bundle.path(file), folder / file, link=file not in weights)
        for name in self.manifest.graphs:
            started = time.perf_counter()
            before = self._bytes(self.manifest.files, specs[name])
            if name in self.made:
                specs[name], records = self._make(specs[name], folder)
                files |= records
            report.graphs.append(
                GraphResult(
                    name,
                    specs[name].precision,
                    Counter(choice.scheme.name for choice in self.choices[name]),
                    before,
                    self._bytes(files, specs[name]),
                    time.perf_counter() - started,
                )
            )
        manifest = msgspec.structs.replace(
            self.manifest,
            schema_version=SCHEMA_VERSION,
            created_by=f"omniport {importlib.metadata.version('omniport')}",
            precision=self.recipe.name,
            graphs=specs,
            files=files,
            quantization=self._record(),
        )
        (folder / MANIFEST_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
        for stranger in self.strangers:
            if not (folder / stranger).exists():
                take_over(self.out / stranger, folder / stranger)
        return report

    def _make(self, spec: GraphSpec, folder: Path) -> tuple[GraphSpec, dict[str, FileRecord]]:
        self._enter(f"quantizing {spec.name}")
        choices = self.choices[spec.name]
        model = self._model(spec)
        path = folder / spec.file
        path.parent.mkdir(parents=True, exist_ok=True)
        sources = self._sources(spec, model)
        smoothed = SmoothPass(choices, smoothing(self.calibration, spec.name, choices), _reader(model, sources))
        smoothed(model)
        ActivationPass(choices, input_scales(self.calibration, spec.name, choices, smoothed.factors))(model)
        OutputPass(choices, output_scales(self.calibration, spec.name, choices))(model)
        data = write_quantized(model, choices, sources, path, self._advance, smoothed.factors)
        made = msgspec.structs.replace(
            spec,
            data=tuple(file.relative_to(folder).as_posix() for file in data),
            precision=_coarsest(choices),
            compute=spec.compute_dtype,
            inputs_key=_key(spec, choices, self.calibration),
        )
        self._enter("checksums")
        records = {
            file: FileRecord(size=(folder / file).stat().st_size, sha256=sha256_of(folder / file))
            for file in (made.file, *made.data)
        }
        return made, records

    def _record(self) -> Quantization:
        return Quantization(
            recipe=self.recipe.name,
            precision=self.manifest.precision,
            calibration=_digest(self.calibration),
            keep=self.keep,
            graph_recipes=self.overrides,
            layers={
                name: {choice.weight.name: choice.scheme.name for choice in choices}
                for name, choices in self.choices.items()
                if name in self.made
            },
        )

    def _model(self, spec: GraphSpec) -> ir.Model:
        """The graph, its weights left in their files."""
        path = self.bundle.path(spec.file)
        summary = scan_onnx(path)
        if summary.domains - STANDARD_DOMAINS or summary.functions:
            raise BundleError(f"{path} holds more than standard operators. Export the bundle again")
        try:
            return ir.from_proto(onnx.load(path, load_external_data=False))
        except Exception as error:  # protobuf's own exceptions share no base class
            raise BundleError(f"cannot read {path} as ONNX: {error}. Copy or export the bundle again") from error

    def _sources(self, spec: GraphSpec, model: ir.Model) -> dict[str, Stored]:
        return stored(model, Path(PurePosixPath(spec.file).parent), {f: self.bundle.path(f) for f in spec.data})

    def _bytes(self, files: Mapping[str, FileRecord], spec: GraphSpec) -> int:
        return sum(files[file].size for file in (spec.file, *spec.data))

    def _enter(self, stage: str) -> None:
        self.stage = stage
        self._advance(0)

    def _advance(self, nbytes: int) -> None:
        self.done += nbytes
        if self.progress is not None:
            self.progress(self.stage, min(self.done, self.total), self.total)


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


def _digest(calibration: Calibration | None) -> str:
    return "" if calibration is None else hashlib.sha256(calibration.encode()).hexdigest()


def _key(spec: GraphSpec, choices: Sequence[Choice], calibration: Calibration | None) -> str:
    """sha256 over what a quantized graph is made from; never the key of an export, which would take it over."""
    chosen = sorted((choice.weight.name, choice.scheme.name) for choice in choices)
    return hashlib.sha256(msgspec.json.encode([spec.inputs_key, chosen, _digest(calibration)])).hexdigest()
