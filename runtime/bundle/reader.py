"""Open a bundle: bundle.json, the files it lists, embedding tables and voices.

A bundle may come from anywhere, so it is read as hostile: unknown fields, files that are not listed, sizes that do not
match and paths that leave the folder are refused before anything else is read. The format is written down in
docs/bundle.md.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..errors import BundleError, UnknownVoice, UsageError
from ..system.foreign import foreign
from ..system.path_arguments import paths_checked
from ..system.progress import Progress
from .bfloat16 import from_bfloat16
from .consistency import check_manifest
from .listed_files import Document, read_document, resolve_listed, sha256_of
from .manifest import SCHEMA_VERSION, DecoderGeometry, Manifest, VoiceSpec

MANIFEST_FILE = "bundle.json"
_MAX_VOICE_BYTES = 1 << 20
_READS = 5
DOCUMENT = Document(
    format="omniport-bundle",
    newest=SCHEMA_VERSION,
    what="a bundle manifest",
    made_by="omniport export",
    mend="Copy or export the bundle again",
)
_STORED_AS = {"float32": "float32", "float16": "float16", "bfloat16": "uint16", "uint16": "uint16"}


_Read = TypeVar("_Read")


class EmbeddingTable:
    """A token-embedding table that stays on disk; rows are read when they are asked for.

    Args:
        path: .npy file [vocabulary, width].
        geometry: the decoder the table belongs to.

    Raises:
        BundleError: not a plain .npy file of the shape and dtype that the manifest names.
    """

    def __init__(self, path: Path, geometry: DecoderGeometry) -> None:
        with foreign(
            BundleError,
            f"cannot read the embedding table {path}",
            "A plain .npy file was expected: export the bundle again",
        ):
            table = _read(lambda: np.load(path, mmap_mode="r", allow_pickle=False))
        expected = (geometry.vocab_size, geometry.embedding_size)
        stored = _STORED_AS.get(geometry.embedding_dtype)
        shape, dtype = getattr(table, "shape", None), getattr(table, "dtype", None)
        if (
            not isinstance(table, np.ndarray)
            or shape != expected
            or str(dtype) != stored
            or not table.flags.c_contiguous
        ):
            raise BundleError(
                f"the embedding table {path} holds {dtype} {shape}; {stored} {expected} in C order was expected "
                f"({geometry.embedding_dtype}). Export the bundle again"
            )
        self._table: NDArray[Any] = np.asarray(table)

    @property
    def vocab_size(self) -> int:
        """Number of rows."""
        return int(self._table.shape[0])

    @property
    def width(self) -> int:
        """Values of one row."""
        return int(self._table.shape[1])

    def rows(self, ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """Embeddings of ``ids``: float32 [n, width].

        Raises:
            BundleError: an id outside the table (tokenizer and table do not belong together).
        """
        index = np.asarray(ids, np.int64).reshape(-1)
        if index.size and (index.min() < 0 or index.max() >= self.vocab_size):
            bad = int(index[(index < 0) | (index >= self.vocab_size)][0])
            raise BundleError(
                f"token id {bad} is outside the embedding table of {self.vocab_size} rows. Tokenizer and table are not "
                "from the same export: export the bundle again"
            )
        rows = self._table[index]
        if rows.dtype == np.uint16:
            return from_bfloat16(rows)
        return np.ascontiguousarray(rows, np.float32)


class Voice(NamedTuple):
    """A voice with its vectors.

    Attributes:
        speaker: float32 [192], what the DiT is conditioned on.
        timbre: float32 [128], the ECAPA vector; bundles and the DiT's graph call it ``reference``.
    """

    spec: VoiceSpec
    speaker: NDArray[np.float32]
    timbre: NDArray[np.float32]

    def feeds(self) -> dict[str, NDArray[Any]]:
        """The DiT's inputs that say whose voice it is."""
        return {"speaker": self.speaker[None], "reference": self.timbre[None]}


class Bundle:
    """An opened bundle folder; every file it hands out is listed in bundle.json and lies inside the folder."""

    def __init__(
        self, root: Path, manifest: Manifest, files: dict[str, Path], stamp: tuple[int, ...] | None = None
    ) -> None:
        self.root = root
        self.manifest = manifest
        self._files = files
        self._stamp = stamp or _stamp(root)
        self._tables: dict[str, EmbeddingTable] = {}

    @classmethod
    @paths_checked
    def open(
        cls,
        path: str | os.PathLike[str],
        verify: bool = False,
        progress: Progress | None = None,
    ) -> Bundle:
        """Open and check a bundle folder.

        Args:
            path: the folder that holds bundle.json.
            verify: also compare the sha256 of every file (reads all of them).
            progress: called with (file, bytes done, bytes in all) while verifying.

        Raises:
            BundleError: says which file or field is wrong and what to do.
        """
        root = Path(path)
        stamp, manifest = _stamp(root), read_manifest(root)
        files = {
            name: resolve_listed(root, name, record.size, MANIFEST_FILE, DOCUMENT.mend)
            for name, record in manifest.files.items()
        }
        if verify:
            total, done = sum(record.size for record in manifest.files.values()), 0
            for name, record in manifest.files.items():
                found = sha256_of(files[name])
                if found != record.sha256.lower():
                    raise BundleError(
                        f"{name} in {root} has sha256 {found}; bundle.json lists {record.sha256}. The file was "
                        "changed or damaged: copy or export the bundle again"
                    )
                done += record.size
                if progress is not None:
                    progress(name, done, total)
        return cls(root, manifest, files, stamp)

    def path(self, relative: str) -> Path:
        """Absolute path of a listed file.

        Raises:
            BundleError: the bundle does not list it, or another export has replaced it since the bundle was opened.
        """
        if relative not in self._files:
            raise BundleError(f"{self.root} does not list a file {relative!r} in bundle.json")
        replaced = _stamp(self.root) != self._stamp
        if replaced and read_manifest(self.root).files.get(relative) != self.manifest.files[relative]:
            raise BundleError(
                f"{relative} in {self.root} was replaced since the bundle was opened: it would not go with what was "
                "read before. Open the bundle again"
            )
        return self._files[relative]

    def with_graphs(self, names: Collection[str]) -> Bundle:
        """The same bundle, of these graphs only."""
        held = {name: spec for name, spec in self.manifest.graphs.items() if name in names}
        return Bundle(self.root, msgspec.structs.replace(self.manifest, graphs=held), self._files, self._stamp)

    def embedding(self, name: str) -> EmbeddingTable:
        """The token-embedding table of a decoder, opened on first use.

        Raises:
            BundleError: the bundle has no such decoder, or the table is malformed.
        """
        if name not in self._tables:
            geometry = self.manifest.decoders.get(name)
            if geometry is None:
                raise BundleError(f"{self.root} has no {name}; export a checkpoint that has one")
            self._tables[name] = EmbeddingTable(self.path(geometry.embedding_file), geometry)
        return self._tables[name]

    def find_voice(self, name: str | None = None) -> VoiceSpec:
        """The voice of that name; None gives Chelsie (the reference's default) or, without her, the first.

        Raises:
            UnknownVoice: lists the voices there are.
            UsageError: the bundle has no voices at all.
        """
        voices = {voice.name: voice for voice in self.manifest.voices}
        if not voices:
            raise UsageError("the bundle has no voices: it was exported from a checkpoint that does not speak")
        if name is None:
            return voices.get("Chelsie", self.manifest.voices[0])
        if name not in voices:
            raise UnknownVoice(f"there is no voice {name!r}; known voices: {', '.join(sorted(voices))}")
        return voices[name]

    def require_graph(self, name: str, purpose: str) -> None:
        """UsageError, which names what ``purpose`` needs it, unless the bundle has this graph."""
        if name not in self.manifest.graphs:
            raise UsageError(
                f"{purpose} needs the graph {name!r}, which the bundle does not have (it has "
                f"{', '.join(self.manifest.graphs)}): export it again with this graph"
            )

    def voice(self, name: str | None = None) -> Voice:
        """A voice with its vectors.

        Raises:
            UnknownVoice, UsageError: see ``find_voice``.
            BundleError: the voice's file is malformed.
        """
        spec = self.find_voice(name)
        path, dit = self.path(spec.file), self.manifest.dit
        if dit is None:
            raise BundleError(f"{self.root} has voices but no DiT; export the bundle again")
        with foreign(
            BundleError,
            f"cannot read the voice {spec.name!r} from {path}",
            "An .npz with arrays 'speaker' and 'reference' was expected: export the bundle again",
        ):
            with zipfile.ZipFile(path) as archive:
                size = sum(item.file_size for item in archive.infolist())
            if size > _MAX_VOICE_BYTES:
                raise BundleError(
                    f"the voice file {path} unpacks to {size} bytes; at most {_MAX_VOICE_BYTES} was expected"
                )
            speaker, timbre = _read(lambda: _voice_arrays(path))
        for label, array, width in (("speaker", speaker, dit.speaker_dim), ("reference", timbre, dit.reference_dim)):
            if array.shape != (width,) or array.dtype != np.float32 or not np.isfinite(array).all():
                raise BundleError(
                    f"{label} of voice {spec.name!r} is {array.dtype} {array.shape}; finite float32 ({width},) was "
                    "expected. Export the bundle again"
                )
        return Voice(spec, speaker, timbre)


def _voice_arrays(path: Path) -> list[NDArray[Any]]:
    with np.load(path, allow_pickle=False) as arrays:
        return [np.asarray(arrays[name]) for name in ("speaker", "reference")]


def _read(read: Callable[[], _Read]) -> _Read:
    """What ``read`` gives, asked again if Python stumbled.

    numpy reads an array's header by `ast`, which in CPython 3.11 counts its depth for all threads together: while
    another thread parses, too, it may raise "SystemError: AST constructor recursion depth mismatch".
    """
    for _ in range(_READS - 1):
        with suppress(SystemError):
            return read()
    return read()


def _stamp(root: Path) -> tuple[int, ...]:
    """What changes with bundle.json: most files are opened when they are first used, and an export may come between."""
    try:
        found = (root / MANIFEST_FILE).stat()
    except (OSError, ValueError):  # ValueError: a null byte in the name
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def read_manifest(root: Path) -> Manifest:
    """Read and check bundle.json of a folder (not the files it lists).

    Raises:
        BundleError: missing, not JSON, wrong format, newer schema version, unknown or missing fields, bad values.
    """
    manifest = read_document(root / MANIFEST_FILE, Manifest, DOCUMENT)
    check_manifest(manifest, root / MANIFEST_FILE)
    return manifest
