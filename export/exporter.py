"""From a checkpoint to a bundle: every graph, and beside them all that the runtime needs.

A bundle is written aside and renamed when it is complete: an interrupted export leaves nothing, and an older bundle
at the same place stays as it was until the new one is whole.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from omniport.runtime.bundle import MANIFEST_FILE, read_manifest
from omniport.runtime.errors import BundleError, CheckpointError, ExportError
from omniport.runtime.graphs import GRAPH_NAMES, GraphSpec
from omniport.runtime.manifest import (
    DecoderGeometry,
    DitGeometry,
    FileRecord,
    KvSpec,
    Manifest,
    SolverSpec,
    Source,
    VocoderGeometry,
    VoiceSpec,
)
from omniport.runtime.solver import rk4_schedule

from . import frontends
from .checkpoint import Checkpoint
from .graph_defs import PRECISIONS, GraphDefinition, decoder_config, graph_definitions
from .onnx_export import OPSET, trace, write_model
from .speakers import load_speakers, speaker_keys, speaker_vectors, write_voice
from .tokenizer import tokenizer_json
from .weights import Compute, Copy, Transpose, blocks

__all__ = ["ExportReport", "GraphReport", "Progress", "export_checkpoint"]

#: progress(stage, done bytes, total bytes)
Progress = Callable[[str, int, int], None]

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


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

    Args:
        checkpoint: folder, Hugging Face id, or ``modelscope:ID``.
        out: bundle folder. If it holds a bundle already, graphs whose inputs did not change are taken over.
        precision: fp32, fp16 or bf16.
        graphs: export these only; others that ``out`` already holds are kept.
        max_context: KV-cache capacity in tokens.
        progress: called with the stage, and the bytes written so far and in total.

    Raises:
        CheckpointError: the checkpoint is unusable; missing, extra and wrong-shaped weights are named.
        ExportError: wrong options, or a disk that is full; nothing is left behind.
    """
    started = time.perf_counter()
    if precision not in PRECISIONS:
        raise ExportError(f"no precision {precision!r}; known: {', '.join(PRECISIONS)}")
    previous = _previous(out)
    ckpt = Checkpoint.open(checkpoint)
    limit = int(ckpt.config.thinker_config.text_config.max_position_embeddings)
    if not 64 <= max_context <= limit:
        raise ExportError(f"--max-context {max_context}: expected 64 to {limit}, the positions the model was trained on")
    job = _Job(ckpt, out, precision, max_context, previous, progress)
    job.choose(graphs)
    job.check_weights()
    job.check_space()
    with _staging(out) as folder:
        report = job.run(folder)
    report.seconds = time.perf_counter() - started
    return report


class _Job:
    """One export: its definitions, and the byte count that progress reports."""

    def __init__(
        self,
        ckpt: Checkpoint,
        out: Path,
        precision: str,
        max_context: int,
        previous: Manifest | None,
        progress: Progress | None,
    ) -> None:
        self.ckpt, self.out, self.precision, self.max_context = ckpt, out, precision, max_context
        self.previous, self.progress = previous, progress
        self.solver: SolverSpec = rk4_schedule()
        self.definitions = graph_definitions(ckpt.config, precision, max_context, self.solver, ckpt.tied_embeddings)
        self.source_key = _source_key(ckpt)
        self.stage, self.done, self.total = "", 0, 0

    def choose(self, graphs: Sequence[str] | None) -> None:
        """Decide which graphs are made and which are taken over."""
        unknown = sorted(set(graphs or ()) - set(GRAPH_NAMES))
        if unknown:
            raise ExportError(f"no graph named {', '.join(unknown)}; known: {', '.join(GRAPH_NAMES)}")
        absent = sorted(set(graphs or ()) - set(self.definitions))
        if absent:
            raise ExportError(
                f"{self.ckpt.name} has no {', '.join(absent)}: it was saved without speech (enable_audio_output is "
                f"false). Its graphs are {', '.join(self.definitions)}."
            )
        held = dict(self.previous.graphs) if self.previous else {}
        self.kept: dict[str, GraphSpec] = {}
        self.made: list[str] = []
        for name, definition in self.definitions.items():
            wanted = graphs is None or name in graphs
            if name in held and (held[name].inputs_key == self.key(definition) or not wanted):
                self.kept[name] = held[name]
            elif wanted:
                self.made.append(name)

    def key(self, definition: GraphDefinition) -> str:
        """sha256 over everything that a graph is made from."""
        return _sha256_of(
            [
                definition.name,
                definition.precision,
                msgspec.to_builtins((definition.inputs, definition.outputs, definition.dims)),
                msgspec.to_builtins(self.solver) if definition.name == "dit" else None,
                self.source_key,
            ]
        )

    def check_weights(self) -> None:
        """Every weight is there with the right shape, and none is left over, before anything is written."""
        used: set[str] = {"thinker.model.embed_tokens.weight"}
        for definition in self.definitions.values():
            module = definition.module()
            tensors = dict(module.named_parameters()) | dict(module.named_buffers())
            for name, rule in module.named_rules(str(module.prefix)):
                if isinstance(rule, Copy):
                    self.ckpt.expect(rule.key, tensors[name].shape)
                    used.add(rule.key)
                elif isinstance(rule, Transpose):
                    n_in, n_out = tensors[name].shape
                    stored = self.ckpt.shape(rule.key)
                    flat = len(stored) > 2 and stored[0] == n_out and int(np.prod(stored[1:])) == n_in
                    self.ckpt.expect(rule.key, stored if flat else (n_out, n_in))
                    used.add(rule.key)
                elif isinstance(rule, Compute):
                    for key in rule.keys:
                        self.ckpt.shape(key)
                    used.update(rule.keys)
            self.total += sum(t.nbytes for t in tensors.values()) if definition.name in self.made else 0
        text = self.ckpt.config.thinker_config.text_config
        self.ckpt.expect("thinker.model.embed_tokens.weight", (text.vocab_size, text.hidden_size))
        if self.ckpt.has_speech:
            talker = self.ckpt.config.talker_config
            self.ckpt.expect("talker.model.embed_tokens.weight", (talker.vocab_size, talker.embedding_size))
            used |= {"talker.model.embed_tokens.weight"} | speaker_keys(self.ckpt)
        extra = self.ckpt.unused(used)
        if extra:
            shown = ", ".join(extra[:5]) + (f" and {len(extra) - 5} more" if len(extra) > 5 else "")
            raise CheckpointError(
                f"{self.ckpt.name} holds weights that Qwen2.5-Omni does not have: {shown}. Merge adapters into the "
                "base weights first, or remove what does not belong there."
            )
        for name in self.embedding_keys():
            self.total += int(np.prod(self.ckpt.shape(name)) * _itemsize(self.ckpt.dtype(name)))

    def embedding_keys(self) -> list[str]:
        parts = ["thinker", "talker"] if self.ckpt.has_speech else ["thinker"]
        return [f"{part}.model.embed_tokens.weight" for part in parts]

    def check_space(self) -> None:
        """ExportError if the disk cannot hold what is about to be written."""
        parent = _existing_parent(self.out)
        free = shutil.disk_usage(parent).free
        if free < self.total * 1.02:
            raise ExportError(
                f"{parent} has {free / 1e9:.1f} GB free and the bundle needs {self.total / 1e9:.1f} GB. Free some space "
                "or choose another folder."
            )

    def advance(self, nbytes: int) -> None:
        self.done += nbytes
        if self.progress is not None:
            self.progress(self.stage, min(self.done, self.total), self.total)

    def enter(self, stage: str) -> None:
        self.stage = stage
        self.advance(0)

    def run(self, folder: Path) -> ExportReport:
        """Write everything into ``folder``."""
        report = ExportReport(self.out)
        specs: dict[str, GraphSpec] = {}
        for name, definition in self.definitions.items():
            if name in self.made:
                specs[name], row = self.make_graph(definition, folder)
                report.graphs.append(row)
            elif name in self.kept:
                spec = specs[name] = self.kept[name]
                for file in (spec.file, *spec.data):
                    _take_over(self.out / file, folder / file)
                size = sum((folder / file).stat().st_size for file in spec.data)
                report.graphs.append(GraphReport(name, 0, size, 0.0, True))
        self.enter("embeddings")
        (folder / "embeddings").mkdir()
        for key in self.embedding_keys():
            self.write_embedding(key, folder / "embeddings" / f"{key.split('.')[0]}.npy")
        (folder / "tokenizer.json").write_bytes(tokenizer_json(self.ckpt))
        voices = self.write_voices(folder) if self.ckpt.has_speech else ()
        self.enter("checksums")
        files = {
            path.relative_to(folder).as_posix(): FileRecord(size=path.stat().st_size, sha256=_sha256_file(path))
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        manifest = self.manifest(specs, voices, files)
        (folder / MANIFEST_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
        return report

    def make_graph(self, definition: GraphDefinition, folder: Path) -> tuple[GraphSpec, GraphReport]:
        started = time.perf_counter()
        self.enter(f"tracing {definition.name}")
        model, rules = trace(definition, self.ckpt)
        self.enter(f"writing {definition.name}")
        path = folder / "graphs" / f"{definition.name}.onnx"
        path.parent.mkdir(exist_ok=True)
        data = write_model(model, rules, self.ckpt, path, self.advance)
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
            inputs_key=self.key(definition),
        )
        size = sum(file.stat().st_size for file in data)
        return spec, GraphReport(definition.name, len(model.graph), size, time.perf_counter() - started, False)

    def write_embedding(self, key: str, path: Path) -> None:
        """A token-embedding table as .npy in its stored dtype (bfloat16 as uint16): nothing is lost or widened."""
        shape, dtype = self.ckpt.shape(key), self.ckpt.dtype(key)
        stored = np.dtype("<u2") if dtype == "bfloat16" else np.dtype(dtype).newbyteorder("<")
        header = {"descr": np.lib.format.dtype_to_descr(stored), "fortran_order": False, "shape": shape}
        with open(path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for start, stop in blocks(shape, stored.itemsize):
                block = np.ascontiguousarray(self.ckpt.read(key, start, stop))
                file.write(memoryview(block.view(np.uint8).reshape(-1)))
                self.advance(block.nbytes)

    def write_voices(self, folder: Path) -> tuple[VoiceSpec, ...]:
        speakers = load_speakers(self.ckpt.path / "spk_dict.pt")
        references = speaker_vectors(self.ckpt, speakers)
        (folder / "voices").mkdir()
        specs = []
        for i, (name, speaker) in enumerate(speakers.items()):
            slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
            file = f"voices/{i}-{slug}.npz" if slug else f"voices/{i}.npz"
            write_voice(folder / file, speaker.cond, references[name])
            specs.append(VoiceSpec(name=name, bos_token=speaker.bos_token, file=file))
        return tuple(specs)

    def manifest(
        self, specs: dict[str, GraphSpec], voices: tuple[VoiceSpec, ...], files: dict[str, FileRecord]
    ) -> Manifest:
        ckpt, config = self.ckpt, self.ckpt.config
        thinker_sampling, talker_sampling = frontends.sampling_defaults(ckpt)
        speech: dict[str, Any] = {}
        if ckpt.has_speech:
            speech = {
                "talker": self.geometry(config.talker_config, "talker", config.talker_config.embedding_size),
                "talker_sampling": talker_sampling,
                "text_tokens": frontends.text_tokens(ckpt),
                "codec": frontends.codec_tokens(ckpt),
                "dit": _dit_geometry(config.token2wav_config.dit_config),
                "vocoder": _vocoder_geometry(config.token2wav_config.bigvgan_config),
                "solver": self.solver,
                "voices": voices,
            }
        text = config.thinker_config.text_config
        return Manifest(
            created_by=f"omniport {importlib.metadata.version('omniport')}",
            source=Source(name=ckpt.name, fingerprint=ckpt.fingerprint),
            precision=self.precision,
            audio=frontends.audio_frontend(ckpt),
            vision=frontends.vision_frontend(ckpt),
            tokens=frontends.special_tokens(ckpt),
            chat=frontends.chat_spec(ckpt),
            position_id_per_seconds=config.thinker_config.position_id_per_seconds,
            seconds_per_chunk=float(config.thinker_config.seconds_per_chunk),
            thinker=self.geometry(text, "thinker", text.hidden_size),
            thinker_sampling=thinker_sampling,
            kv=KvSpec(form="static", dtype=self.definitions["thinker"].precision, max_context=self.max_context),
            graphs=specs,
            files=files,
            **speech,
        )

    def geometry(self, config: Any, part: str, embedding_size: int) -> DecoderGeometry:
        sizes = decoder_config(config)
        return DecoderGeometry(
            hidden_size=sizes.hidden_size,
            embedding_size=embedding_size,
            num_layers=sizes.num_layers,
            num_heads=sizes.num_heads,
            num_kv_heads=sizes.num_kv_heads,
            head_dim=sizes.head_dim,
            intermediate_size=sizes.intermediate_size,
            vocab_size=sizes.vocab_size,
            rope_theta=sizes.rope_theta,
            mrope_section=sizes.mrope_section,
            rms_norm_eps=sizes.rms_norm_eps,
            embedding_file=f"embeddings/{part}.npy",
            embedding_dtype=self.ckpt.dtype(f"{part}.model.embed_tokens.weight"),
        )


def _dit_geometry(config: Any) -> DitGeometry:
    return DitGeometry(
        mel_dim=config.mel_dim,
        repeats=config.repeats,
        block_size=config.block_size,
        look_back_blocks=max(1, len(config.look_backward_layers)),
        look_ahead_blocks=max(1, len(config.look_ahead_layers)),
        num_embeds=config.num_embeds,
        speaker_dim=config.enc_emb_dim,
        reference_dim=config.enc_dim,
    )


def _vocoder_geometry(config: Any) -> VocoderGeometry:
    return VocoderGeometry(hop=int(np.prod(config.upsample_rates)))


def _previous(out: Path) -> Manifest | None:
    """The manifest of the bundle that ``out`` holds, None if there is nothing to take over."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST_FILE).exists():
        raise ExportError(f"{out} exists and holds no bundle. Choose another folder, or remove it first.")
    try:
        manifest = read_manifest(out)
    except BundleError:
        return None  # an older or broken bundle: everything is made anew
    whole = {name: spec for name, spec in manifest.graphs.items() if _intact(out, manifest, spec)}
    return msgspec.structs.replace(manifest, graphs=whole)


def _intact(out: Path, manifest: Manifest, spec: GraphSpec) -> bool:
    for file in (spec.file, *spec.data):
        record, path = manifest.files.get(file), out / file
        if record is None or not path.is_file() or path.stat().st_size != record.size:
            return False
    return True


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place when the block ends well, and vanishes when it does not."""
    parent = out.absolute().parent
    folder, old = parent / f".{out.name}.partial-{os.getpid()}", parent / f".{out.name}.old-{os.getpid()}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        yield folder
        if out.exists():
            out.rename(old)
        folder.rename(out)
    except OSError as error:
        if old.exists() and not out.exists():
            old.rename(out)
        if error.errno in _DISK_ERRORS:
            raise ExportError(
                f"the disk is full: {error.strerror} while writing the bundle to {parent}. Nothing was left behind. "
                "Free some space or choose another folder."
            ) from error
        raise ExportError(f"cannot write the bundle to {out}: {error}. Nothing was left behind.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _take_over(source: Path, target: Path) -> None:
    """Hard-link a file into the new bundle, or copy it where links are not possible."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _existing_parent(path: Path) -> Path:
    path = path.absolute().parent
    while not path.exists():
        path = path.parent
    return path


def _itemsize(dtype: str) -> int:
    return 2 if dtype in ("bfloat16", "float16") else 4


def _source_key(ckpt: Checkpoint) -> str:
    """What all graphs depend on: the weights as they lie on disk, and the code that exports them."""
    weights = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(ckpt.path.glob("*.safetensors"))]
    code = [(p.name, _sha256_file(p)) for p in sorted(Path(__file__).parent.rglob("*.py"))]
    versions = [importlib.metadata.version(name) for name in ("torch", "onnx", "onnxscript", "onnx-ir")]
    return _sha256_of([ckpt.fingerprint, weights, code, versions])


def _sha256_of(value: object) -> str:
    return hashlib.sha256(msgspec.json.encode(value)).hexdigest()


def _sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
