"""From a checkpoint to a bundle: every graph, and beside them all that the runtime needs.

A bundle is written aside and renamed when it is complete: an interrupted export leaves nothing, and an older bundle
at the same place stays as it was until the new one is whole.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from omniport.runtime.bundle import MANIFEST_FILE
from omniport.runtime.errors import ExportError
from omniport.runtime.graphs import GRAPH_NAMES, GraphSpec
from omniport.runtime.manifest import FileRecord, Manifest
from omniport.runtime.solver import rk4_schedule
from omniport.runtime.staging import check_space, previous_manifest, staging, take_over, unlisted

from .bundle_parts import base_manifest, voice_specs, write_embedding
from .checkpoint import Checkpoint
from .graph_defs import PRECISIONS, GraphDefinition, graph_definitions
from .onnx_export import write_model
from .reuse import file_record, graph_key, graph_whole, source_key
from .speakers import load_speakers, speaker_vectors, write_voice
from .tokenizer import tokenizer_json
from .trace import OPSET, trace
from .weights_check import check_weights, embedding_keys

__all__ = ["ExportReport", "GraphReport", "Progress", "export_checkpoint"]

#: progress(stage, done bytes, total bytes)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class GraphReport:
    """One graph of an export. ``skipped``: it was taken over unchanged from the bundle that was there."""

    name: str
    nodes: int
    weight_bytes: int
    seconds: float
    skipped: bool


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
    progress: Progress | None = None,
) -> ExportReport:
    """Export a checkpoint to the bundle folder ``out``.

    If ``out`` holds a bundle already, graphs are taken over whose inputs did not change (see `omniport.export.reuse`)
    and whose files are, byte for byte, what bundle.json lists. Files that the bundle does not list are kept.

    Args:
        checkpoint: folder, Hugging Face id, or ``modelscope:ID``.
        out: bundle folder.
        precision: fp32, fp16 or bf16.
        graphs: export these only. Others that ``out`` holds are kept, in whichever precision they are, if they were
            made from the same checkpoint with the same options.
        max_context: KV-cache capacity in tokens.
        progress: called with the stage, and the bytes written so far and in total.

    Raises:
        CheckpointError: the checkpoint is unusable; missing, extra and wrong-shaped weights are named.
        ExportError: wrong options, or a disk that is full; nothing is left behind.
    """
    started = time.perf_counter()
    if precision not in PRECISIONS:
        raise ExportError(f"no precision {precision!r}; known: {', '.join(PRECISIONS)}")
    unknown = sorted(set(graphs or ()) - set(GRAPH_NAMES))
    if unknown:
        raise ExportError(f"no graph named {', '.join(unknown)}; known: {', '.join(GRAPH_NAMES)}")
    out = Path(out)
    previous = previous_manifest(out)
    ckpt = Checkpoint.open(checkpoint)
    limit = int(ckpt.config.thinker_config.text_config.max_position_embeddings)
    if not 64 <= max_context <= limit:
        raise ExportError(
            f"--max-context {max_context}: expected 64 to {limit}, the positions the model was trained on"
        )
    job = _Job(ckpt, out, precision, max_context, progress)
    job.prepare()
    job.choose(graphs, previous)
    check_space(out, int(job.total * 1.02))
    with staging(out) as folder:
        report = job.write(folder)
    report.seconds = time.perf_counter() - started
    return report


class _Job:
    """One export. ``prepare`` and ``choose`` find everything that is wrong with the input; ``write`` does the work."""

    def __init__(
        self, ckpt: Checkpoint, out: Path, precision: str, max_context: int, progress: Progress | None
    ) -> None:
        self.ckpt, self.out, self.precision, self.max_context = ckpt, out, precision, max_context
        self.progress = progress
        self.solver = rk4_schedule()
        self.definitions = self._definitions(precision)
        self.keys: dict[str, str] = {}
        self.kept: dict[str, GraphSpec] = {}
        self.records: dict[str, FileRecord] = {}
        self.strangers: list[str] = []
        self.made: list[str] = []
        self.stage, self.done, self.total = "", 0, 0

    def _definitions(self, precision: str) -> dict[str, GraphDefinition]:
        ckpt = self.ckpt
        return graph_definitions(ckpt.config, precision, self.max_context, self.solver, ckpt.tied_embeddings)

    def prepare(self) -> None:
        """Check the weights and make the small parts: they fail in a second, not after minutes of tracing."""
        self._enter("checking the checkpoint")
        self.weight_bytes = check_weights(self.ckpt, self.definitions.values())
        self.tokenizer = tokenizer_json(self.ckpt)
        self.speakers = load_speakers(self.ckpt.path / "spk_dict.pt") if self.ckpt.has_speech else {}
        self.references = speaker_vectors(self.ckpt, self.speakers) if self.speakers else {}
        self.voices = voice_specs(self.speakers)
        self.manifest = base_manifest(self.ckpt, self.precision, self.max_context, self.solver, self.voices)

    def choose(self, graphs: Sequence[str] | None, previous: Manifest | None) -> None:
        """Decide which graphs are made and which are taken over."""
        absent = sorted(set(graphs or ()) - set(self.definitions))
        if absent:
            raise ExportError(
                f"{self.ckpt.name} has no {', '.join(absent)}: it was saved without speech (enable_audio_output is "
                f"false). Its graphs are {', '.join(self.definitions)}."
            )
        source = source_key(self.ckpt)
        self.keys = {name: graph_key(d, self.solver, source) for name, d in self.definitions.items()}
        held = dict(previous.graphs) if previous is not None else {}
        for name in self.definitions:
            wanted = graphs is None or name in graphs
            if name in held and previous is not None:
                known = {self.keys[name]} if wanted else self._keys_of_any_precision(name, source)
                if held[name].inputs_key in known and graph_whole(self.out, previous, held[name]):
                    self.kept[name] = held[name]
                    continue
            if wanted:
                self.made.append(name)
            elif name in held:
                raise ExportError(
                    f"{self.out} holds a {name} that is damaged, or was made from other weights, with other options or "
                    "by another release: it would not fit to the rest. Export without --graphs, or to a new folder."
                )
        if previous is not None:
            self.records = {f: previous.files[f] for spec in self.kept.values() for f in (spec.file, *spec.data)}
            self.strangers = unlisted(self.out, previous)
        embeddings = embedding_keys(self.ckpt).values()
        self.total = sum(self.weight_bytes[name] for name in self.made)
        self.total += sum(int(np.prod(self.ckpt.shape(key))) * _itemsize(self.ckpt.dtype(key)) for key in embeddings)

    def _keys_of_any_precision(self, name: str, source: str) -> set[str]:
        return {graph_key(self._definitions(precision)[name], self.solver, source) for precision in PRECISIONS}

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
        dtype = (specs["thinker"] if "thinker" in specs else self.definitions["thinker"]).precision
        kv = msgspec.structs.replace(self.manifest.kv, dtype=dtype)
        manifest = msgspec.structs.replace(self.manifest, kv=kv, graphs=specs, files=files)
        (folder / MANIFEST_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
        for name in self.strangers:
            if not (folder / name).exists():
                take_over(self.out / name, folder / name)
        return report

    def _make_graph(self, definition: GraphDefinition, folder: Path) -> tuple[GraphSpec, GraphReport]:
        started = time.perf_counter()
        self._enter(f"tracing {definition.name}")
        model, rules = trace(definition)
        self._enter(f"writing {definition.name}")
        path = folder / "graphs" / f"{definition.name}.onnx"
        path.parent.mkdir(exist_ok=True)
        data = write_model(model, rules, self.ckpt, path, self._advance)
        spec = GraphSpec(
            name=definition.name,
            file=path.relative_to(folder).as_posix(),
            data=tuple(file.relative_to(folder).as_posix() for file in data),
            precision=definition.precision,
            opset=OPSET,
            inputs=definition.inputs,
            outputs=definition.outputs,
            dims=definition.dims,
            aliases=definition.aliases,
            inputs_key=self.keys[definition.name],
        )
        size = sum(file.stat().st_size for file in data)
        return spec, GraphReport(definition.name, len(model.graph), size, time.perf_counter() - started, False)

    def _write_parts(self, folder: Path) -> None:
        self._enter("embeddings")
        (folder / "embeddings").mkdir()
        for part in embedding_keys(self.ckpt):
            write_embedding(self.ckpt, part, folder / "embeddings" / f"{part}.npy", self._advance)
        (folder / "tokenizer.json").write_bytes(self.tokenizer)
        if self.voices:
            (folder / "voices").mkdir()
        for voice in self.voices:
            write_voice(folder / voice.file, self.speakers[voice.name].cond, self.references[voice.name])


def _itemsize(dtype: str) -> int:
    return 2 if dtype in ("bfloat16", "float16") else 4
