"""The engines listed in a bundle: their records, and finding the one that this machine can run.

Engines are made on, or for, one machine, so they are not part of the bundle as exported: ``engines/engines.json`` lists
them and bundle.json stays as it was. Each engine has a record beside it, which says what it was built from and with.
An engine is code that a GPU driver runs: one that is not listed with its hash is never loaded. The format is written
down in docs/bundle.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from ..errors import BackendError, BundleError
from .graph_spec import DimRange
from .listed_files import SHA256, Document, bad_path, read_document, resolve_listed, sha256_of
from .manifest import FileRecord, Manifest
from .reader import MANIFEST_FILE, Bundle

BUILDERS = ("tensorrt", "tensorrt-rtx")
ENGINES_FILE = "engines/engines.json"
ENGINES_SCHEMA_VERSION = 1
_MEND = "Run 'omniport build' again"
_LISTING = Document(
    format="omniport-engines",
    newest=ENGINES_SCHEMA_VERSION,
    what="a list of engines",
    made_by="omniport build",
    mend=_MEND,
)
_RECORD = replace(_LISTING, format="omniport-engine", what="an engine's record")
_CAPABILITY = re.compile(r"\d{1,3}\.\d")
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")


class ShapeRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Smallest, typical and largest shape of one input."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One optimization profile, in the engine's order."""

    name: str
    dims: dict[str, DimRange]
    """range of each symbolic dimension of the graph under this profile"""
    inputs: dict[str, ShapeRange]
    """shape range of every input that has a symbolic dimension"""


class EngineRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one engine was built from, with what, and for which machine."""

    format: str = "omniport-engine"
    schema_version: int = ENGINES_SCHEMA_VERSION
    graph: str
    builder: str
    """``tensorrt`` or ``tensorrt-rtx``"""
    builder_version: str
    """as the Python package says; an engine runs under this version only"""
    target: str
    """name in `omniport targets`"""
    compute_capability: str
    """of the GPU it runs on, ``8.9``"""
    precision: str
    """precision of the bundle"""
    dtype: str
    """dtype of this graph's weights and matrix products, as in its GraphSpec"""
    profiles: tuple[Profile, ...]
    fixed_dims: dict[str, int]
    """symbolic dimensions that were given their value before building (the KV cache's capacity)"""
    flags: tuple[str, ...]
    """builder and network flags that were set"""
    onnx: dict[str, FileRecord]
    """the ONNX file and its weight files as built from: path in the bundle -> size and sha256"""
    engine: FileRecord
    weights_bytes: int
    """bytes of the graph's weights in the ONNX file set"""
    layers: dict[str, int]
    """layer type -> count in the parsed network"""
    build_seconds: float
    peak_memory_bytes: int
    """most resident memory of the building process, less what it held before"""
    key: str
    """sha256 over everything the engine is made from; a rerun of build skips engines with an equal key"""


class ListedEngine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An engine and its record, as the listing knows them."""

    engine: FileRecord
    record: FileRecord


class EngineListing(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """engines/engines.json."""

    format: str = "omniport-engines"
    schema_version: int = ENGINES_SCHEMA_VERSION
    created_by: str
    engines: dict[str, ListedEngine]
    """path of the engine, relative to the bundle"""


@dataclass(frozen=True)
class Engine:
    """An engine that belongs to the bundle as it is now.

    Attributes:
        bundle: the bundle's folder.
        name: path relative to the bundle, as listed.
        path: absolute; inside the bundle, of the listed size. `verify_engine` compares its hash.
    """

    bundle: Path
    name: str
    path: Path
    record: EngineRecord


@dataclass(frozen=True)
class Engines:
    """Every listed engine. ``unusable``: path relative to the bundle -> why it is not to be loaded."""

    usable: tuple[Engine, ...]
    unusable: dict[str, str]


def engine_path(builder: str, target: str, precision: str, graph: str) -> str:
    """Path of an engine, relative to the bundle."""
    return f"engines/{builder}-{target}-{precision}/{graph}.engine"


def record_path(engine: str) -> str:
    """Path of the record of the engine at ``engine``."""
    return f"{engine.removesuffix('.engine')}.json"


def build_line(bundle: Path, target: str, builder: str = "auto", graphs: tuple[str, ...] = ()) -> str:
    """The command that builds what is missing."""
    parts = ["omniport build", str(bundle), "--target", target]
    if builder != "auto":
        parts += ["--builder", builder]
    if graphs:
        parts += ["--graphs", ",".join(graphs)]
    return " ".join(parts)


def read_listing(root: Path) -> EngineListing | None:
    """engines/engines.json of a bundle folder; None if nothing was ever built.

    Raises:
        BundleError: malformed, hostile, or newer than this release.
    """
    path = root / ENGINES_FILE
    if not path.exists() and not path.is_symlink():
        return None
    listing = read_document(path, EngineListing, _LISTING)
    for name, listed in listing.engines.items():
        for problem in _listing_problems(name, listed):
            raise BundleError(f"{path}: engine {name[:200]!r} {problem}. {_MEND}")
    return listing


def list_engines(bundle: Bundle) -> Engines:
    """All engines that the bundle lists, told apart by whether they may be loaded.

    An engine may not be loaded when it or its record is missing or damaged, when the record does not describe it, or
    when the graph was exported again since.

    Raises:
        BundleError: see `read_listing`.
    """
    listing = read_listing(bundle.root)
    usable: list[Engine] = []
    unusable: dict[str, str] = {}
    for name, listed in (listing.engines if listing is not None else {}).items():
        try:
            usable.append(_open(bundle, name, listed))
        except BundleError as error:
            unusable[name] = str(error)
    return Engines(tuple(usable), unusable)


def find_engine(bundle: Bundle, graph: str, *, builder: str, version: str, capability: str) -> Engine:
    """The engine of ``graph`` that this machine can run.

    Args:
        builder: ``tensorrt`` or ``tensorrt-rtx``, whichever is installed here.
        version: its version, as the Python package says.
        capability: compute capability of the GPU, ``8.9``.

    Raises:
        BackendError: there is none; says what there is and which `omniport build` makes it.
        BundleError: the listing cannot be trusted, see `read_listing`.
    """
    wanted = (builder, version, capability)
    found = list_engines(bundle)
    ours = [engine for engine in found.usable if engine.record.graph == graph]
    for engine in ours:
        record = engine.record
        if (record.builder, record.builder_version, record.compute_capability) == wanted:
            return engine
    there = [f"{e.name} is for {_described(e.record)}" for e in ours]
    there += [why for name, why in found.unusable.items() if name.endswith(f"/{graph}.engine")]
    raise BackendError(
        f"{bundle.root} has no engine of {graph} for {builder} {version} on compute capability {capability}"
        f" ({'; '.join(there) or 'none was built'}). Build it on this machine: "
        f"{build_line(bundle.root, 'this', builder, (graph,))}"
    )


def verify_engine(engine: Engine, advance: Callable[[int], None] | None = None) -> None:
    """Compare the engine's sha256 with the listed one. To be called before any byte of it is given to a driver.

    Args:
        advance: called with the bytes read, block by block.

    Raises:
        BundleError: it is not the file that was built.
    """
    record = engine.record
    found = sha256_of(engine.path, advance)
    if found != record.engine.sha256.lower():
        raise BundleError(
            f"{engine.path} has sha256 {found}; {ENGINES_FILE} lists {record.engine.sha256}. The engine was changed or "
            f"damaged and is not loaded. Build it again: "
            f"{build_line(engine.bundle, record.target, record.builder, (record.graph,))} --force"
        )


def graph_files(manifest: Manifest, graph: str) -> dict[str, FileRecord]:
    """The ONNX file of a graph and its weight files, as the manifest lists them."""
    spec = manifest.graphs[graph]
    return {name: manifest.files[name] for name in (spec.file, *spec.data)}


def _open(bundle: Bundle, name: str, listed: ListedEngine) -> Engine:
    root = bundle.root
    path = resolve_listed(root, name, listed.engine.size, ENGINES_FILE, _MEND)
    beside = record_path(name)
    described = resolve_listed(root, beside, listed.record.size, ENGINES_FILE, _MEND)
    if sha256_of(described) != listed.record.sha256.lower():
        raise BundleError(f"{beside} in {root} is not the file that {ENGINES_FILE} lists (sha256). {_MEND}")
    record = read_document(described, EngineRecord, _RECORD)
    for problem in _record_problems(name, record, listed, bundle.manifest):
        raise BundleError(f"{beside} in {root}: {problem}. {_MEND}")
    if _hashes(record.onnx) != _hashes(graph_files(bundle.manifest, record.graph)):
        raise BundleError(
            f"{name} in {root} was built from another {record.graph} than {MANIFEST_FILE} lists: the graph was "
            f"exported again since. {_MEND}"
        )
    return Engine(root, name, path, record)


def _listing_problems(name: str, listed: ListedEngine) -> Iterator[str]:
    reason = bad_path(name)
    if reason or not name.startswith("engines/") or not name.endswith(".engine"):
        yield f"{reason or 'is elsewhere'}; a path like engines/FOLDER/GRAPH.engine was expected"
    for record in (listed.engine, listed.record):
        yield from _file_problems(record)


def _record_problems(name: str, record: EngineRecord, listed: ListedEngine, manifest: Manifest) -> Iterator[str]:
    if record.builder not in BUILDERS:
        yield f"builder is {record.builder[:80]!r}; known: {', '.join(BUILDERS)}"
    if record.graph not in manifest.graphs:
        yield f"graph is {record.graph[:80]!r}, which {MANIFEST_FILE} does not have"
    if not _NAME.fullmatch(record.target) or not _CAPABILITY.fullmatch(record.compute_capability):
        yield "target or compute_capability is malformed; names like rtx-4090 and 8.9 were expected"
    if name != engine_path(record.builder, record.target, record.precision, record.graph):
        yield f"it describes another engine than {name}"
    if _hashes({name: record.engine}) != _hashes({name: listed.engine}):
        yield f"its engine's size or sha256 is not the one that {ENGINES_FILE} lists"
    for file in record.onnx.values():
        yield from _file_problems(file)
    numbers = (record.weights_bytes, record.build_seconds, record.peak_memory_bytes, *record.layers.values())
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        yield "a size, time or count is negative or not finite"
    if not record.profiles:
        yield "it has no profile; at least one was expected"
    for profile in record.profiles:
        yield from _profile_problems(profile)


def _profile_problems(profile: Profile) -> Iterator[str]:
    for dim, span in profile.dims.items():
        if not 0 <= span.min <= span.opt <= span.max:
            yield f"dimension {dim!r} of profile {profile.name!r} ranges over {span.min}, {span.opt}, {span.max}"
    for name, shapes in profile.inputs.items():
        ordered = all(0 <= a <= b <= c for a, b, c in zip(shapes.min, shapes.opt, shapes.max, strict=False))
        if not ordered or not len(shapes.min) == len(shapes.opt) == len(shapes.max):
            yield f"input {name!r} of profile {profile.name!r} has shapes that do not ascend"


def _file_problems(record: FileRecord) -> Iterator[str]:
    if record.size < 0:
        yield f"has size {record.size}; 0 or more was expected"
    if not SHA256.fullmatch(record.sha256):
        yield f"has sha256 {record.sha256[:80]!r}; 64 hexadecimal digits were expected"


def _hashes(files: dict[str, FileRecord]) -> dict[str, tuple[int, str]]:
    return {name: (record.size, record.sha256.lower()) for name, record in files.items()}


def _described(record: EngineRecord) -> str:
    return f"{record.builder} {record.builder_version} on {record.compute_capability}"
