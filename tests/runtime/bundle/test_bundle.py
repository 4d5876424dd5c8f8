"""Opening bundles: good ones, damaged ones, and ones made to do harm."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import BundleError, UnknownVoice, UsageError
from omniport.runtime.session import OmniSession
from support.bundles import VOCABULARY, WIDTH, edit, make_bundle, make_manifest, stand_in, write_manifest
from support.fake_backend import FakeBackend
from support.json_numbers import changed, numbers


def refused(root: Path, match: str, **options: Any) -> None:
    with pytest.raises(BundleError, match=match) as caught:
        Bundle.open(root, **options)
    assert len(str(caught.value)) < 2000


def test_opens_and_verifies(root: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    bundle = Bundle.open(root, verify=True, progress=lambda *step: seen.append(step))
    assert bundle.manifest.thinker.vocab_size == VOCABULARY
    assert bundle.path("graphs/dit.onnx").read_bytes() == stand_in("dit")
    assert {name for name, _, _ in seen} == set(bundle.manifest.files)
    assert seen[-1][1] == seen[-1][2] > 0


def test_text_only_bundle_has_no_voice(tmp_path: Path) -> None:
    bundle = Bundle.open(make_bundle(tmp_path / "b", speak=False))
    with pytest.raises(UsageError, match="no voices"):
        bundle.voice()
    with pytest.raises(BundleError, match="no talker"):
        bundle.embedding("talker")


def test_voices(root: Path) -> None:
    bundle = Bundle.open(root)
    spec, speaker, timbre = bundle.voice(None)
    assert (spec.name, speaker.shape, timbre.shape) == ("Chelsie", (6,), (5,))
    assert bundle.voice("Ethan").speaker.tolist() != speaker.tolist()
    with pytest.raises(UnknownVoice, match=r"'Zoe'.*known voices: Chelsie, Ethan"):
        bundle.voice("Zoe")


@pytest.mark.parametrize("stumbles", [1, 1000])
def test_arrays_are_read_again_when_python_stumbles(root: Path, stumbles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython 3.11 says so now and then while several threads read an array's header."""
    plain, left = np.load, stumbles

    def stumbling(*args: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            raise SystemError("AST constructor recursion depth mismatch (before=51, after=48)")
        return plain(*args, **options)

    bundle = Bundle.open(root)
    wanted = bundle.voice().speaker
    monkeypatch.setattr(np, "load", stumbling)
    if stumbles == 1:
        np.testing.assert_array_equal(bundle.voice().speaker, wanted)
        left = 1
        assert bundle.embedding("thinker").vocab_size == VOCABULARY
        assert left < 0
    else:
        with pytest.raises(BundleError, match="recursion depth mismatch"):
            bundle.voice()


def test_without_chelsie_the_first_voice_is_the_default(root: Path) -> None:
    edit(root, lambda m: m["voices"].pop(1))
    assert Bundle.open(root).voice().spec.name == "Ethan"


def test_embedding_rows_of_every_dtype(root: Path) -> None:
    bundle = Bundle.open(root)
    stored = np.load(root / "thinker_embedding.npy")
    rows = bundle.embedding("thinker").rows([3, 0, 279, 3])
    assert rows.dtype == np.float32
    # bfloat16 bits read by hand: sign, 8 bits of exponent, 7 of fraction
    for row, index in zip(rows, (3, 0, 279, 3), strict=True):
        bits = stored[index].astype(int)
        value = np.where(bits >> 15, -1.0, 1.0) * 2.0 ** ((bits >> 7 & 255) - 127.0) * (1 + (bits & 127) / 128)
        np.testing.assert_array_equal(row, value.astype(np.float32))
    assert np.abs(rows).max() > 0.5
    assert bundle.embedding("thinker").rows([]).shape == (0, WIDTH)
    half = np.linspace(-2, 2, VOCABULARY * WIDTH).astype(np.float16).reshape(VOCABULARY, WIDTH)
    np.save(root / "thinker_embedding.npy", half)
    manifest = make_manifest()
    write_manifest(root, manifest)
    edit(root, lambda m: m["thinker"].update(embedding_dtype="float16"))
    rows = Bundle.open(root).embedding("thinker").rows([7])
    np.testing.assert_array_equal(rows[0], half[7].astype(np.float32))


def test_rows_belong_to_the_caller(root: Path) -> None:
    table = Bundle.open(root).embedding("talker")
    before = table.rows([1]).copy()
    table.rows([1])[:] = 7
    np.testing.assert_array_equal(table.rows([1]), before)


@pytest.mark.parametrize("bad", [-1, VOCABULARY])
def test_ids_outside_the_table(root: Path, bad: int) -> None:
    with pytest.raises(BundleError, match=f"token id {bad} is outside"):
        Bundle.open(root).embedding("thinker").rows([0, bad])


def concat_of_static(m: dict[str, Any]) -> None:
    m["kv"]["form"] = "concat"
    m["graphs"]["thinker"]["aliases"] = {"a": "b"}


def concat_of_nothing(m: dict[str, Any]) -> None:
    m["kv"]["form"] = "concat"
    m["graphs"]["thinker"]["grows"] = {"a": "b"}


def with_input(m: dict[str, Any], graph: str, name: str, shape: list[Any]) -> None:
    m["graphs"][graph]["inputs"] = [{"name": name, "dtype": "float32", "shape": shape}]


EDITS: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("unknown field", lambda m: m.update(colour="red"), "unknown field `colour`"),
    ("unknown nested field", lambda m: m["kv"].update(colour="red"), "unknown field `colour`.*kv"),
    ("missing field", lambda m: m.pop("chat"), "missing required field `chat`"),
    ("wrong type", lambda m: m["thinker"].update(num_layers="36"), "Expected `int`"),
    ("a bool for a number", lambda m: m["thinker"].update(num_layers=True), "Expected `int`"),
    ("fractional size", lambda m: m["files"]["tokenizer.json"].update(size=1.5), "Expected `int`"),
    ("negative size", lambda m: m["files"]["tokenizer.json"].update(size=-1), "has size -1"),
    ("no hash", lambda m: m["files"]["tokenizer.json"].update(sha256="abc"), "64 hexadecimal"),
    ("newer schema", lambda m: m.update(schema_version=4, colour="red"), "schema version 4.*upgrade omniport"),
    ("schema zero", lambda m: m.update(schema_version=0), "schema version 0"),
    ("other format", lambda m: m.update(format="zip"), "format 'zip'"),
    ("no format", lambda m: m.pop("format"), "missing required field `format`"),
    ("tokenizer not listed", lambda m: m.update(tokenizer_file="t.json"), "tokenizer_file is 't.json'"),
    ("graph not listed", lambda m: m["graphs"]["dit"].update(file="x.onnx"), "file of graph 'dit' is 'x.onnx'"),
    ("weights not listed", lambda m: m["graphs"]["dit"].update(data=["x"]), "data of graph 'dit' is 'x'"),
    ("voice not listed", lambda m: m["voices"][0].update(file="x.npz"), "voice 'Ethan' is 'x.npz'"),
    ("table not listed", lambda m: m["talker"].update(embedding_file="x"), "talker.embedding_file is 'x'"),
    ("missing file", lambda m: m["files"].update(ghost={"size": 1, "sha256": "0" * 64}), "ghost.*cannot be opened"),
    ("a folder", lambda m: m["files"].update(graphs={"size": 1, "sha256": "0" * 64}), "not a regular file"),
    ("unknown graph", lambda m: m["graphs"].update(x=m["graphs"]["dit"]), "graph 'x'"),
    ("swapped graphs", lambda m: m["graphs"].update(dit=m["graphs"]["thinker"]), "graph 'dit'"),
    ("half a speech part", lambda m: m.pop("dit"), "incomplete: dit"),
    ("zero layers", lambda m: m["thinker"].update(num_layers=0), "num_layers is 0"),
    ("no repeats", lambda m: m["dit"].update(repeats=0), "dit.repeats is 0"),
    ("unknown cache", lambda m: m["kv"].update(dtype="float99"), "kv.dtype is 'float99'; known"),
    ("window of no patches", lambda m: m["vision"].update(window_size=3), "window_size 3 is no multiple"),
    ("least above most", lambda m: m["vision"].update(min_pixels=10**8), "min_pixels 100000000 is above"),
    ("hop above window", lambda m: m["audio"].update(hop_length=401), "hop_length 401 is above"),
    ("endless", lambda m: with_input(m, "talker", "own", [1 << 40]), "has a size of 1099511627776"),
    ("other rate", lambda m: m["vocoder"].update(sample_rate=16000), "vocoder.sample_rate is 16000"),
    ("other sections", lambda m: m["thinker"].update(mrope_section=[1]), "half of head_dim"),
    ("odd heads", lambda m: m["thinker"].update(num_heads=3, num_kv_heads=2), "3 heads for 2"),
    ("talker of another width", lambda m: m["talker"].update(embedding_size=8), "talker.embedding_size is 8"),
    ("no context", lambda m: m["kv"].update(max_context=1), "max_context is 1"),
    ("other cache", lambda m: m["kv"].update(form="paged"), "'paged'"),
    ("other solver", lambda m: m["solver"].update(method="euler"), "'euler'"),
    (
        "stage outside the table",
        lambda m: m["solver"]["stages"][0].__setitem__(3, len(m["solver"]["table"])),
        "solver.stages",
    ),
    ("backward grid", lambda m: m["solver"]["grid"].reverse(), "does not increase"),
    ("two voices, one name", lambda m: m["voices"][0].update(name="Chelsie"), "same name"),
    ("stop token outside", lambda m: m["chat"].update(stop=[VOCABULARY]), f"token id {VOCABULARY}"),
    ("codec id outside", lambda m: m["codec"].update(bos=64), "codec id 64"),
    ("a growing cache in a static bundle", lambda m: m["graphs"]["thinker"].update(grows={"a": "b"}), "has grows"),
    ("a static cache in a concat bundle", concat_of_static, "has aliases, which a concat KV cache"),
    ("growing to nothing", concat_of_nothing, "grows output 'a'"),
    ("concat in version 1", lambda m: (m.update(schema_version=1), m["kv"].update(form="concat")), "version 1 has no"),
    ("empty dimension", lambda m: m["graphs"]["dit"].update(dims={"x": {"min": 0, "opt": 1, "max": 2}}), "0, 1, 2"),
    ("alias to nothing", lambda m: m["graphs"]["thinker"].update(aliases={"a": "b"}), "aliases output 'a'"),
]


@pytest.mark.parametrize(("change", "match"), [e[1:] for e in EDITS], ids=[e[0] for e in EDITS])
def test_wrong_manifests_are_refused(root: Path, change: Callable[[dict[str, Any]], object], match: str) -> None:
    edit(root, change)
    refused(root, match)


@pytest.mark.parametrize(
    ("graph", "tensor", "shape", "match"),
    [
        ("dit", "x", ["b", "f", 7], "tensor 'x' .* instead of 7 was expected"),
        ("thinker", "inputs_embeds", ["n", WIDTH], "3 dimensions were expected"),
    ],
)
def test_a_session_compares_shapes(root: Path, graph: str, tensor: str, shape: list[Any], match: str) -> None:
    edit(root, lambda m: with_input(m, graph, tensor, shape))
    bundle = Bundle.open(root)
    with pytest.raises(BundleError, match=match):
        OmniSession(bundle, FakeBackend(bundle.manifest))


@pytest.mark.parametrize("value", [10**18, -(10**18)])
def test_every_number_has_a_range(root: Path, value: int) -> None:
    whole = json.loads((root / "bundle.json").read_text())
    places = list(numbers(whole))
    assert len(places) > 150
    taken = []
    for where in places:
        (root / "bundle.json").write_text(json.dumps(changed(whole, where, value)))
        try:
            Bundle.open(root)
            taken.append((where, "taken"))
        except BundleError as error:
            taken += [(where, str(error))] if "\n" in str(error) else []
    assert taken == []


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../outside",
        "graphs/../../outside",
        "C:/x",
        "a\\b",
        "",
        ".",
        "./a",
        "a//b",
        "a/",
        "a\0b",
        "bundle.json",
    ],
)
def test_paths_that_leave_the_bundle_are_refused(root: Path, name: str) -> None:
    (root.parent / "outside").write_bytes(b"x")
    edit(root, lambda m: m["files"].update({name: {"size": 1, "sha256": "0" * 64}}))
    refused(root, "file .* (is|holds)")


def test_replaced_while_it_is_open(root: Path) -> None:
    """By the same files, which go on being used, and by others, of which each is used or not."""
    bundle = Bundle.open(root)
    name, other = sorted(bundle.manifest.files)[:2]
    manifest = root / "bundle.json"
    content = manifest.read_bytes()
    manifest.unlink()
    manifest.write_bytes(content)
    assert bundle.path(name) == root.resolve() / name

    def replaced(document: dict[str, Any]) -> None:
        document["files"][name]["sha256"] = "0" * 64

    edit(root, replaced)
    assert bundle.path(other) == root.resolve() / other
    with pytest.raises(BundleError, match=rf"{name} in .* was replaced since .*Open the bundle again"):
        bundle.path(name)
    with pytest.raises(BundleError, match="was replaced"):
        bundle.with_graphs(()).path(name)
    assert bundle.path(other) == root.resolve() / other
    manifest.unlink()
    with pytest.raises(BundleError, match=r"bundle\.json"):
        bundle.path(name)


def test_links(root: Path) -> None:
    weights = root / "graphs" / "dit.data"
    outside = root.parent / "outside"
    weights.rename(outside)
    weights.symlink_to(outside)
    refused(root, "link that leaves the bundle")
    weights.unlink()
    outside.rename(root / "real")
    weights.symlink_to(Path("..") / "real")  # a link inside the bundle is no harm
    assert Bundle.open(root).path("graphs/dit.data").read_bytes() == b"weights"
    weights.unlink()
    weights.symlink_to(weights)
    refused(root, "cannot be opened")


def test_a_linked_folder_that_leaves_the_bundle(root: Path) -> None:
    (root / "graphs").rename(root.parent / "elsewhere")
    (root / "graphs").symlink_to(root.parent / "elsewhere")
    refused(root, "link that leaves the bundle")


def test_the_bundle_itself_may_be_a_link(root: Path) -> None:
    link = root.parent / "link"
    link.symlink_to(root)
    assert Bundle.open(link, verify=True).manifest.precision == "fp32"


def test_truncated_and_changed_files(root: Path) -> None:
    path = root / "graphs" / "dit.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    refused(root, r"graphs/dit.onnx.*has 8 bytes; bundle.json lists 9.*truncated")
    path.write_bytes(stand_in("dot"))
    Bundle.open(root)
    refused(root, r"graphs/dit.onnx.*sha256", verify=True)


def test_swapped_files_of_one_size(root: Path) -> None:
    a, b = root / "graphs" / "dit.data", root / "graphs" / "talker.data"
    b.write_bytes(b"WEIGHTS")
    write_manifest(root, make_manifest())
    Bundle.open(root, verify=True)
    held = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(held)
    refused(root, "sha256", verify=True)


def test_manifests_that_are_no_json(root: Path) -> None:
    path = root / "bundle.json"
    good = path.read_bytes()
    for text in (b"", b"{", good[: len(good) // 2], b"\xff\xfe", b"[]", b"null", b"[" * 200_000, good + b"x"):
        path.write_bytes(text)
        refused(root, r"bundle\.json")
    for number in (b"NaN", b"Infinity", b"1e999", b"1" * 400):
        path.write_bytes(good.replace(b'"size":7', b'"size":' + number, 1))
        refused(root, r"bundle\.json")


def test_repeated_keys_are_refused(root: Path) -> None:
    path = root / "bundle.json"
    path.write_bytes(path.read_bytes()[:-1] + b',"precision":"fp16"}')
    refused(root, "precision occurs twice")


def test_many_repeated_keys_take_no_time_and_few_words(root: Path) -> None:
    record = b'{"size":7,"sha256":"' + b"0" * 64 + b'"}'
    keys = b",".join(b'"k%d":%s' % (i, record) for i in range(60_000))
    path = root / "bundle.json"
    head, _, tail = path.read_bytes().partition(b'"files":{')
    path.write_bytes(head + b'"files":{' + keys + b"," + keys + b"," + tail)
    refused(root, "key k0, k1, k10 and 59997 more occurs twice")


def test_huge_manifest_is_refused_unread(root: Path) -> None:
    with (root / "bundle.json").open("r+b") as file:
        file.truncate(1 << 34)
    refused(root, "17179869184 bytes")


def test_no_bundle_at_all(tmp_path: Path) -> None:
    refused(tmp_path, "cannot read .*bundle.json.*omniport export")
    refused(tmp_path / "nowhere", "cannot read")
    (tmp_path / "bundle.json").mkdir()
    refused(tmp_path, "cannot read|directory")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_manifest(root: Path) -> None:
    (root / "bundle.json").chmod(0)
    refused(root, "Permission")


class Harm:
    """Would run code when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harm-was-done"),))


def embedding_bytes(table: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, table, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        embedding_bytes(np.zeros((VOCABULARY, WIDTH - 1), np.uint16)),
        embedding_bytes(np.zeros((VOCABULARY, WIDTH), np.float32)),
        embedding_bytes(np.asfortranarray(np.zeros((VOCABULARY, WIDTH), np.uint16))),
        embedding_bytes(np.zeros((), np.uint16)),
        embedding_bytes(np.array([Harm()], object), allow_pickle=True),
        embedding_bytes(np.zeros((VOCABULARY, WIDTH), np.uint16))[:200],
        b"\x93NUMPY\x01\x00\xff\xff{",
        b"PK\x05\x06" + b"\0" * 18,
        b"",
    ],
    ids=["width", "dtype", "order", "scalar", "pickle", "truncated", "header", "empty zip", "empty"],
)
def test_malformed_embedding_tables(root: Path, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    (root / "thinker_embedding.npy").write_bytes(data)
    write_manifest(root, make_manifest())
    bundle = Bundle.open(root, verify=True)
    with pytest.raises(BundleError, match="embedding table"):
        bundle.embedding("thinker")
    assert not (root.parent / "harm-was-done").exists()


def npy(shape: str, header: str = "") -> bytes:
    """A .npy file of 4 kB with any shape, or any header, written into it."""
    text = (header or f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}").encode()
    text += b" " * (-(11 + len(text)) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text + bytes(4096)


STRANGE = {
    "deep unary": npy("-" * 9000 + "1"),
    "unclosed": npy("", header="{'descr': ("),
    "giant": npy(f"({'9' * 400}, 64)"),
    "negative": npy("(-1, 64)"),
    "bool": npy("(True, 64)"),
    "mixed keys": npy("", header="{1: 2, 'descr': 3}"),
    "a terabyte": npy("(300000000000,)"),
    "no npy": b"hello",
}


@pytest.mark.parametrize("data", STRANGE.values(), ids=STRANGE)
def test_arrays_that_make_numpy_raise_anything(root: Path, data: bytes) -> None:
    (root / "thinker_embedding.npy").write_bytes(data)
    manifest = make_manifest()
    write_manifest(root, manifest)
    with pytest.raises(BundleError, match="embedding table"):
        Bundle.open(root, verify=True).embedding("thinker")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("speaker.npy", data)
        archive.writestr("reference.npy", data)
    (root / manifest.voices[0].file).write_bytes(buffer.getvalue())
    write_manifest(root, manifest)
    with pytest.raises(BundleError, match=r"voice 'Ethan'"):
        Bundle.open(root).voice("Ethan")


def voice_bytes(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def zip_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("speaker.npy", bytes(64 << 20))
    return buffer.getvalue()


VECTOR = np.ones(6, np.float32)


@pytest.mark.parametrize(
    "data",
    [
        voice_bytes(speaker=VECTOR),
        voice_bytes(speaker=VECTOR, reference=np.ones(4, np.float32)),
        voice_bytes(speaker=VECTOR, reference=np.ones(5)),
        voice_bytes(speaker=VECTOR, reference=np.full(5, np.nan, np.float32)),
        voice_bytes(speaker=VECTOR, reference=np.array([Harm()] * 5, object)),
        zip_bomb(),
        b"not a zip",
        b"",
    ],
    ids=["missing", "width", "dtype", "nan", "pickle", "bomb", "text", "empty"],
)
def test_malformed_voices(root: Path, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    (root / "voices" / "Chelsie.npz").write_bytes(data)
    write_manifest(root, make_manifest())
    with pytest.raises(BundleError, match="voice"):
        Bundle.open(root).voice("Chelsie")
    assert not (root.parent / "harm-was-done").exists()


def test_unlisted_files_are_not_handed_out(root: Path) -> None:
    (root / "extra").write_text("x")
    with pytest.raises(BundleError, match="does not list"):
        Bundle.open(root).path("extra")


def test_manifest_survives_a_round_trip(root: Path) -> None:
    manifest = Bundle.open(root).manifest
    write_manifest(root, manifest)
    assert Bundle.open(root, verify=True).manifest == manifest
    assert json.loads((root / "bundle.json").read_text())["schema_version"] == 3
