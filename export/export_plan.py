"""Plan an export: find every error in its input before anything is traced or written."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from omniport.runtime.bundle.activation_ranges import RANGES_FILE, Ranges, limit, read_ranges
from omniport.runtime.bundle.graph_spec import GraphSpec
from omniport.runtime.bundle.listed_files import file_record
from omniport.runtime.bundle.manifest import FileRecord, Manifest, SolverSpec
from omniport.runtime.bundle.parts import decoders
from omniport.runtime.bundle.staging import previous_manifest, unlisted
from omniport.runtime.errors import ExportError
from omniport.runtime.speech.ode import rk4_schedule
from omniport.runtime.system.progress import Progress, StageProgress

from .bundle_parts import SmallParts, base_manifest, embedding_bytes, small_parts
from .checkpoint.checkpoint import Checkpoint
from .export_options import ExportOptions
from .graphs.fingerprint import graph_key, graph_whole, source_key
from .models.model_parts import graph_definitions
from .models.part import GraphDefinition
from .option_values import PRECISIONS, TOKEN2WAV_PRECISIONS
from .tensorrt.builder_api import INT8_BLOCKS_SINCE
from .weights_check import check_weights


@dataclass(frozen=True)
class NewGraph:
    """A graph to trace and write.

    Attributes:
        key: over everything it is made from (`omniport.export.graphs.fingerprint`).
        measured: largest magnitude by value, which decides what stays float32 in float16; None if nothing was measured.
    """

    definition: GraphDefinition
    key: str
    measured: Mapping[str, float] | None


@dataclass(frozen=True)
class KeptGraph:
    """A graph to take over unchanged from the bundle that is there.

    Attributes:
        files: every file of it.
        schemes: packed layer -> how its weights are stored.
    """

    spec: GraphSpec
    files: Mapping[str, FileRecord]
    schemes: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """One export.

    Attributes:
        out: bundle folder.
        manifest: all of it but graphs, files and quantization.
        graphs: by name, in the order of the bundle.
        parts: tokenizer and voices.
        ranges: to put into the bundle; None without.
        strangers: files at ``out`` that no bundle lists, and that stay there.
        weight_bytes: of weights and token tables to write.
    """

    checkpoint: Checkpoint
    out: Path
    options: ExportOptions
    manifest: Manifest
    graphs: Mapping[str, NewGraph | KeptGraph]
    parts: SmallParts
    ranges: Ranges | None
    strangers: tuple[str, ...]
    weight_bytes: int


def plan_export(
    checkpoint: str | os.PathLike[str],
    out: Path,
    options: ExportOptions,
    graphs: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> ExportPlan:
    """Check an export's input and decide which graphs are made and which are taken over.

    Args:
        graphs: names of those to export; all if None.

    Raises:
        CheckpointError: the checkpoint is unusable; missing, extra and wrong-shaped weights are named.
        ExportError: wrong options, or something that is no bundle at ``out``.
    """
    options.check(graphs)
    previous = previous_manifest(out)
    ckpt = Checkpoint.open(checkpoint)
    options.check_context(int(ckpt.config.thinker_config.text_config.max_position_embeddings))
    StageProgress(progress, 0).enter("checking the checkpoint")
    _check_packing(ckpt, options)
    origin = _Origin(ckpt, options, rk4_schedule())
    definitions = origin.definitions(options.precision, options.token2wav)
    weight_bytes = check_weights(ckpt, definitions.values())
    parts = small_parts(ckpt)
    ranges = _measured_ranges(ckpt, options)
    manifest = base_manifest(ckpt, options, origin.solver, parts.voices)
    wanted = _wanted(ckpt, options, definitions, graphs)
    kept = {} if previous is None else _kept(origin, wanted, ranges, out, previous)
    new = {name: _new(origin, definitions[name], ranges) for name in wanted if name not in kept}
    chosen = {name: (kept | new)[name] for name in definitions if name in kept or name in new}
    writer = decoders()[0].name
    dtype = kept[writer].spec.compute_dtype if writer in kept else definitions[writer].precision
    attached = ranges or (None if previous is None else _held_ranges(ckpt, options, out, previous))
    return ExportPlan(
        checkpoint=ckpt,
        out=out,
        options=options,
        manifest=msgspec.structs.replace(
            manifest,
            kv=msgspec.structs.replace(manifest.kv, dtype=dtype),
            ranges_file=None if attached is None else RANGES_FILE,
        ),
        graphs=chosen,
        parts=parts,
        ranges=attached,
        strangers=() if previous is None else tuple(unlisted(out, previous)),
        weight_bytes=sum(weight_bytes[name] for name in new) + embedding_bytes(ckpt),
    )


@dataclass(frozen=True)
class _Origin:
    """What graphs are made from."""

    ckpt: Checkpoint
    options: ExportOptions
    solver: SolverSpec

    def definitions(self, precision: str, token2wav: str) -> dict[str, GraphDefinition]:
        """The checkpoint's graphs in a precision, and DiT and vocoder in theirs."""
        ckpt, options = self.ckpt, self.options
        return graph_definitions(
            ckpt.config,
            precision,
            options.max_context,
            self.solver,
            ckpt.tied_embeddings,
            token2wav=token2wav,
            ops=options.ops,
            kv_form=options.kv,
        )

    def key(self, definition: GraphDefinition, ranges: Ranges | None) -> str:
        """A graph's key; options that make a half-precision graph partly float32 count where there is one."""
        kept: list[object] = [self.options.zero_points] if self.ckpt.packed else []
        if definition.precision != "float32":
            kept += self.options.keep_fp32
        if definition.precision == "float16" and ranges is not None:
            measured = ranges.graphs.get(definition.name, {})
            kept.append(sorted(name for name, top in measured.items() if top > limit()))
        return graph_key(definition, source_key(self.ckpt), kept)


def _check_packing(ckpt: Checkpoint, options: ExportOptions) -> None:
    """Lowered graphs are for parsers that take INT4 in blocks, and neither INT8 in blocks nor zero points.

    Raises:
        ExportError: the checkpoint's weights are such, and lowered graphs were asked for.
    """
    if options.ops != "decomposed" or ckpt.packing is None:
        return
    if ckpt.packing.bits == 8:
        raise ExportError(
            f"{ckpt.name} holds INT8 weights in blocks, which TensorRT parses from {INT8_BLOCKS_SINCE} on, and --ops "
            "decomposed is for TensorRT before that. Export the unquantized checkpoint with --ops decomposed --kv "
            "concat --precision fp16, and omniport quantize it with --recipe w8: INT8 with a scale for each channel"
        )
    if options.zero_points == "keep" and not all(weight.symmetric for weight in ckpt.packed.values()):
        raise ExportError(
            f"{ckpt.name} has zero points, which no TensorRT takes, and --ops decomposed is for TensorRT: add "
            "--zero-points separate, which computes the same with a second, small product"
        )


def _wanted(
    ckpt: Checkpoint, options: ExportOptions, definitions: Mapping[str, GraphDefinition], graphs: Sequence[str] | None
) -> list[str]:
    """Names of the graphs to export.

    Raises:
        ExportError: the checkpoint lacks one, or ``keep_fp32`` names no layer of them.
    """
    absent = sorted(set(graphs or ()) - set(definitions))
    if absent:
        raise ExportError(
            f"{ckpt.name} has no {', '.join(absent)}: it was saved without speech (enable_audio_output is false). Its "
            f"graphs are {', '.join(definitions)}."
        )
    wanted = [name for name in definitions if graphs is None or name in graphs]
    options.check_patterns(definitions[name] for name in wanted)
    return wanted


def _new(origin: _Origin, definition: GraphDefinition, ranges: Ranges | None) -> NewGraph:
    """A graph to make.

    Raises:
        ExportError: there are measured ranges, and none of this graph.
    """
    name = definition.name
    if ranges is not None and name not in ranges.graphs:
        raise ExportError(
            f"{origin.options.ranges} has no ranges of {name}: the samples it was measured on did not reach it. "
            "Measure again on an FP32 bundle that has this graph, with samples that use it."
        )
    return NewGraph(definition, origin.key(definition, ranges), None if ranges is None else ranges.graphs[name])


def _kept(
    origin: _Origin, wanted: Sequence[str], ranges: Ranges | None, out: Path, previous: Manifest
) -> dict[str, KeptGraph]:
    """Graphs of the bundle that is there: those wanted of which nothing changed, and all that are not wanted.

    Raises:
        ExportError: one that is not wanted would not fit to the rest.
    """
    known = [origin.definitions(*both) for both in itertools.product(PRECISIONS, TOKEN2WAV_PRECISIONS)]
    kept = {}
    for name, definition in origin.definitions(origin.options.precision, origin.options.token2wav).items():
        if name not in previous.graphs:
            continue
        # what was not asked for may be of any precision
        alike = [definition] if name in wanted else [definitions[name] for definitions in known]
        spec = previous.graphs[name]
        if spec.inputs_key in {origin.key(d, ranges) for d in alike} and graph_whole(out, previous, spec):
            schemes = previous.quantization.layers.get(name, {}) if previous.quantization is not None else {}
            kept[name] = KeptGraph(spec, {file: previous.files[file] for file in (spec.file, *spec.data)}, schemes)
        elif name not in wanted:
            raise ExportError(
                f"{out} holds a {name} that is damaged, or was made from other weights, with other options or by "
                "another release: it would not fit to the rest. Export without --graphs, or to a new folder."
            )
    return kept


def _measured_ranges(ckpt: Checkpoint, options: ExportOptions) -> Ranges | None:
    """The ranges to export with.

    Raises:
        ExportError: they are another checkpoint's, or were measured on graphs with other nodes.
    """
    if options.ranges is None:
        return None
    ranges = read_ranges(options.ranges)
    if ranges.fingerprint != ckpt.fingerprint:
        raise ExportError(
            f"{options.ranges} was measured on a checkpoint with fingerprint {ranges.fingerprint[:12]}; {ckpt.name} "
            f"has {ckpt.fingerprint[:12]}. Export this one with --precision fp32 and run 'omniport ranges' on that "
            "bundle."
        )
    if (ranges.ops, ranges.kv) != (options.ops, options.kv):
        raise ExportError(
            f"{options.ranges} was measured on graphs exported with --ops {ranges.ops} --kv {ranges.kv}; this one has "
            f"--ops {options.ops} --kv {options.kv}. Measure on an FP32 bundle with the same options."
        )
    return ranges


def _held_ranges(ckpt: Checkpoint, options: ExportOptions, out: Path, previous: Manifest) -> Ranges | None:
    """Ranges that the bundle has already, if they are whole and about the graphs that it is going to have.

    They do not steer this export: what they show to overflow is held in float16, and building says so.
    """
    path = out / RANGES_FILE
    record = previous.files.get(RANGES_FILE) if previous.ranges_file else None
    if record is None or not path.is_file() or file_record(path) != record:
        return None
    ranges = read_ranges(path)
    return (
        ranges if (ranges.fingerprint, ranges.ops, ranges.kv) == (ckpt.fingerprint, options.ops, options.kv) else None
    )
