"""The listing of engines: good ones, stale ones, and ones made to do harm."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from omniport.runtime.bundle.engines import (
    ENGINES_FILE,
    EngineListing,
    EngineRecord,
    ListedEngine,
    Profile,
    ShapeRange,
    engine_path,
    find_engine,
    graph_files,
    list_engines,
    read_listing,
    record_path,
    verify_engine,
)
from omniport.runtime.bundle.graph_spec import DimRange
from omniport.runtime.bundle.manifest import FileRecord
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import BackendError, BundleError
from support.bundles import edit, make_bundle
from support.command_line import Omniport, refused

HERE = {"builder": "tensorrt-rtx", "version": "1.7.1", "capability": "8.9"}
NAME = engine_path("tensorrt-rtx", "rtx-4090", "fp32", "dit")


def file_record(data: bytes) -> FileRecord:
    return FileRecord(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def make_record(root: Path, engine: bytes, **changes: Any) -> EngineRecord:
    fields: dict[str, Any] = {
        "graph": "dit",
        "builder": "tensorrt-rtx",
        "builder_version": "1.7.1",
        "target": "rtx-4090",
        "compute_capability": "8.9",
        "precision": "fp32",
        "dtype": "float32",
        "profiles": (
            Profile(
                name="all",
                dims={"codes": DimRange(1, 2, 3)},
                inputs={"codes": ShapeRange(min=(1, 1), opt=(1, 2), max=(1, 3))},
            ),
        ),
        "fixed_dims": {},
        "flags": ("STRONGLY_TYPED",),
        "onnx": graph_files(Bundle.open(root).manifest, "dit"),
        "engine": file_record(engine),
        "weights_bytes": 7,
        "layers": {"MATRIX_MULTIPLY": 1},
        "build_seconds": 1.5,
        "peak_memory_bytes": 1000,
        "key": "0" * 64,
    }
    return EngineRecord(**{**fields, **changes})


def put(root: Path, **changes: Any) -> str:
    """Put a stand-in engine into the bundle and list it."""
    data = b"an engine"
    record = make_record(root, data, **changes)
    name = engine_path(record.builder, record.target, record.precision, record.graph)
    text = msgspec.json.encode(record)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(data)
    (root / record_path(name)).write_bytes(text)
    held = read_listing(root)
    listed = {**(held.engines if held else {}), name: ListedEngine(engine=record.engine, record=file_record(text))}
    (root / ENGINES_FILE).write_bytes(msgspec.json.encode(EngineListing(created_by="tests", engines=listed)))
    return name


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = make_bundle(tmp_path / "bundle")
    assert put(folder) == NAME
    return folder


def change_listing(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = root / ENGINES_FILE
    listing = json.loads(path.read_text())
    change(listing)
    path.write_text(json.dumps(listing))


def change_record(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the record of the engine, and list it as it then is."""
    path = root / record_path(NAME)
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    listed = file_record(path.read_bytes())
    change_listing(root, lambda m: m["engines"][NAME].update(record=msgspec.to_builtins(listed)))


def unusable(root: Path, match: str) -> None:
    """The engine is known, not offered, and the finder says why and what to do."""
    bundle = Bundle.open(root)
    found = list_engines(bundle)
    assert not found.usable
    with pytest.raises(BackendError, match=match) as caught:
        find_engine(bundle, "dit", **HERE)
    assert "omniport build" in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_finds_what_fits_this_machine(root: Path) -> None:
    other = put(root, target="rtx-3090", compute_capability="8.6")
    bundle = Bundle.open(root, verify=True)
    assert [engine.name for engine in list_engines(bundle).usable] == [NAME, other]
    found = find_engine(bundle, "dit", **HERE)
    assert found.record.target == "rtx-4090"
    assert found.path.read_bytes() == b"an engine"
    seen: list[int] = []
    verify_engine(found, seen.append)
    assert sum(seen) == 9
    assert find_engine(bundle, "dit", **{**HERE, "capability": "8.6"}).name == other


def test_a_bundle_without_engines(tmp_path: Path) -> None:
    bundle = Bundle.open(make_bundle(tmp_path / "b"))
    assert read_listing(bundle.root) is None
    assert list_engines(bundle).usable == ()
    line = f"omniport build {bundle.root} --target this --builder tensorrt-rtx --graphs thinker"
    with pytest.raises(BackendError, match=f"none was built.*{line}"):
        find_engine(bundle, "thinker", **HERE)


@pytest.mark.parametrize("change", [{"builder": "tensorrt"}, {"version": "1.7.2"}, {"capability": "12.0"}])
def test_another_machine(root: Path, change: dict[str, str]) -> None:
    with pytest.raises(BackendError, match=r"is for tensorrt-rtx 1\.7\.1 on 8\.9.*omniport build .* --target this"):
        find_engine(Bundle.open(root), "dit", **{**HERE, **change})


def test_a_changed_engine_is_not_loaded(root: Path) -> None:
    (root / NAME).write_bytes(b"an enginE")
    with pytest.raises(BundleError, match=r"sha256.*not loaded.*omniport build"):
        verify_engine(find_engine(Bundle.open(root), "dit", **HERE))
    (root / NAME).write_bytes(b"an engine and more")
    unusable(root, "has 18 bytes; engines/engines.json lists 9")
    (root / NAME).unlink()
    unusable(root, "cannot be opened")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda root: (root / NAME).write_bytes(b"an eng"), "has 6 bytes"),
        (lambda root: (root / NAME).write_bytes(b"an enginE"), "sha256"),
        (lambda root: (root / NAME).unlink(), "cannot be opened"),
        (lambda root: (root / record_path(NAME)).write_text("{}"), "engines/engines.json"),
        (lambda root: (root / record_path(NAME)).unlink(), "cannot be opened"),
        (lambda root: edit(root, lambda m: m["files"]["graphs/dit.data"].update(sha256="f" * 64)), "sha256"),
    ],
)
@pytest.mark.parametrize("output", ["--quiet", "--json"])
def test_inspect_verify_fails_on_an_engine_that_cannot_be_used(
    root: Path, omniport: Omniport, damage: Callable[[Path], object], reason: str, output: str
) -> None:
    assert omniport("inspect", root, "--verify", output)[0] == 0
    damage(root)
    refused(omniport("inspect", root, "--verify", output), reason)


def test_a_graph_that_was_exported_again(root: Path) -> None:
    edit(root, lambda m: m["files"]["graphs/dit.data"].update(sha256="f" * 64))
    unusable(root, "exported again since")


def test_links_are_followed_inside_only(root: Path) -> None:
    outside = root.parent / "outside"
    (root / NAME).rename(outside)
    (root / NAME).symlink_to(outside)
    unusable(root, "link that leaves the bundle")


RECORDS: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("unknown field", lambda r: r.update(colour="red"), "unknown field `colour`"),
    ("missing field", lambda r: r.pop("key"), "missing required field `key`"),
    ("newer", lambda r: r.update(schema_version=2), "schema version 2.*upgrade"),
    ("other format", lambda r: r.update(format="omniport-engines"), "format 'omniport-engines'"),
    ("other builder", lambda r: r.update(builder="tvm"), "builder is 'tvm'"),
    ("other graph", lambda r: r.update(graph="talker"), "another engine"),
    ("unknown graph", lambda r: r.update(graph="x"), "graph is 'x'"),
    ("other target", lambda r: r.update(target="rtx-5090"), "another engine"),
    ("a target that is a path", lambda r: r.update(target="../../x"), "malformed"),
    ("no capability", lambda r: r.update(compute_capability="sm89"), "malformed"),
    ("other engine", lambda r: r["engine"].update(sha256="0" * 64), "not the one that"),
    ("no hash", lambda r: r["onnx"]["graphs/dit.onnx"].update(sha256="0"), "64 hexadecimal"),
    ("negative size", lambda r: r.update(weights_bytes=-1), "negative"),
    ("no profile", lambda r: r.update(profiles=[]), "no profile"),
    ("backward profile", lambda r: r["profiles"][0]["dims"]["codes"].update(min=3), "ranges over 3, 2, 3"),
    ("backward shapes", lambda r: r["profiles"][0]["inputs"]["codes"].update(min=[1, 9]), "do not ascend"),
    ("ragged shapes", lambda r: r["profiles"][0]["inputs"]["codes"].update(min=[1]), "do not ascend"),
]


@pytest.mark.parametrize(("change", "match"), [r[1:] for r in RECORDS], ids=[r[0] for r in RECORDS])
def test_wrong_records(root: Path, change: Callable[[dict[str, Any]], object], match: str) -> None:
    change_record(root, change)
    unusable(root, match)


def test_a_record_that_was_swapped(root: Path) -> None:
    path = root / record_path(NAME)
    path.write_bytes(path.read_bytes().replace(b'"8.9"', b'"9.0"'))
    unusable(root, "is not the file that")


LISTINGS: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("unknown field", lambda m: m.update(colour="red"), "unknown field `colour`"),
    ("newer", lambda m: m.update(schema_version=2, colour="red"), "schema version 2.*upgrade omniport"),
    ("schema zero", lambda m: m.update(schema_version=0), "schema version 0"),
    ("other format", lambda m: m.update(format="omniport-bundle"), "format 'omniport-bundle'"),
    ("no engines", lambda m: m.pop("engines"), "missing required field `engines`"),
    ("negative size", lambda m: m["engines"][NAME]["engine"].update(size=-1), "size -1"),
    ("no hash", lambda m: m["engines"][NAME]["record"].update(sha256="x"), "64 hexadecimal"),
]


@pytest.mark.parametrize(("change", "match"), [e[1:] for e in LISTINGS], ids=[e[0] for e in LISTINGS])
def test_wrong_listings(root: Path, change: Callable[[dict[str, Any]], object], match: str) -> None:
    change_listing(root, change)
    with pytest.raises(BundleError, match=match):
        list_engines(Bundle.open(root))


OUTSIDE = (
    "/engines/a.engine",
    "../engines/a.engine",
    "engines/../../a.engine",
    "engines//a.engine",
    "engines/./a.engine",
    "engines/a\0.engine",
    "engines\\a.engine",
    "c:/a.engine",
    "engines/a.so",
    "graphs/dit.onnx",
    "",
)


@pytest.mark.parametrize("name", OUTSIDE)
def test_paths_that_leave_the_engines_are_refused(root: Path, name: str) -> None:
    change_listing(root, lambda m: m["engines"].update({name: m["engines"][NAME]}))
    with pytest.raises(BundleError, match="path like engines/"):
        list_engines(Bundle.open(root))


def test_listings_that_are_none(root: Path) -> None:
    path = root / ENGINES_FILE
    good = path.read_bytes()
    for text in (b"", b"{", b"[]", b"\xff", b"[" * 100_000, good[:-1] + b',"created_by":"me"}'):
        path.write_bytes(text)
        with pytest.raises(BundleError, match=r"engines\.json"):
            list_engines(Bundle.open(root))
    with path.open("r+b") as file:
        file.truncate(1 << 34)
    with pytest.raises(BundleError, match="17179869184 bytes"):
        list_engines(Bundle.open(root))
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(BundleError, match="cannot read"):
        list_engines(Bundle.open(root))
