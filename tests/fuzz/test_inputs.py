"""Mutated files, messages and arguments: refused in our words or taken, soon, in little memory; altered content never.

``tests/support/fuzzing.py`` says how to run other seeds, and one of them again.
"""

from __future__ import annotations

import copy
import io
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import typer
from omniport.cli.main import app, run
from omniport.runtime.bundle.onnx_scan import check_graph_file
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import UserError
from omniport.runtime.prompt.builder import build_prompt
from omniport.runtime.prompt.tokenizer import TextCodec
from PIL import Image
from support.bundles import make_bundle
from support.fuzzing import BYTES, Peak, note, seeds
from support.live_turns import film
from support.onnx_graphs import cache_model, plain_model, put_graphs

#: seconds that an input may take
SECONDS = 60
#: inputs of one seed
EACH = {
    "bundles": 25,
    "checkpoints": 12,
    "media": 40,
    "messages": 60,
    "arguments": 30,
    "data": 40,
    "questions": 40,
    "graphs": 15,
}

ODD: list[Any] = [
    None, True, "", "x", "\0", "a\nb", "é" * 300, "../../etc/passwd", "/dev/zero", "\ud800", -1, 0, 1, 2**31, 2**63,
    10**30, 10**400, 0.5, float("nan"), float("inf"), 1e308, [], {}, [[]], [0] * 40, {"a": {}}, [1, "x", None],
]  # fmt: skip


@contextmanager
def within_bounds() -> Iterator[None]:
    """One input: no longer than ``SECONDS``, no more memory than ``BYTES``."""

    def late(*_: object) -> None:
        raise AssertionError(f"over {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    peak = Peak()
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert peak.risen() < BYTES


def tried(kind: str, call: Callable[[], object]) -> bool:
    """Whether an input was taken; anything but a refusal of ours is the test's failure."""
    with within_bounds():
        try:
            call()
        except UserError:
            note(kind, "refused")
            return False
    note(kind, "taken")
    return True


def mutated(rng: random.Random, data: bytes) -> bytes:
    """The same with bytes flipped, cut out, doubled, or the end missing; never equal to it."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8, 60])):
        at, how = rng.randrange(len(changed) or 1), rng.randrange(6)
        near = at if rng.random() < 0.5 else min(at, rng.randrange(64))  # headers are where it hurts
        if how == 0 and changed:
            changed[near % len(changed)] ^= 1 << rng.randrange(8)
        elif how == 1 and changed:
            changed[near % len(changed)] = rng.choice([0, 255, 127, 128])
        elif how == 2:
            del changed[at:]
        elif how == 3:
            del changed[at : at + rng.randrange(1, 40)]
        elif how == 4:
            changed[at:at] = changed[at : at + rng.randrange(1, 200)]
        else:
            changed[near : near + 4] = rng.choice([b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\xff\xff\xff\xff"])
    return bytes(changed) if changed != data else bytes(changed) + b"\0"


def mutated_json(rng: random.Random, document: Any) -> Any:
    """The same with a few values changed, gone, doubled or moved."""
    changed = copy.deepcopy(document)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        holders = [holder for holder in _holders(changed) if len(holder)]
        if not holders:
            break
        holder = rng.choice(holders)
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        how, other = rng.randrange(5), rng.choice(holders)
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(holder, dict):
            holder[rng.choice(["x", "", str(key) + "s"])] = holder[key]
        elif how == 2:
            values = list(other.values()) if isinstance(other, dict) else list(other)
            holder[key] = copy.deepcopy(rng.choice(values))
        elif how == 3 and isinstance(holder[key], int):
            holder[key] = holder[key] * rng.choice([-1, 0, 2, 1000, 10**9])
        else:
            holder[key] = copy.deepcopy(rng.choice(ODD))
    return changed


def _holders(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, list)):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _holders(inner)


def _json_bytes(rng: random.Random, document: Any) -> bytes:
    text = json.dumps(mutated_json(rng, document)).encode()
    return mutated(rng, text) if rng.random() < 0.2 else text


def command(*arguments: str) -> int:
    """The exit code of `omniport` in this process."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said), pytest.raises(SystemExit) as stopped:
        run(arguments)
    assert "Traceback" not in said.getvalue(), said.getvalue()
    assert stopped.value.code in (0, 1, 2), said.getvalue()
    return int(stopped.value.code)


@pytest.mark.parametrize("number", seeds("bundles", 2))
def test_bundles(tmp_path: Path, number: int) -> None:
    rng = random.Random(number)
    whole = make_bundle(tmp_path / "whole")
    listed = sorted(p for p in whole.rglob("*") if p.is_file() and p.name != "bundle.json")
    for _ in range(EACH["bundles"]):
        root = tmp_path / "bundle"
        shutil.copytree(whole, root)
        altered = rng.random() < 0.4
        if altered:
            path = root / rng.choice(listed).relative_to(whole)
            path.write_bytes(mutated(rng, path.read_bytes()))
        else:
            path = root / "bundle.json"
            path.write_bytes(_json_bytes(rng, json.loads(path.read_text())))

        def use(root: Path = root, verify: bool = True) -> None:
            bundle = Bundle.open(root, verify=verify)
            TextCodec.from_file(bundle.path(bundle.manifest.tokenizer_file), bundle.manifest.tokens)
            for name in ("thinker", "talker") if bundle.manifest.talker else ("thinker",):
                bundle.embedding(name).rows([0])
            for voice in bundle.manifest.voices:
                bundle.voice(voice.name)

        assert not (tried("bundles", use) and altered), f"altered content of {path} was taken"
        tried("bundles", lambda use=use: use(verify=False))  # type: ignore[misc]
        with within_bounds():
            code = command("inspect", str(root), "--verify", "--quiet", "--json")
        assert code != 0 or not altered
        note("bundles", "inspected")
        shutil.rmtree(root)


@pytest.mark.parametrize("number", seeds("graphs", 1))
def test_graphs(tmp_path: Path, number: int) -> None:
    """Files of ONNX in a bundle, which --verify finds, and what stands guard when nobody asked for it."""
    rng = random.Random(number)
    whole = put_graphs(make_bundle(tmp_path / "whole"), plain_model(), cache_model())
    graphs, listed = Bundle.open(whole).manifest.graphs, sorted(whole.rglob("*.onnx"))
    for _ in range(EACH["graphs"]):
        root = tmp_path / "bundle"
        shutil.copytree(whole, root)
        path = root / rng.choice(listed).relative_to(whole)
        path.write_bytes(mutated(rng, path.read_bytes()))
        with within_bounds():
            assert command("inspect", str(root), "--verify", "--quiet") != 0
            command("inspect", str(root), "--json")
        for spec in graphs.values():
            tried("graphs", lambda spec=spec, root=root: check_graph_file(root / spec.file, spec))  # type: ignore[misc]
        shutil.rmtree(root)


@pytest.mark.parametrize("number", seeds("data", 1))
def test_data(tmp_path: Path, number: int) -> None:
    """Lines of conversations, as ``calibrate --data`` and ``validate --data`` read them."""
    from omniport.calib.calibration.dataset import read_samples

    rng = random.Random(number)
    bundle = Bundle.open(make_bundle(tmp_path / "bundle"))
    codec = TextCodec.from_file(bundle.path(bundle.manifest.tokenizer_file), bundle.manifest.tokens)
    parts = [{"type": "text", "text": "Well?"}, {"type": "audio", "audio": "missing.wav"}]
    entries = [
        {"messages": [{"role": "user", "content": "Hello"}], "reply": "Yes."},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts[:1]}]},
        {"messages": [{"role": "user", "content": parts}]},
    ]
    path = tmp_path / "data.jsonl"
    for _ in range(EACH["data"]):
        lines = [json.dumps(entry).encode() for entry in rng.sample(entries, rng.randrange(1, 4))]
        lines[-1] = _json_bytes(rng, json.loads(lines[-1]))
        data = b"\n".join(lines)
        path.write_bytes(mutated(rng, data) if rng.random() < 0.3 else data)
        tried("data", lambda: read_samples(path, bundle.manifest, codec))


@pytest.mark.parametrize("number", seeds("questions", 1))
def test_questions(tmp_path: Path, number: int) -> None:
    """Questions with answers, and the grammar beside them, as ``quant-report --questions`` reads them."""
    from omniport.export.evaluation.questions import read_questions

    rng = random.Random(number)
    bundle = Bundle.open(make_bundle(tmp_path / "bundle"))
    codec = TextCodec.from_file(bundle.path(bundle.manifest.tokenizer_file), bundle.manifest.tokens)
    parts = [{"type": "text", "text": "Well?"}, {"type": "image", "image": "missing.png", "max_pixels": 5000}]
    entries = [
        {"messages": [{"role": "user", "content": "Is it red?"}], "answer": "Yes.", "kind": "colour"},
        {"messages": [{"role": "user", "content": parts[:1]}], "answer": "two of them"},
        {"messages": [{"role": "user", "content": parts}], "answer": "No."},
    ]
    path, grammar = tmp_path / "set.jsonl", b"#JSGF V1.0;\ngrammar g;\npublic <s> = yes | no;\n"
    for _ in range(EACH["questions"]):
        lines = [json.dumps(entry).encode() for entry in rng.sample(entries, rng.randrange(1, 4))]
        if rng.random() < 0.7:
            lines[-1] = _json_bytes(rng, json.loads(lines[-1]))
        data = b"\n".join(lines)
        path.write_bytes(mutated(rng, data) if rng.random() < 0.3 else data)
        path.with_suffix(".gram").write_bytes(mutated(rng, grammar) if rng.random() < 0.5 else grammar)
        tried("questions", lambda: read_questions(path, bundle.manifest, codec))


@pytest.mark.parametrize("number", seeds("checkpoints", 1))
def test_checkpoints(tmp_path: Path, tiny_checkpoint: Path, number: int) -> None:
    from omniport.export.checkpoint import frontends
    from omniport.export.checkpoint.checkpoint import Checkpoint

    rng = random.Random(number)
    names = sorted(p.name for p in tiny_checkpoint.iterdir())
    for _ in range(EACH["checkpoints"]):
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        name = rng.choice(names)
        for other in names:
            (folder / other).symlink_to(tiny_checkpoint / other)
        data = (tiny_checkpoint / name).read_bytes()
        (folder / name).unlink()
        if name.endswith(".json"):
            data = _json_bytes(rng, json.loads(data))
        elif name.endswith(".safetensors"):
            head = 8 + int.from_bytes(data[:8], "little")
            data = mutated(rng, data[:head]) + data[head:]
        else:
            data = mutated(rng, data)
        (folder / name).write_bytes(data)

        def use(folder: Path = folder) -> None:
            checkpoint = Checkpoint.open(folder)
            frontends.audio_frontend(checkpoint)
            frontends.vision_frontend(checkpoint)
            frontends.special_tokens(checkpoint)
            frontends.chat_spec(checkpoint)

        tried("checkpoints", use)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str, bytes]]:
    """Kind, ending and content of small media files."""
    folder, rng = tmp_path_factory.mktemp("media"), np.random.default_rng(0)
    sound = (0.1 * rng.standard_normal(4000)).astype(np.float32)
    for name in ("a.wav", "a.flac", "a.ogg"):
        soundfile.write(folder / name, sound, 16000)
    picture = Image.fromarray(rng.integers(0, 255, (60, 90, 3), np.uint8))
    for name in ("a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.tiff"):
        picture.save(folder / name)
    film(folder / "a.mkv", 1.0, 1.0, fps=4)
    kinds = {"wav": "audio", "flac": "audio", "ogg": "audio", "mkv": "video"}
    return [(kinds.get(p.suffix[1:], "image"), p.suffix, p.read_bytes()) for p in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def prompt_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], object]:
    bundle = Bundle.open(make_bundle(tmp_path_factory.mktemp("bundle") / "bundle"))
    codec = TextCodec.from_file(bundle.path(bundle.manifest.tokenizer_file), bundle.manifest.tokens)
    return lambda messages: build_prompt(messages, bundle.manifest, codec)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("number", seeds("media", 2))
def test_media(
    tmp_path: Path, samples: list[tuple[str, str, bytes]], prompt_of: Callable[[Any], object], number: int
) -> None:
    rng = random.Random(number)
    for _ in range(EACH["media"]):
        kind, ending, data = rng.choice(samples)
        data = mutated(rng, data)
        source: Any = data
        if rng.random() < 0.5:
            source = tmp_path / f"input{ending}"
            source.write_bytes(data)
        part = {"type": kind, kind: source}
        tried("media", lambda part=part: prompt_of([{"role": "user", "content": [part]}]))  # type: ignore[misc]


@pytest.mark.parametrize("number", seeds("messages", 2))
def test_messages(prompt_of: Callable[[Any], object], number: int) -> None:
    rng = random.Random(number)
    parts: list[Any] = [
        {"type": "text", "text": "What is it?"},
        {"type": "image", "image": "missing.png", "max_pixels": 5000},
        {"type": "video", "video": ["a.png", "b.png"], "fps": 2.0, "use_audio": False},
        {"type": "audio", "audio": "missing.wav"},
    ]
    document = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": parts},
    ]
    for _ in range(EACH["messages"]):
        messages = mutated_json(rng, document[: rng.randrange(1, 5)] if rng.random() < 0.5 else document)
        tried("messages", lambda messages=messages: prompt_of(messages))  # type: ignore[misc]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("number", seeds("arguments", 1))
def test_arguments(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every command: odd values, paths that are missing, pipes, devices, folders, or hold a null byte."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rng = random.Random(number)
    root = make_bundle(tmp_path / "bundle")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text.json").write_text('{"a": [1, 2]}\n[]\nnull\n')
    paths = [str(tmp_path / "missing"), str(root), str(tmp_path / "pipe"), str(tmp_path / "text.json")]
    paths += ["/dev/null", "/dev/zero", str(tmp_path / "a\0b"), str(tmp_path / ("x" * 300)), str(tmp_path), ""]
    odd = [*paths, "-1", "0", "nan", "inf", "1e400", "9" * 30, "é\ud800", "a=b", ",", "--", "auto", "\n"]
    commands: Any = typer.main.get_command(app)
    soundfile.write(tmp_path / "sound.wav", np.zeros(800, np.float32), 16000)
    names = sorted(commands.commands)
    for _ in range(EACH["arguments"]):
        name = rng.choice(names)
        parameters = commands.commands[name].params
        arguments = [rng.choice(paths) for p in parameters if p.param_type_name == "argument"]
        options = [p for p in parameters if p.param_type_name == "option" and p.name not in ("sample_data", "help")]
        for option in rng.sample(options, min(len(options), rng.randrange(4))):
            arguments += [option.opts[0]] if getattr(option, "is_flag", False) else [option.opts[0], rng.choice(odd)]
        if name == "talk":  # a microphone would wait for what is said
            arguments += ["--input-wav", rng.choice([*paths, str(tmp_path / "sound.wav")])]
        with within_bounds():
            command(name, *arguments)
        note("arguments")
