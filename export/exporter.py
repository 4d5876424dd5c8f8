"""From a checkpoint to a bundle: every graph, and beside them all that the runtime needs.

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
from typing import Any

import msgspec
import numpy as np
from omniport.runtime.bundle.activation_ranges import RANGES_FILE, Ranges, encode_ranges, limit, read_ranges
from omniport.runtime.bundle.graph_spec import GraphSpec
from omniport.runtime.bundle.manifest import FileRecord, Manifest, Quantization, encode_manifest
from omniport.runtime.bundle.reader import MANIFEST_FILE
from omniport.runtime.bundle.staging import check_space, previous_manifest, staging, take_over, unlisted
from omniport.runtime.errors import ExportError
from omniport.runtime.speech.ode import rk4_schedule

from .bundle_parts import base_manifest, voice_specs, write_embedding
from .checkpoint.checkpoint import Checkpoint
from .checkpoint.tokenizer_json import tokenizer_json
from .export_options import ExportOptions
from .graphs.fingerprint import file_record, graph_key, graph_whole, source_key
from .graphs.lowering import OPSETS
from .graphs.mixed_precision import mix
from .graphs.packed_weights import OPSET as PACKED_OPSET
from .graphs.packed_weights import import_packed
from .graphs.trace import trace
from .graphs.writer import write_model
from .models.parts import PRECISIONS, GraphDefinition, graph_definitions
from .models.voices import load_speakers, speaker_vectors, write_voice
from .weights_check import check_weights, embedding_keys

#: progress(stage, done bytes, total bytes)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class GraphReport:
    """One graph of an export.

    Attributes:
        skipped: it was taken over unchanged from the bundle that was there.
        overflowing: nodes that stay float32 because their measured range is too large for float16.
        schemes: how the linear layers of a packed checkpoint are stored -> how many; empty where it packs none.
    """

    name: str
    nodes: int
    weight_bytes: int
    seconds: float
    skipped: bool
    overflowing: tuple[str, ...] = ()
    schemes: Mapping[str, int] = field(default_factory=dict)


@dataclass
class ExportReport:
    """What an export wrote."""

    path: Path
    graphs: list[GraphReport] = field(default_factory=list)
    seconds: float = 0.0


def export_checkpoint(
    checkpoint: str | os.PathLike[str],
    out: Path,
    *,
    precision: str = "fp32",
    graphs: Sequence[str] | None = None,
    max_context: int = 8192,
    ops: str = "native",
    kv: str = "static",
    keep_fp32: Sequence[str] = (),
    ranges: Path | None = None,
    zero_points: str = "keep",
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
        progress: called with the stage, and the bytes written so far and in total.

    Raises:
        CheckpointError: the checkpoint is unusable; missing, extra and wrong-shaped weights are named.
        ExportError: wrong options, or a disk that is full; nothing is left behind.
    """
    started = time.perf_counter()
    options = ExportOptions(precision, max_context, ops, kv, tuple(keep_fp32), ranges, zero_points)
    options.check(graphs)
    out = Path(out)
    previous = previous_manifest(out)
    ckpt = Checkpoint.open(checkpoint)
    options.check_context(int(ckpt.config.thinker_config.text_config.max_position_embeddings))
    job = _Job(ckpt, out, options, progress)
    job.prepare()
    job.choose(graphs, previous)
    check_space(out, int(job.total * 1.02))
    with staging(out) as folder:
        report = job.write(folder)
    report.seconds = time.perf_counter() - started
    return report


class _Job:
    """One export. ``prepare`` and ``choose`` find everything that is wrong with the input; ``write`` does the work."""

    def __init__(self, ckpt: Checkpoint, out: Path, options: ExportOptions, progress: Progress | None) -> None:
        self.ckpt, self.out, self.options = ckpt, out, options
        self.progress = progress
        self.solver = rk4_schedule()
        self.definitions = self._definitions(options.precision)
        self.keys: dict[str, str] = {}
        self.kept: dict[str, GraphSpec] = {}
        self.attached: Ranges | None = None
        self.records: dict[str, FileRecord] = {}
        self.strangers: list[str] = []
        self.made: list[str] = []
        self.layers: dict[str, dict[str, str]] = {}
        self.stage, self.done, self.total = "", 0, 0

    def _definitions(self, precision: str) -> dict[str, GraphDefinition]:
        ckpt, options = self.ckpt, self.options
        return graph_definitions(
            ckpt.config,
            precision,
            options.max_context,
            self.solver,
            ckpt.tied_embeddings,
            ops=options.ops,
            kv_form=options.kv,
        )

    def prepare(self) -> None:
        """Check the weights and make the small parts: they fail in a second, not after minutes of tracing."""
        self._enter("checking the checkpoint")
        if self.ckpt.packed and OPSETS[self.options.ops] < PACKED_OPSET:
            raise ExportError(
                f"{self.ckpt.name} holds INT4 weights, which need opset {PACKED_OPSET} or later: leave --ops native, "
                "or export from the unquantized checkpoint"
            )
        self.weight_bytes = check_weights(self.ckpt, self.definitions.values())
        self.tokenizer = tokenizer_json(self.ckpt)
        self.speakers = load_speakers(self.ckpt.path / "spk_dict.pt") if self.ckpt.has_speech else {}
        self.references = speaker_vectors(self.ckpt, self.speakers) if self.speakers else {}
        self.voices = voice_specs(self.speakers)
        self.ranges = self._read_ranges()
        self.manifest = base_manifest(self.ckpt, self.options, self.solver, self.voices)

    def _read_ranges(self) -> Ranges | None:
        """The ranges to export with.

        Raises:
            ExportError: they are another checkpoint's, or were measured on graphs with other nodes.
        """
        options = self.options
        if options.ranges is None:
            return None
        ranges = read_ranges(options.ranges)
        if ranges.fingerprint != self.ckpt.fingerprint:
            raise ExportError(
                f"{options.ranges} was measured on a checkpoint with fingerprint {ranges.fingerprint[:12]}; "
                f"{self.ckpt.name} has {self.ckpt.fingerprint[:12]}. Export this one with --precision fp32 and run "
                "'omniport ranges' on that bundle."
            )
        if (ranges.ops, ranges.kv) != (options.ops, options.kv):
            raise ExportError(
                f"{options.ranges} was measured on graphs exported with --ops {ranges.ops} --kv {ranges.kv}; this "
                f"one has --ops {options.ops} --kv {options.kv}. Measure on an FP32 bundle with the same options."
            )
        return ranges

    def _held_ranges(self, previous: Manifest | None) -> Ranges | None:
        """Ranges that the bundle has already, if they are whole and about the graphs that it is going to have.

        They do not steer this export: what they show to overflow is held in float16, and building says so.
        """
        path = self.out / RANGES_FILE
        record = previous.files.get(RANGES_FILE) if previous is not None and previous.ranges_file else None
        if record is None or not path.is_file() or file_record(path) != record:
            return None
        ranges = read_ranges(path)
        measured = (ranges.fingerprint, ranges.ops, ranges.kv)
        return ranges if measured == (self.ckpt.fingerprint, self.options.ops, self.options.kv) else None

    def choose(self, graphs: Sequence[str] | None, previous: Manifest | None) -> None:
        """Decide which graphs are made and which are taken over."""
        absent = sorted(set(graphs or ()) - set(self.definitions))
        if absent:
            raise ExportError(
                f"{self.ckpt.name} has no {', '.join(absent)}: it was saved without speech (enable_audio_output is "
                f"false). Its graphs are {', '.join(self.definitions)}."
            )
        self.options.check_patterns(d for name, d in self.definitions.items() if graphs is None or name in graphs)
        source = source_key(self.ckpt)
        self.keys = {name: self._key(d, source) for name, d in self.definitions.items()}
        held = dict(previous.graphs) if previous is not None else {}
        for name in self.definitions:
            wanted = graphs is None or name in graphs
            if name in held and previous is not None:
                known = {self.keys[name]} if wanted else self._keys_of_any_precision(name, source)
                if held[name].inputs_key in known and graph_whole(self.out, previous, held[name]):
                    self.kept[name] = held[name]
                    if previous.quantization is not None and name in previous.quantization.layers:
                        self.layers[name] = previous.quantization.layers[name]
                    continue
            if wanted:
                self.made.append(name)
            elif name in held:
                raise ExportError(
                    f"{self.out} holds a {name} that is damaged, or was made from other weights, with other options or "
                    "by another release: it would not fit to the rest. Export without --graphs, or to a new folder."
                )
        self.attached = self.ranges or self._held_ranges(previous)
        if previous is not None:
            self.records = {f: previous.files[f] for spec in self.kept.values() for f in (spec.file, *spec.data)}
            self.strangers = unlisted(self.out, previous)
        embeddings = embedding_keys(self.ckpt).values()
        self.total = sum(self.weight_bytes[name] for name in self.made)
        self.total += sum(int(np.prod(self.ckpt.shape(key))) * _itemsize(self.ckpt.dtype(key)) for key in embeddings)

    def _keys_of_any_precision(self, name: str, source: str) -> set[str]:
        return {self._key(self._definitions(precision)[name], source) for precision in PRECISIONS}

    def _key(self, definition: GraphDefinition, source: str) -> str:
        """The graph's key; options that make a half-precision graph partly float32 count where there is one."""
        kept: list[object] = [self.options.zero_points] if self.ckpt.packed else []
        if definition.precision != "float32":
            kept += self.options.keep_fp32
        if definition.precision == "float16" and self.ranges is not None:
            measured = self.ranges.graphs.get(definition.name, {})
            kept.append(sorted(name for name, top in measured.items() if top > limit()))
        return graph_key(definition, self.solver, source, kept)

    def _advance(self, nbytes: int) -> None:
        self.done += nbytes
        if self.progress is not None:
            self.progress(self.stage, min(self.done, self.total), self.total)

    def _enter(self, stage: str) -> None:
        self.stage = stage
        self._advance(0)

    def write(self, folder: Path) -> ExportReport:
        """Write everything into ``folder``."""
        report = ExportReport(self.out)
        specs: dict[str, GraphSpec] = {}
        for name, definition in self.definitions.items():
            if name in self.made:
                specs[name], row = self._make_graph(definition, folder)
                report.graphs.append(row)
            elif name in self.kept:
                spec = specs[name] = self.kept[name]
                for file in (spec.file, *spec.data):
                    take_over(self.out / file, folder / file)
                size = sum(self.records[file].size for file in spec.data)
                report.graphs.append(GraphReport(name, 0, size, 0.0, True))
        self._write_parts(folder)
        self._enter("checksums")
        files = {
            name: self.records.get(name) or file_record(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and (name := path.relative_to(folder).as_posix())
        }
        dtype = specs["thinker"].compute_dtype if "thinker" in specs else self.definitions["thinker"].precision
        kv = msgspec.structs.replace(self.manifest.kv, dtype=dtype)
        ranges = RANGES_FILE if self.attached is not None else None
        manifest = msgspec.structs.replace(
            self.manifest, kv=kv, graphs=specs, files=files, ranges_file=ranges, **self._quantization()
        )
        (folder / MANIFEST_FILE).write_bytes(encode_manifest(manifest))
        for name in self.strangers:
            if not (folder / name).exists():
                take_over(self.out / name, folder / name)
        return report

    def _quantization(self) -> dict[str, Any]:
        """Fields of the manifest that say that weights are integers, if any are."""
        if self.ckpt.packing is None or not self.layers:
            return {}
        method = self.ckpt.packing.method
        record = Quantization(recipe=method, precision=self.options.precision, layers=self.layers)
        return {"precision": method, "quantization": record}

    def _make_graph(self, definition: GraphDefinition, folder: Path) -> tuple[GraphSpec, GraphReport]:
        started = time.perf_counter()
        self._enter(f"tracing {definition.name}")
        model, rules = trace(definition)
        mixed = mix(
            model, definition.name, definition.precision, self.options.patterns, self._measured(definition.name)
        )
        filled, schemes = import_packed(model, rules, self.ckpt.packed, self.options.zero_points == "separate")
        if schemes:
            self.layers[definition.name] = schemes
        self._enter(f"writing {definition.name}")
        path = folder / "graphs" / f"{definition.name}.onnx"
        path.parent.mkdir(exist_ok=True)
        written = write_model(model, filled, self.ckpt, path, self._advance)
        names = {file.relative_to(folder).as_posix(): record for file, record in written.items()}
        self.records |= names
        spec = GraphSpec(
            name=definition.name,
            file=path.relative_to(folder).as_posix(),
            data=tuple(names),
            precision=f"int{self.ckpt.packing.bits}" if schemes and self.ckpt.packing else definition.precision,
            compute=definition.precision if schemes else "",
            opset=OPSETS[definition.ops],
            inputs=definition.inputs,
            outputs=definition.outputs,
            dims=definition.dims,
            aliases=definition.aliases,
            grows=definition.grows,
            float32_values=mixed.float32_values,
            inputs_key=self.keys[definition.name],
        )
        size = sum(record.size for record in written.values())
        seconds = time.perf_counter() - started
        counts = Counter(schemes.values())
        return spec, GraphReport(definition.name, len(model.graph), size, seconds, False, mixed.overflowing, counts)

    def _measured(self, name: str) -> dict[str, float] | None:
        """Ranges of one graph; None if the export has none.

        Raises:
            ExportError: the file has none for this graph.
        """
        if self.ranges is None:
            return None
        if name not in self.ranges.graphs:
            raise ExportError(
                f"{self.options.ranges} has no ranges of {name}: the samples it was measured on did not reach it. "
                "Measure again on an FP32 bundle that has this graph, with samples that use it."
            )
        return self.ranges.graphs[name]

    def _write_parts(self, folder: Path) -> None:
        self._enter("embeddings")
        (folder / "embeddings").mkdir()
        for part in embedding_keys(self.ckpt):
            file = f"embeddings/{part}.npy"
            self.records[file] = write_embedding(self.ckpt, part, folder / file, self._advance)
        (folder / "tokenizer.json").write_bytes(self.tokenizer)
        if self.voices:
            (folder / "voices").mkdir()
        if self.attached is not None:
            (folder / RANGES_FILE).write_bytes(encode_ranges(self.attached))
        for voice in self.voices:
            write_voice(folder / voice.file, self.speakers[voice.name].cond, self.references[voice.name])


def _itemsize(dtype: str) -> int:
    return 2 if dtype in ("bfloat16", "float16") else 4
