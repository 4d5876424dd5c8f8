"""Write what a bundle holds besides graphs: manifest, token embeddings, voices."""

from __future__ import annotations

import importlib.metadata
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omniport.runtime.bundle.data_file import DataFile
from omniport.runtime.bundle.graph_spec import DTYPES
from omniport.runtime.bundle.manifest import (
    FileRecord,
    KvSpec,
    Manifest,
    SolverSpec,
    Source,
    VoiceSpec,
)

from .checkpoint import frontends
from .checkpoint.checkpoint import Checkpoint
from .checkpoint.tokenizer_json import tokenizer_json
from .export_options import ExportOptions
from .models.model_parts import parts_of
from .models.module import blocks, refuse_not_finite, to_torch
from .models.speakers import Speaker, Vector, load_speakers, speaker_vectors, write_voice
from .weights_check import embedding_keys


def base_manifest(
    ckpt: Checkpoint, options: ExportOptions, solver: SolverSpec, voices: tuple[VoiceSpec, ...]
) -> Manifest:
    """All of the manifest but ``graphs``, ``files`` and the KV cache's dtype, which the graphs decide.

    Raises:
        CheckpointError: a tokenizer, processor or generation file that is missing or contradicts config.json.
    """
    config = ckpt.config
    described: dict[str, Any] = {}
    for part in parts_of(config).values():
        described |= part.describe(ckpt, solver)
    if "vision" in described:
        described["vision"] = frontends.bounded(
            described["vision"], options.max_pixels, options.fps, options.max_frames
        )
    return Manifest(
        created_by=f"omniport {importlib.metadata.version('omniport')}",
        source=Source(name=ckpt.name, fingerprint=ckpt.fingerprint),
        precision=options.precision,
        tokens=frontends.special_tokens(ckpt),
        chat=frontends.chat_spec(ckpt),
        position_id_per_seconds=config.thinker_config.position_id_per_seconds,
        seconds_per_chunk=float(config.thinker_config.seconds_per_chunk),
        kv=KvSpec(form=options.kv, dtype="float32", max_context=options.max_context),
        graphs={},
        files={},
        voices=voices,
        **described,
    )


@dataclass(frozen=True)
class SmallParts:
    """Tokenizer and voices, ready to be written.

    Attributes:
        tokenizer: contents of tokenizer.json.
        vectors: voice's file -> its ``speaker`` float32 [192] and ``reference`` float32 [128].
    """

    tokenizer: bytes
    voices: tuple[VoiceSpec, ...]
    vectors: Mapping[str, tuple[Vector, Vector]]

    def write(self, folder: Path) -> list[str]:
        """Write the files of a bundle; returns their names."""
        (folder / "tokenizer.json").write_bytes(self.tokenizer)
        for file, vectors in self.vectors.items():
            (folder / file).parent.mkdir(exist_ok=True)
            write_voice(folder / file, *vectors)
        return ["tokenizer.json", *self.vectors]


def small_parts(ckpt: Checkpoint) -> SmallParts:
    """Make tokenizer and voices: what is wrong with them shows in a second.

    Raises:
        CheckpointError: a file is missing or corrupt, or a voice does not fit the model.
    """
    tokenizer = tokenizer_json(ckpt)
    if not ckpt.has_speech:
        return SmallParts(tokenizer, (), {})
    speakers = load_speakers(ckpt.path / "spk_dict.pt")
    references = speaker_vectors(ckpt, speakers)
    voices = _voice_specs(speakers)
    vectors = {voice.file: (speakers[voice.name].cond, references[voice.name]) for voice in voices}
    return SmallParts(tokenizer, voices, vectors)


def _voice_specs(speakers: Mapping[str, Speaker]) -> tuple[VoiceSpec, ...]:
    """Where each voice goes in the bundle."""
    specs = []
    for i, (name, speaker) in enumerate(speakers.items()):
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        file = f"voices/{i}-{slug}.npz" if slug else f"voices/{i}.npz"
        specs.append(VoiceSpec(name=name, bos_token=speaker.bos_token, file=file))
    return tuple(specs)


def embedding_bytes(ckpt: Checkpoint) -> int:
    """Bytes of all token-embedding tables."""
    return sum(int(np.prod(ckpt.shape(key))) * DTYPES[ckpt.dtype(key)] for key in embedding_keys(ckpt).values())


def write_embeddings(ckpt: Checkpoint, folder: Path, advance: Callable[[int], None]) -> dict[str, FileRecord]:
    """Write the token-embedding tables of a bundle; returns size and sha256 of each file."""
    (folder / "embeddings").mkdir(exist_ok=True)
    keys = embedding_keys(ckpt)
    return {
        _embedding_file(part): _write_table(ckpt, keys[part], folder / _embedding_file(part), advance) for part in keys
    }


def _embedding_file(part: str) -> str:
    return f"embeddings/{part}.npy"


def _write_table(ckpt: Checkpoint, key: str, path: Path, advance: Callable[[int], None]) -> FileRecord:
    """Write a table as .npy in its stored dtype (bfloat16 as uint16): nothing is lost or widened."""
    shape, dtype = ckpt.shape(key), ckpt.dtype(key)
    stored = np.dtype("<u2") if dtype == "bfloat16" else np.dtype(dtype).newbyteorder("<")
    header = {"descr": np.lib.format.dtype_to_descr(stored), "fortran_order": False, "shape": shape}
    begin = io.BytesIO()
    np.lib.format.write_array_header_1_0(begin, header)
    with DataFile(path) as file:
        file.append(np.frombuffer(begin.getvalue(), np.uint8))
        for start, stop in blocks(shape, stored.itemsize):
            block = np.ascontiguousarray(ckpt.read(key, start, stop))
            ckpt.forget(key, start, stop)
            values = to_torch(block)
            refuse_not_finite(values, key, values.dtype)
            file.append(block)
            advance(block.nbytes)
        return file.finish()
