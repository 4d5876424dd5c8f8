"""Export a checkpoint to a bundle: its graphs, and everything else that the runtime needs.

A bundle is written aside and renamed when it is complete: an interrupted export leaves nothing, and an older bundle
at the same place stays as it was until the new one is whole.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from omniport.runtime.bundle.activation_ranges import RANGES_FILE, encode_ranges
from omniport.runtime.bundle.graph_spec import GraphSpec
from omniport.runtime.bundle.listed_files import file_record
from omniport.runtime.bundle.manifest import FileRecord, Manifest, Quantization, encode_manifest
from omniport.runtime.bundle.reader import MANIFEST_FILE
from omniport.runtime.bundle.staging import check_space, staging, take_over
from omniport.runtime.system.path_arguments import paths_checked
from omniport.runtime.system.progress import Progress, StageProgress

from .bundle_parts import write_embeddings
from .checkpoint.tokenizer_json import own_tokens
from .export_options import ExportOptions
from .export_plan import ExportPlan, KeptGraph, NewGraph, plan_export
from .graphs.mixed_precision import mix
from .graphs.packed_weights import import_packed
from .graphs.trace import trace
from .graphs.writer import write_model

_LOST_SPEECH = (
    "config.json says enable_audio_output, and the checkpoint has no talker or token2wav weights: the bundle answers "
    "in text. For speech, put the thinker's weights back into the whole base model and export that."
)


@dataclass(frozen=True, kw_only=True)
class GraphReport:
    """One graph of an export.

    Attributes:
        skipped: it was taken over unchanged from the bundle that was there.
        overflowing: nodes that stay float32 because their measured range is too large for float16.
        weights: how the linear layers of a packed checkpoint are stored -> how many; empty where it packs none.
    """

    name: str
    nodes: int
    weight_bytes: int
    seconds: float
    skipped: bool
    overflowing: tuple[str, ...] = ()
    weights: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        added_tokens: those of the checkpoint's tokenizer that the published models do not have.
        notes: what the user should know of the bundle.
    """

    path: Path
    seconds: float
    graphs: tuple[GraphReport, ...]
    added_tokens: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@paths_checked
def export_checkpoint(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    precision: str = "fp32",
    token2wav: str = "fp32",
    graphs: Sequence[str] | None = None,
    max_context: int = 8192,
    ops: str = "native",
    kv: str = "static",
    keep_fp32: Sequence[str] = (),
    ranges: str | os.PathLike[str] | None = None,
    zero_points: str = "keep",
    max_pixels: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Export a checkpoint to the bundle folder ``out``.

    If ``out`` holds a bundle already, graphs are taken over whose inputs did not change (see
    `omniport.export.graphs.fingerprint`)
    and whose files are, byte for byte, what bundle.json lists. Files that the bundle does not list are kept.

    Args:
        checkpoint: folder, Hugging Face id, or ``modelscope:ID``.
        out: bundle folder.
        precision: fp32, fp16 or bf16.
        token2wav: fp32 or fp16, of DiT and vocoder, which are published in FP32.
        graphs: export these only. Others that ``out`` holds are kept, in whichever precision they are, if they were
            made from the same checkpoint with the same options.
        max_context: KV-cache capacity in tokens.
        ops: ``native`` operators of opset 24, or ``decomposed`` to opset 18 for older parsers.
        kv: form of the KV cache: ``static``, or ``concat`` for runtimes that cannot update one in place.
        keep_fp32: regular expressions searched for in ``GRAPH/module.path``: layers that stay float32 in fp16 and bf16.
        ranges: a ranges.json (`omniport.export.evaluation.measure_ranges`): what it shows to overflow
            float16 stays float32, and the
            file becomes part of the bundle. Without it, ranges that ``out`` has stay there and change nothing.
        zero_points: of a GPTQ or AWQ checkpoint: ``keep`` them with the weights, or ``separate`` them into a product of
            their own, for TensorRT.
        max_pixels: bound of the bundle's pictures and of its videos' frames, where a part of a message states none.
        fps: frames a second of its videos, likewise. max_frames: their number at most, likewise.
        progress: called with the stage, and the bytes written so far and in total.

    Raises:
        CheckpointError: the checkpoint is unusable; missing, extra and wrong-shaped weights are named.
        ExportError: wrong options, or a disk that is full; nothing is left behind.
    """
    started = time.perf_counter()
    measured = None if ranges is None else Path(ranges)
    options = ExportOptions(
        precision, token2wav, max_context, ops, kv, tuple(keep_fp32), measured, zero_points, max_pixels, fps, max_frames
    )
    plan = plan_export(checkpoint, Path(out), options, graphs, progress)
    check_space(plan.out, int(plan.weight_bytes * 1.02))
    with staging(plan.out) as folder:
        rows = write_bundle(plan, folder, progress)
    notes = (_LOST_SPEECH,) if plan.checkpoint.lost_speech else ()
    seconds = round(time.perf_counter() - started, 3)
    return ExportReport(plan.out, seconds, rows, own_tokens(plan.parts.tokenizer), notes)


@dataclass(frozen=True)
class WrittenGraph:
    """A graph in the new folder.

    Attributes:
        files: those of which size and sha256 are known.
        schemes: packed layer -> how its weights are stored.
    """

    spec: GraphSpec
    files: Mapping[str, FileRecord]
    schemes: Mapping[str, str]
    report: GraphReport


#: puts a graph of a plan into a folder
Maker = Callable[[ExportPlan, NewGraph, Path, StageProgress], WrittenGraph]


def write_bundle(
    plan: ExportPlan, folder: Path, progress: Progress | None = None, make: Maker | None = None
) -> tuple[GraphReport, ...]:
    """Write a planned bundle into an empty folder; returns what became of each graph.

    Args:
        make: puts a new graph into the folder; `make_graph` if None.

    Raises:
        ExportError: a measured range that the KV cache cannot hold, or a disk that is full.
    """
    told, make = StageProgress(progress, plan.weight_bytes), make or make_graph
    written = {
        name: _take_over(plan.out, graph, folder) if isinstance(graph, KeptGraph) else make(plan, graph, folder, told)
        for name, graph in plan.graphs.items()
    }
    told.enter("embeddings")
    records = write_embeddings(plan.checkpoint, folder, told.advance)
    plan.parts.write(folder)
    if plan.ranges is not None:
        (folder / RANGES_FILE).write_bytes(encode_ranges(plan.ranges))
    told.enter("checksums")
    for graph in written.values():
        records |= graph.files
    (folder / MANIFEST_FILE).write_bytes(encode_manifest(_manifest(plan, written, _records(folder, records))))
    for name in plan.strangers:
        if not (folder / name).exists():
            take_over(plan.out / name, folder / name)
    return tuple(graph.report for graph in written.values())


def _take_over(out: Path, graph: KeptGraph, folder: Path) -> WrittenGraph:
    spec = graph.spec
    for file in graph.files:
        take_over(out / file, folder / file)
    size = sum(graph.files[file].size for file in spec.data)
    report = GraphReport(name=spec.name, nodes=0, weight_bytes=size, seconds=0.0, skipped=True)
    return WrittenGraph(spec, graph.files, graph.schemes, report)


def make_graph(plan: ExportPlan, graph: NewGraph, folder: Path, told: StageProgress) -> WrittenGraph:
    """Trace a graph and write it below ``folder``."""
    started = time.perf_counter()
    definition, ckpt, options = graph.definition, plan.checkpoint, plan.options
    told.enter(f"tracing {definition.name}")
    model, rules = trace(definition)
    mixed = mix(model, definition.name, definition.precision, options.patterns, graph.measured)
    filled, schemes = import_packed(model, rules, ckpt.packed, options.zero_points == "separate")
    told.enter(f"writing {definition.name}")
    path = folder / "graphs" / f"{definition.name}.onnx"
    path.parent.mkdir(exist_ok=True)
    written = write_model(model, filled, ckpt, path, told.advance)
    files = {file.relative_to(folder).as_posix(): record for file, record in written.items()}
    spec = GraphSpec(
        name=definition.name,
        file=path.relative_to(folder).as_posix(),
        data=tuple(files),
        precision=f"int{ckpt.packing.bits}" if schemes and ckpt.packing else definition.precision,
        compute=definition.precision if schemes else "",
        opset=model.graph.opset_imports[""],
        inputs=definition.inputs,
        outputs=definition.outputs,
        dims=definition.dims,
        aliases=definition.aliases,
        grows=definition.grows,
        float32_values=mixed.float32_values,
        inputs_key=graph.key,
    )
    report = GraphReport(
        name=definition.name,
        nodes=len(model.graph),
        weight_bytes=sum(record.size for record in written.values()),
        seconds=round(time.perf_counter() - started, 3),
        skipped=False,
        overflowing=mixed.overflowing,
        weights=Counter(schemes.values()),
    )
    return WrittenGraph(spec, files, schemes, report)


def _records(folder: Path, known: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    """Size and sha256 of every file, in order; read are those that are not known yet."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: known.get(name) or file_record(path) for name, path in files.items()}


def _manifest(plan: ExportPlan, written: Mapping[str, WrittenGraph], files: dict[str, FileRecord]) -> Manifest:
    """The plan's manifest with graphs and files, and with what is stored as integers, if anything is."""
    made = msgspec.structs.replace(
        plan.manifest, graphs={name: graph.spec for name, graph in written.items()}, files=files
    )
    # graphs that were there already come first
    ordered = sorted(written, key=lambda name: isinstance(plan.graphs[name], NewGraph))
    layers = {name: dict(written[name].schemes) for name in ordered if written[name].schemes}
    packing = plan.checkpoint.packing
    if packing is None or not layers:
        return made
    record = Quantization(recipe=packing.method, precision=plan.options.precision, layers=layers)
    return msgspec.structs.replace(made, precision=packing.method, quantization=record)
