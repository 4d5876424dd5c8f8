"""Exports that fail: what the message says, and that nothing is left behind. And checkpoints of unusual make."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from omniport.export import exporter
from omniport.export.checkpoint.checkpoint import Checkpoint
from omniport.export.exporter import export_checkpoint
from omniport.export.models.model_parts import graph_definitions
from omniport.runtime import Done, OmniSession, SamplingConfig
from omniport.runtime.bundle import staging
from omniport.runtime.bundle.parts import PARTS
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import CheckpointError, ExportError, UsageError
from omniport.runtime.speech.ode import rk4_schedule
from support.checkpoints import rewritten
from tokenizers import Tokenizer

CONTEXT = 4096


def fails(checkpoint: Path, out: Path, error: type[Exception], **options: Any) -> str:
    """Export, expect the error, and find no trace of the attempt."""
    before = sorted(out.parent.rglob("*")) if out.parent.exists() else None
    with pytest.raises(error) as caught:
        export_checkpoint(checkpoint, out, **options)
    assert (sorted(out.parent.rglob("*")) if out.parent.exists() else None) == before
    return str(caught.value)


# --- weights -------------------------------------------------------------------------------------------------

DIT = "token2wav.code2wav_dit_model."
VOCODER = "token2wav.code2wav_bigvgan_model."


@pytest.mark.parametrize(
    "key",
    [
        "thinker.model.layers.1.mlp.up_proj.weight",
        "thinker.model.embed_tokens.weight",
        "thinker.audio_tower.conv1.bias",
        "thinker.visual.merger.mlp.0.weight",
        "talker.codec_head.weight",
        "talker.model.embed_tokens.weight",
        f"{DIT}text_embed.codec_embed.weight",
        f"{DIT}time_embed.time_mlp.2.bias",
        f"{DIT}input_embed.spk_encoder.fc.weight",
        f"{VOCODER}resblocks.4.activations.5.act.beta",
    ],
)
@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_missing_or_wrong_shaped_weight_is_named(tiny_checkpoint: Path, tmp_path: Path, key: str, fault: str) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        value = tensors.pop(key)
        if fault == "shape":
            tensors[key] = torch.cat((value, value[:1]))

    started = time.process_time()
    message = fails(
        rewritten(tiny_checkpoint, tmp_path / "checkpoint", edit), tmp_path / "new" / "bundle", CheckpointError
    )
    assert repr(key) in message
    assert ("is missing from checkpoint" if fault == "missing" else "do not belong together") in message
    assert time.process_time() - started < 10, "found before anything is traced"


@pytest.mark.parametrize("prefix", ["module.", "base_model.model."])
def test_names_of_a_trainers_wrapper_are_recognised(tiny_checkpoint: Path, tmp_path: Path, prefix: str) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[prefix + key] = tensors.pop(key)

    message = fails(rewritten(tiny_checkpoint, tmp_path / "checkpoint", edit), tmp_path / "bundle", CheckpointError)
    assert f"names begin with {prefix!r}" in message


def test_an_unmerged_adapter_is_recognised(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        module = "thinker.model.layers.0.self_attn.q_proj"
        tensors[f"{module}.base_layer.weight"] = tensors.pop(f"{module}.weight")
        tensors[f"{module}.lora_A.default.weight"] = torch.zeros(4, 4)

    message = fails(rewritten(tiny_checkpoint, tmp_path / "checkpoint", edit), tmp_path / "bundle", CheckpointError)
    assert "merge_and_unload()" in message


def test_transposed_weight_is_wrong_shaped(tiny_checkpoint: Path, tmp_path: Path) -> None:
    key = "thinker.model.layers.0.mlp.gate_proj.weight"

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key] = tensors[key].T

    message = fails(rewritten(tiny_checkpoint, tmp_path / "checkpoint", edit), tmp_path / "bundle", CheckpointError)
    assert f"weight {key!r} of checkpoint has shape [128, 320], expected [320, 128] from config.json" in message


def test_extra_weights_are_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for i in range(7):
            tensors[f"thinker.model.layers.{i}.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 128)

    message = fails(rewritten(tiny_checkpoint, tmp_path / "checkpoint", edit), tmp_path / "bundle", CheckpointError)
    assert "thinker.model.layers.0.self_attn.q_proj.lora_A.weight" in message
    assert "and 2 more" in message
    assert "Merge adapters into the base weights" in message


def test_quantized_weight_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    key = "thinker.model.layers.0.mlp.gate_proj.weight"

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key] = tensors[key].to(torch.int8)

    message = fails(rewritten(tiny_checkpoint, tmp_path / "checkpoint", edit), tmp_path / "bundle", CheckpointError)
    assert f"{key!r} of checkpoint is int8, expected float32, float16 or bfloat16" in message


@pytest.mark.parametrize("key", ["thinker.model.embed_tokens.weight", "thinker.model.norm.weight"])
def test_tables_and_small_weights_are_looked_at_too(tiny_checkpoint: Path, tmp_path: Path, key: str) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key].view(-1)[3] = float("nan")

    checkpoint = rewritten(tiny_checkpoint, tmp_path / "checkpoint", edit)
    message = fails(checkpoint, tmp_path / "bundle", CheckpointError, graphs=["thinker"])
    assert f"{key!r} holds values that are not finite" in message


@pytest.mark.parametrize(("value", "precision"), [(float("nan"), "fp32"), (float("-inf"), "fp32"), (1e5, "fp16")])
def test_weight_that_is_not_finite_is_named(
    tiny_checkpoint: Path, tmp_path: Path, value: float, precision: str
) -> None:
    key = "thinker.audio_tower.layers.1.fc2.weight"

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key][3, 5] = value

    checkpoint = rewritten(tiny_checkpoint, tmp_path / "checkpoint", edit)
    options = {"graphs": ["audio_encoder"], "precision": precision}
    message = fails(checkpoint, tmp_path / "new" / "bundle", CheckpointError, **options)
    assert repr(key) in message
    assert "not finite" in message
    assert "--precision fp32" in message
    if precision == "fp16":  # what the message advises
        export_checkpoint(checkpoint, tmp_path / "bundle", graphs=["audio_encoder"], precision="fp32")


def test_missing_voices_are_found_before_tracing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = rewritten(tiny_checkpoint, tmp_path / "checkpoint")
    (checkpoint / "spk_dict.pt").unlink()
    started = time.process_time()
    assert "spk_dict.pt" in fails(checkpoint, tmp_path / "bundle", CheckpointError)
    assert time.process_time() - started < 10


# --- checkpoints of other make -------------------------------------------------------------------------------


def initializer(bundle: Path, graph: str, name: str) -> np.ndarray[Any, Any]:
    model = onnx.load(bundle / "graphs" / f"{graph}.onnx")
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    return np.asarray(onnx.numpy_helper.to_array(tensor))


def test_tied_embeddings_in_single_precision(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """No head is stored: it is the embedding table. And float32 shards come through without a rounding."""
    kept: dict[str, torch.Tensor] = {}

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["thinker.lm_head.weight"]
        for key in [key for key in tensors if key.startswith("thinker.model.")]:
            tensors[key] = tensors[key].float() * 1.0001
            kept[key] = tensors[key]

    def tie(config: dict[str, Any]) -> None:
        config["thinker_config"]["tie_word_embeddings"] = True
        config["thinker_config"]["text_config"]["tie_word_embeddings"] = True

    out = tmp_path / "bundle"
    export_checkpoint(rewritten(tiny_checkpoint, tmp_path / "tied", edit, tie), out, graphs=["thinker"])
    table = kept["thinker.model.embed_tokens.weight"]
    np.testing.assert_array_equal(initializer(out, "thinker", "lm_head.weight"), table.numpy().T)
    name = "model.layers.2.self_attn.o_proj.weight"
    np.testing.assert_array_equal(initializer(out, "thinker", name), kept[f"thinker.{name}"].numpy().T)
    bundle = Bundle.open(out, verify=True)
    np.testing.assert_array_equal(bundle.embedding("thinker").rows([0, 5, 1023]), table[[0, 5, 1023]].numpy())
    assert bundle.manifest.thinker.embedding_dtype == "float32"


def test_both_generations_of_config_make_the_same_graphs(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def modernise(config: dict[str, Any]) -> None:
        parts = (config["thinker_config"]["text_config"], config["talker_config"])
        dit = config["token2wav_config"]["dit_config"]
        for part in (*parts, dit):
            rope = part.pop("rope_scaling", None) or {"rope_type": "default"}
            part["rope_parameters"] = rope | {"rope_theta": part.pop("rope_theta")}
        for old in ("dim", "depth", "heads"):
            del dit[old]

    def age(config: dict[str, Any]) -> None:
        dit = config["token2wav_config"]["dit_config"]
        for new in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            del dit[new]

    def tensors(folder: Path) -> Mapping[str, Any]:
        ckpt = Checkpoint.open(folder)
        found = {}
        for name, definition in graph_definitions(ckpt.config, "fp32", 4096, rk4_schedule(), False).items():
            module = definition.module()
            shapes = {key: tuple(value.shape) for key, value in (*module.named_parameters(), *module.named_buffers())}
            found[name] = (definition.inputs, definition.outputs, definition.geometry, shapes)
        return found

    wanted = tensors(tiny_checkpoint)
    assert "10000.0" in wanted["thinker"][2], "the rotary base is part of what is compared"
    assert tensors(rewritten(tiny_checkpoint, tmp_path / "new", config=modernise)) == wanted
    assert tensors(rewritten(tiny_checkpoint, tmp_path / "old", config=age)) == wanted


@pytest.mark.parametrize("stored", [True, False], ids=["weights kept", "weights dropped"])
def test_checkpoint_without_speech_replies_in_text(tiny_checkpoint: Path, tmp_path: Path, stored: bool) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(("talker.", "token2wav.")) and not stored]:
            del tensors[key]

    def silence(config: dict[str, Any]) -> None:
        config["enable_audio_output"] = False
        config["enable_talker"] = False

    checkpoint = rewritten(tiny_checkpoint, tmp_path / "silent", edit, silence)
    if not stored:
        (checkpoint / "spk_dict.pt").unlink()
    with pytest.raises(ExportError, match=r"has no bigvgan, talker: it was saved without speech"):
        export_checkpoint(checkpoint, tmp_path / "bundle", graphs=["bigvgan", "talker"])
    report = export_checkpoint(checkpoint, tmp_path / "bundle", max_context=CONTEXT)
    assert [graph.name for graph in report.graphs] == [name for name, part in PARTS.items() if not part.speaks]
    with OmniSession.open(tmp_path / "bundle", verify=True) as session:
        assert session.manifest.talker is None
        assert not session.manifest.voices
        question = [{"role": "user", "content": "Hello"}]
        *_, done = session.reply(question, speak=False, thinker=SamplingConfig(max_new_tokens=6))
        assert isinstance(done, Done)
        assert len(done.token_ids) == 6 or done.token_ids[-1] in session.manifest.chat.stop
        with pytest.raises(UsageError, match=r"does not speak|speak=False|without speech"):
            session.reply(question, speak=True)


def test_tokenizer_is_built_from_vocab_and_merges(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = rewritten(tiny_checkpoint, tmp_path / "checkpoint")
    wanted = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    (checkpoint / "tokenizer.json").unlink()
    export_checkpoint(checkpoint, tmp_path / "bundle", graphs=["audio_encoder"])
    built = Tokenizer.from_file(str(tmp_path / "bundle" / "tokenizer.json"))
    text = "Grüße, 你好!  it's 2026\n\n<|im_start|>user\n🎵"
    ids = wanted.encode(text).ids
    assert len(ids) > 20
    assert built.encode(text).ids == ids


# --- options and places --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int3"}, r"no precision 'int3'; known: fp32, fp16, bf16"),
        ({"graphs": ["thinkr"]}, r"no graph named thinkr; known: audio_encoder, "),
        ({"max_context": 10}, r"--max-context 10: expected 64 to 32768"),
        ({"max_context": 40000}, r"--max-context 40000: expected 64 to 32768"),
        ({"max_pixels": 100}, r"--max-pixels 100: expected a finite number of 784 or more"),
        ({"fps": float("nan")}, r"--fps nan: expected a finite number"),
        ({"max_frames": 1}, r"--max-frames 1: expected a finite number of 2 or more"),
    ],
)
def test_wrong_options(tiny_checkpoint: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    assert re.search(message, fails(tiny_checkpoint, tmp_path / "new" / "bundle", ExportError, **options))


def test_folder_that_is_no_bundle_is_not_replaced(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"dear")
    assert "holds no bundle" in fails(tiny_checkpoint, tmp_path / "photos", ExportError)
    (tmp_path / "photos" / "bundle.json").write_text("{}")
    assert "cannot read" in fails(tiny_checkpoint, tmp_path / "photos", ExportError)
    (tmp_path / "file").write_text("x")
    assert "holds no bundle" in fails(tiny_checkpoint, tmp_path / "file", ExportError)
    assert "cannot write" in fails(tiny_checkpoint, tmp_path / "file" / "bundle", ExportError)


def test_empty_folder_is_filled(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    export_checkpoint(tiny_checkpoint, tmp_path / "empty", graphs=["audio_encoder"])
    Bundle.open(tmp_path / "empty", verify=True)


# --- interrupted ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure", [ExportError("told so"), RuntimeError("a bug"), KeyboardInterrupt(), SystemExit(143), MemoryError()]
)
@pytest.mark.parametrize("old", [True, False], ids=["old bundle", "no bundle"])
def test_failure_inside_leaves_nothing(
    tiny_checkpoint: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    old: bool,
) -> None:
    out = tmp_path / "deep" / "down" / "bundle"
    if old:
        shutil.copytree(tiny_bundle, out)
        (out / "graphs" / "bigvgan.onnx").write_bytes(b"damaged")
    before = contents(tmp_path)

    def write(*_: object) -> None:
        assert list(out.parent.glob(".bundle.partial-*/new/graphs"))
        raise failure

    monkeypatch.setattr(exporter, "write_model", write)
    with pytest.raises(type(failure)):
        export_checkpoint(tiny_checkpoint, out, max_context=CONTEXT)
    assert contents(tmp_path) == before
    assert (tmp_path / "deep").exists() == old


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start_export(checkpoint: Path, out: Path) -> subprocess.Popen[str]:
    """``omniport export`` in a process of its own, returned when its first graph is written."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from omniport.cli.main import run; run()", "export", str(checkpoint), str(out), "-q"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMNIPORT_CACHE": ""},  # traced afresh, there is time to interrupt it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell may have switched it off
    )
    deadline = time.monotonic() + 120
    while not list(out.parent.glob(f".{out.name}.partial-*/new/graphs/audio_encoder.onnx")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the first graph takes too long"
        time.sleep(0.02)
    return process


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "old"), [(signal.SIGTERM, 143, True), (signal.SIGINT, 130, False)], ids=["TERM", "INT"]
)
def test_interrupted_export_leaves_nothing(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, number: signal.Signals, code: int, old: bool
) -> None:
    out = tmp_path / "folder" / "bundle"
    if old:
        shutil.copytree(tiny_bundle, out)
        (out / "graphs" / "audio_encoder.onnx").write_bytes(b"damaged")  # so that there is something to do
        (out / "graphs" / "bigvgan.onnx").write_bytes(b"damaged")
    before = contents(tmp_path)
    process = start_export(tiny_checkpoint, out)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in output
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["folder"] if old else [])


@pytest.mark.slow
def test_killed_export_is_swept_by_the_next(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    process = start_export(tiny_checkpoint, out)
    # While its owner lives, another export leaves the folder alone.
    other = export_checkpoint(tiny_checkpoint, out, graphs=["audio_encoder"])
    assert len(other.graphs) == 1
    (partial,) = tmp_path.glob(".bundle.partial-*")
    process.kill()
    process.communicate(timeout=60)
    assert contents(partial)
    export_checkpoint(tiny_checkpoint, out, graphs=["audio_encoder"])
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_killed_between_the_renames_brings_the_old_bundle_back(tmp_path: Path) -> None:
    room = tmp_path / ".bundle.partial-abc"
    (room / "old").mkdir(parents=True)
    (room / "old" / "bundle.json").write_text("the only copy")

    def fail() -> None:
        with staging.staging(tmp_path / "bundle"):
            assert (tmp_path / "bundle" / "bundle.json").read_text() == "the only copy"
            raise RuntimeError("and this one fails too")

    with pytest.raises(RuntimeError):
        fail()
    assert contents(tmp_path) == {"bundle/bundle.json": b"the only copy"}
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("how", ["one step", "two renames"])
def test_failing_rename_brings_the_old_bundle_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "bundle.json").write_text("old")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(errno.EIO, "bad disk")
        return rename(self, target)

    def exchange(fresh: Path, target: Path) -> bool:
        if how == "one step":
            raise OSError(errno.EIO, "bad disk")
        return False

    monkeypatch.setattr(Path, "rename", refuse)
    monkeypatch.setattr(staging, "exchange", exchange)
    with pytest.raises(ExportError, match="cannot write"), staging.staging(tmp_path / "bundle") as folder:
        (folder / "bundle.json").write_text("new")
    assert contents(tmp_path) == {"bundle/bundle.json": b"old"}


def test_locked_folders_of_others_stay(tmp_path: Path) -> None:
    for name in (".bundle.partial-live", ".bundle.partial-dead", ".bundle2.partial-dead", ".other.partial-dead"):
        (tmp_path / name).mkdir()
    descriptor = os.open(tmp_path / ".bundle.partial-live", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with staging.staging(tmp_path / "bundle"):
            pass
    finally:
        os.close(descriptor)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"bundle", ".bundle.partial-live", ".bundle2.partial-dead", ".other.partial-dead"}


# --- full disk -----------------------------------------------------------------------------------------------

EXPORT = """
import os, resource, shutil, sys, types
from omniport.cli.main import run
folder, checkpoint, limit, pretend = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
if int(pretend):  # the check beforehand sees enough space: the disk fills up during the export
    shutil.disk_usage = lambda path: types.SimpleNamespace(free=1 << 50)
try:
    run(["export", checkpoint, folder + "/new/bundle", "-q"])
finally:
    print("LEFT:", os.listdir(folder), flush=True)
"""


def full_disk_message(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == "LEFT: []\n"
    assert result.stderr.startswith("error: ")
    return result.stderr


@pytest.mark.parametrize("limit", [10_000, 1_000_000], ids=["graph", "weights"])
def test_file_size_limit_is_a_full_disk(tiny_checkpoint: Path, tmp_path: Path, limit: int) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] in (resource.RLIM_INFINITY, *range(limit, 1 << 60, 1 << 59))
    command = [sys.executable, "-c", EXPORT, str(tmp_path), str(tiny_checkpoint), str(limit), "0"]
    message = full_disk_message(subprocess.run(command, capture_output=True, text=True, timeout=300))
    assert "the disk is full: File too large" in message
    assert "Nothing was left behind. Free some space or choose another folder" in message


def can_mount(folder: Path) -> str:
    """Why no small disk can be mounted here; empty if it can."""
    if shutil.which("unshare") is None:
        return "there is no unshare program"
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stderr.strip() if result.returncode else ""


@pytest.mark.parametrize("pretend", [True, False], ids=["while writing", "beforehand"])
def test_small_disk(tiny_checkpoint: Path, tmp_path: Path, pretend: bool) -> None:
    """A real file system of 3 MB, in a mount namespace of its own."""
    if reason := can_mount(tmp_path):
        pytest.skip(f"no file system can be mounted here: {reason}")
    script = 'mount -t tmpfs -o size=3m tmpfs "$1" && exec "$2" -c "$3" "$1" "$4" 0 "$5"'
    arguments = [str(tmp_path), sys.executable, EXPORT, str(tiny_checkpoint), str(int(pretend))]
    command = ["unshare", "-rm", "sh", "-c", script, "sh", *arguments]
    message = full_disk_message(subprocess.run(command, capture_output=True, text=True, timeout=300))
    if pretend:
        assert "the disk is full: No space left on device" in message
    else:
        assert re.search(r"has 3 MB free and the bundle needs 2\d MB", message)


def test_space_is_checked_beforehand(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=1_000_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    message = fails(tiny_checkpoint, tmp_path / "new" / "bundle", ExportError)
    assert asked == [tmp_path]
    assert re.search(r"has 1 MB free and the bundle needs 2\d MB. Free some space or choose another folder", message)


def test_full_cache_leaves_nothing_and_is_no_failure(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMNIPORT_CACHE", str(tmp_path / "cache"))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    export_checkpoint(tiny_checkpoint, tmp_path / "bundle", graphs=["audio_encoder"])
    assert list((tmp_path / "cache" / "graphs").iterdir()) == []
