"""Make a bundle one graph at a time: export a graph, quantize it, remove what it was quantized from.

The result is, byte for byte, the bundle that ``omniport export`` and ``omniport quantize`` would make between them; no
more than one graph that is not quantized lies on the disk beside it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
from omniport.export.export_options import ExportOptions
from omniport.export.export_plan import ExportPlan, NewGraph, plan_export
from omniport.export.exporter import GraphReport, WrittenGraph, make_graph, write_bundle
from omniport.export.source_code import json_key
from omniport.runtime.bundle.graph_spec import GraphSpec
from omniport.runtime.bundle.listed_files import file_record
from omniport.runtime.bundle.manifest import Quantization, encode_manifest
from omniport.runtime.bundle.reader import MANIFEST_FILE, read_manifest
from omniport.runtime.bundle.recipes import find_recipe
from omniport.runtime.bundle.staging import previous_manifest, staging, take_over, unlisted
from omniport.runtime.system.files import remove_folder
from omniport.runtime.system.progress import Progress, StageProgress

from ..calibration_file import Calibration
from ..quantizer import digest, graph_weights, rewrite_graph
from ..weights.choices import Choice, choose, resolve
from ..weights.scales import check_sites
from .deploy_record import PAGE_FILE, RECORD_FILE, DeployPlan
from .deploy_work import DeployWork, KeptWork, Meter


def plan_graphs(model: str | os.PathLike[str], plan: DeployPlan, work: DeployWork, out: Path) -> ExportPlan:
    """Plan the export, all of it new.

    Raises:
        CheckpointError: the checkpoint is unusable. ExportError: something that is no bundle at ``out``.
    """
    options = ExportOptions(plan.precision, plan.token2wav, plan.context, plan.ops, plan.kv)
    previous = previous_manifest(out)
    found = plan_export(model, work.folder / "bundle", options)
    ours = (RECORD_FILE, PAGE_FILE)
    strangers = () if previous is None else tuple(name for name in unlisted(out, previous) if name not in ours)
    return replace(found, out=out, strangers=strangers)


def make_graphs(
    export: ExportPlan, plan: DeployPlan, calibration: Calibration | None, work: DeployWork, meter: Meter
) -> dict[str, KeptWork]:
    """Make every graph that is not finished.

    Raises:
        ExportError: the disk is full. UsageError: a calibration that lacks a weight.
    """
    told = StageProgress(meter.progress, max(1, export.weight_bytes))
    kept = {}
    for name, graph in export.graphs.items():
        assert isinstance(graph, NewGraph)
        key = json_key(graph.key, plan.recipe if plan.quantized else "", digest(calibration))
        kept[name] = work.graph(name, key) or _make(export, graph, plan, calibration, work, told, meter, key)
    return kept


def _make(
    export: ExportPlan,
    graph: NewGraph,
    plan: DeployPlan,
    calibration: Calibration | None,
    work: DeployWork,
    told: StageProgress,
    meter: Meter,
    key: str,
) -> KeptWork:
    """Export a graph, quantize it if the recipe says so, and keep it in the work folder."""
    with work.new_graph(graph.definition.name) as (folder, made):
        written = make_graph(export, graph, folder, told)
        files = {written.spec.file: file_record(folder / written.spec.file)} | dict(written.files)
        kept = KeptWork(key=key, spec=written.spec, files=files, schemes={})
        choices = _choices(written.spec, folder, plan, calibration) if plan.quantized else ()
        if any(choice.scheme.bits for choice in choices):
            told.enter(f"quantizing {written.spec.name}")
            plain = folder.rename(folder.with_name("plain"))
            folder.mkdir()
            spec, files = rewrite_graph(
                written.spec, plain.joinpath, folder, choices, calibration, lambda _: told.advance(0)
            )
            meter.look()
            remove_folder(plain)
            schemes = {choice.weight.name: choice.scheme.name for choice in choices}
            kept = KeptWork(key=key, spec=spec, files=files, schemes=schemes)
        made.append(kept)
    return kept


def _choices(spec: GraphSpec, folder: Path, plan: DeployPlan, calibration: Calibration | None) -> tuple[Choice, ...]:
    recipe = resolve(find_recipe(plan.recipe), {}, {spec.name: spec.compute_dtype})
    _, weights = graph_weights(spec, folder.joinpath)
    chosen = choose(recipe, {spec.name: weights})
    check_sites(calibration, chosen)
    return chosen[spec.name]


def assemble(
    export: ExportPlan,
    plan: DeployPlan,
    calibration: Calibration | None,
    kept: Mapping[str, KeptWork],
    work: DeployWork,
    progress: Progress,
) -> None:
    """Put finished graphs and everything else into OUT, in one step.

    Raises:
        ExportError: it cannot be written, or the disk is full.
    """

    def place(_: ExportPlan, graph: NewGraph, folder: Path, __: StageProgress) -> WrittenGraph:
        name = graph.definition.name
        found = kept[name]
        for file in found.files:
            take_over(work.graph_folder(name) / file, folder / file)
        size = sum(found.files[file].size for file in found.spec.data)
        report = GraphReport(name=name, nodes=0, weight_bytes=size, seconds=0.0, skipped=False)
        return WrittenGraph(found.spec, found.files, {}, report)

    with staging(export.out) as folder:
        write_bundle(export, folder, progress, place)
        if plan.quantized:
            _say_quantized(folder, plan, calibration, kept)


def _say_quantized(
    folder: Path, plan: DeployPlan, calibration: Calibration | None, kept: Mapping[str, KeptWork]
) -> None:
    """Write into bundle.json what `omniport.calib.quantizer` would."""
    record = Quantization(
        recipe=plan.recipe,
        precision=plan.precision,
        calibration=digest(calibration),
        layers={name: found.schemes for name, found in kept.items() if found.schemes},
    )
    manifest = msgspec.structs.replace(read_manifest(folder), precision=plan.recipe, quantization=record)
    (folder / MANIFEST_FILE).write_bytes(encode_manifest(manifest))
