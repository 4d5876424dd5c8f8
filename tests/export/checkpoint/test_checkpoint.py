"""Checkpoints: opening, reading by byte range, both generations of names, and every kind of unusable input."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
import safetensors
import torch
from huggingface_hub import errors as hub_errors
from omniport.export.checkpoint import frontends
from omniport.export.checkpoint.checkpoint import Checkpoint
from omniport.export.checkpoint.config import normalise_config
from omniport.export.checkpoint.safetensors import MAX_HEADER, SafetensorsFile
from omniport.export.checkpoint.tokenizer_json import load_tokenizer, tokenizer_from_vocab, tokenizer_json
from omniport.runtime.bundle.manifest import ChatSpec, CodecTokens, TextTokens
from omniport.runtime.errors import CheckpointError, ExportError
from safetensors.torch import load_file, save_file

TEXTS = [
    "What do you see in this picture? It's two red circles -- 12345 of them!",
    "今天的天气很好\uff0c我们一起去公园散步。",
    "Straße, cafe\u0301, naïve; el río baja.\r\n\n  indented\ttab   ",
    "오늘은 바람이 불고 \U0001f600\U0001f469\u200d\U0001f680 Сегодня مرحبا नमस्ते",
    "<|im_start|>user\n<|audio_bos|><|AUDIO|><|audio_eos|>hm<tool_call><|im_end|>\n",
]


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A writable copy of the tiny checkpoint's text files with two small shards."""
    out = tmp_path / "model"
    out.mkdir()
    for pattern in ("*.json", "*.txt", "*.jinja"):
        for file in tiny_checkpoint.glob(pattern):
            shutil.copy(file, out)
    first = {"thinker.model.norm.weight": torch.randn(6, 4).bfloat16(), "thinker.lm_head.weight": torch.randn(3, 2)}
    second = {"talker.codec_head.weight": torch.randn(5).half(), "thinker.flag": torch.tensor(7)}
    save_file(first, out / "model-00001-of-00002.safetensors")
    save_file(second, out / "model-00002-of-00002.safetensors")
    weight_map = dict.fromkeys(first, "model-00001-of-00002.safetensors")
    weight_map |= dict.fromkeys(second, "model-00002-of-00002.safetensors")
    write_json(out / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return out


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def remove_weights(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    write_json(path, value)


# --- reading -----------------------------------------------------------------------------------------------------


def test_every_tensor_equals_the_reference_reader(tiny_checkpoint: Path) -> None:
    ckpt = Checkpoint.open(tiny_checkpoint)
    stored: dict[str, torch.Tensor] = {}
    for shard in tiny_checkpoint.glob("*.safetensors"):
        stored |= load_file(shard)
    assert ckpt.keys() == sorted(stored)
    assert len(stored) > 500
    for key, tensor in stored.items():
        array = ckpt.read(key)
        assert ckpt.shape(key) == tuple(tensor.shape)
        assert ckpt.dtype(key) == str(tensor.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(array.astype(np.float32), tensor.float().numpy())
    assert "bfloat16" in {ckpt.dtype(key) for key in ckpt.keys()}  # noqa: SIM118


def test_rows_are_read_alone(folder: Path) -> None:
    ckpt = Checkpoint.open(folder)
    key = "thinker.model.norm.weight"
    whole = ckpt.read(key)
    assert whole.dtype == ml_dtypes.bfloat16
    assert np.abs(whole.astype(np.float32)).max() > 0.1
    for start, stop in ((0, 6), (2, 5), (5, 6), (3, 3)):
        part = ckpt.read(key, start, stop)
        np.testing.assert_array_equal(part, whole[start:stop])
    np.testing.assert_array_equal(ckpt.read(key, 4), whole[4:])
    assert ckpt.read("thinker.flag").shape == ()
    assert ckpt.read("thinker.flag") == 7
    for start, stop in ((-1, 2), (4, 3), (0, 7)):
        with pytest.raises(ValueError, match="outside"):
            ckpt.read(key, start, stop)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from Linux's /proc")
def test_resident_memory_does_not_grow(tmp_path: Path) -> None:
    def resident() -> int:
        match = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert match is not None
        return int(match[1]) * 1024

    path, rows = tmp_path / "big.safetensors", 1 << 16
    header = json.dumps({"w": {"dtype": "F32", "shape": [rows, 1024], "data_offsets": [0, rows * 4096]}}).encode()
    with path.open("wb") as file:  # sparse: 256 MiB that take no disk
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + rows * 4096)
    tensor = SafetensorsFile.open(path)
    tensor.read("w", 0, 2048)
    before, peak = resident(), 0
    for start in range(0, rows, 2048):
        block = tensor.read("w", start, start + 2048)
        peak = max(peak, resident() - before)
        assert not block.any()
    assert peak < 48 << 20


def test_all_dtypes_round_trip(tmp_path: Path) -> None:
    wide = ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]
    names = [*wide, "float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"]
    values = torch.tensor([0.0, 1.0, 3.0, 7.0, 96.0, 1.5])
    tensors = {name: values.to(getattr(torch, name)).reshape(2, 3) for name in names}
    save_file(tensors, tmp_path / "all.safetensors")
    file = SafetensorsFile.open(tmp_path / "all.safetensors")
    assert set(file.entries) == set(names)
    for name, tensor in tensors.items():
        array = file.read(name)
        assert array.dtype.name == name
        np.testing.assert_array_equal(array.astype(np.float64), tensor.double().numpy())


def test_file_that_shrinks_after_opening(folder: Path) -> None:
    ckpt = Checkpoint.open(folder)
    shard = folder / "model-00001-of-00002.safetensors"
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 60)
    with pytest.raises(CheckpointError, match=r"ended .* bytes early"):
        [ckpt.read(key) for key in ("thinker.model.norm.weight", "thinker.lm_head.weight")]


def test_fingerprint(folder: Path, tmp_path: Path) -> None:
    first = Checkpoint.open(folder).fingerprint
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert re.fullmatch(r"[0-9a-f]{64}", first)
    assert Checkpoint.open(copy).fingerprint == first
    # Same header, same size, other values: another fine-tune.
    shard = copy / "model-00001-of-00002.safetensors"
    save_file({key: tensor + 1 for key, tensor in load_file(shard).items()}, shard)
    assert Checkpoint.open(copy).fingerprint != first
    edit_json(folder / "config.json", lambda config: config.update(note="x"))
    assert Checkpoint.open(folder).fingerprint != first


# --- names -------------------------------------------------------------------------------------------------------


def test_names_of_transformers_5_in_a_single_file(folder: Path) -> None:
    remove_weights(folder)
    names = {
        "thinker.model.language_model.layers.0.mlp.up_proj.weight": "thinker.model.layers.0.mlp.up_proj.weight",
        "thinker.model.audio_tower.conv1.weight": "thinker.audio_tower.conv1.weight",
        "thinker.model.visual.blocks.0.norm1.weight": "thinker.visual.blocks.0.norm1.weight",
        "thinker.lm_head.weight": "thinker.lm_head.weight",
        "talker.model.norm.weight": "talker.model.norm.weight",
    }
    save_file({name: torch.full((2,), float(i)) for i, name in enumerate(names)}, folder / "model.safetensors")
    ckpt = Checkpoint.open(folder)
    assert ckpt.keys() == sorted(names.values())
    for i, name in enumerate(names.values()):
        assert ckpt.read(name).tolist() == [i, i]
    assert not ckpt.tied_embeddings


def test_saved_by_transformers(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from transformers import Qwen2_5OmniForConditionalGeneration

    model = Qwen2_5OmniForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    shutil.copy(tiny_checkpoint / "config.json", tmp_path)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    again, ckpt = Checkpoint.open(tmp_path), Checkpoint.open(tiny_checkpoint)
    computed = [key for key in ckpt.keys() if key.endswith("inv_freq")]  # noqa: SIM118 - not a mapping
    assert again.keys() == [key for key in ckpt.keys() if key not in computed]  # noqa: SIM118
    moved = [key for key in again.keys() if key.startswith("thinker.visual.")]  # noqa: SIM118
    assert moved
    for key in moved:
        np.testing.assert_array_equal(again.read(key).astype(np.float32), ckpt.read(key).astype(np.float32))


def test_unused_leaves_out_what_is_computed(folder: Path) -> None:
    remove_weights(folder)
    computed = [
        "thinker.audio_tower.audio_bos_eos_token.weight",
        "thinker.audio_tower.positional_embedding.positional_embedding",
        "thinker.visual.rotary_pos_emb.inv_freq",
        "thinker.model.rotary_emb.inv_freq",
        "token2wav.code2wav_dit_model.rotary_embed.inv_freq",
        "token2wav.code2wav_bigvgan_model.activation_post.upsample.filter",
    ]
    needed = ["thinker.model.norm.weight", "talker.model.norm.weight", "token2wav.extra"]
    save_file({name: torch.ones(2) for name in computed + needed}, folder / "model.safetensors")
    ckpt = Checkpoint.open(folder)
    assert ckpt.unused(set()) == sorted(needed)
    assert ckpt.unused({"talker.model.norm.weight"}) == ["thinker.model.norm.weight", "token2wav.extra"]
    edit_json(folder / "config.json", lambda config: config.update(enable_audio_output=False))
    silent = Checkpoint.open(folder)
    assert not silent.has_speech
    assert silent.unused(set()) == ["thinker.model.norm.weight"]


def test_expect_names_key_and_shapes(folder: Path) -> None:
    ckpt = Checkpoint.open(folder)
    ckpt.expect("thinker.model.norm.weight", (6, 4))
    with pytest.raises(CheckpointError, match=r"'thinker.model.norm.weight'.*\[6, 4\], expected \[4, 6\]"):
        ckpt.expect("thinker.model.norm.weight", [4, 6])
    with pytest.raises(CheckpointError, match=r"'thinker\.gone' is missing"):
        ckpt.expect("thinker.gone", (1,))
    with pytest.raises(CheckpointError, match=r"'thinker\.flag'.*int64"):
        ckpt.expect("thinker.flag", ())


# --- configuration -----------------------------------------------------------------------------------------------


def old_config() -> dict[str, Any]:
    rope = {"mrope_section": [4, 6, 6], "rope_type": "default", "type": "default"}
    return {
        "model_type": "qwen2_5_omni",
        "thinker_config": {
            "text_config": {"hidden_size": 64, "num_attention_heads": 2, "rope_theta": 5e5, "rope_scaling": rope}
        },
        "talker_config": {
            "head_dim": 32,
            "rope_theta": 7e5,
            "rope_scaling": {"mrope_section": [6, 5, 5], "type": "mrope"},
        },
        "token2wav_config": {"dit_config": {"dim": 96, "depth": 3, "heads": 5, "head_dim": 16, "rope_theta": 5e3}},
    }


def new_config() -> dict[str, Any]:
    rope = {"rope_theta": 5e5, "mrope_section": [4, 6, 6], "rope_type": "default"}
    talker = {"rope_theta": 7e5, "mrope_section": [6, 5, 5], "rope_type": "default"}
    dit = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 5, "head_dim": 16}
    return {
        "model_type": "qwen2_5_omni",
        "thinker_config": {"text_config": {"hidden_size": 64, "num_attention_heads": 2, "rope_parameters": rope}},
        "talker_config": {"head_dim": 32, "rope_parameters": talker},
        "token2wav_config": {"dit_config": {**dit, "rope_parameters": {"rope_theta": 5e3, "rope_type": "default"}}},
    }


def outer_config() -> dict[str, Any]:
    """The thinker's rotary settings one level up."""
    config = old_config()
    text = config["thinker_config"]["text_config"]
    config["thinker_config"] |= {name: text.pop(name) for name in ("rope_theta", "rope_scaling")}
    return config


@pytest.mark.parametrize("make", [old_config, new_config, outer_config])
def test_both_generations_of_config_keys(folder: Path, make: Callable[[], dict[str, Any]]) -> None:
    write_json(folder / "config.json", make())
    config = Checkpoint.open(folder).config
    dit = config.token2wav_config.dit_config
    assert (dit.hidden_size, dit.num_hidden_layers, dit.num_attention_heads, dit.head_dim) == (96, 3, 5, 16)
    assert dit.rope_parameters["rope_theta"] == 5e3
    text, talker = config.thinker_config.text_config.rope_parameters, config.talker_config.rope_parameters
    assert (text["rope_theta"], text["mrope_section"], text["rope_type"]) == (5e5, [4, 6, 6], "default")
    assert (talker["rope_theta"], talker["mrope_section"], talker["rope_type"]) == (7e5, [6, 5, 5], "default")


def test_normalising_keeps_the_input_and_is_idempotent() -> None:
    raw = old_config()
    once = normalise_config(raw)
    assert raw == old_config()
    assert normalise_config(once) == once


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(model_type="qwen2_5_vl"), "'qwen2_5_vl'.*supports 'qwen2_5_omni'"),
        (lambda c: c.pop("model_type"), "model_type None"),
        (lambda c: c.update(thinker_config=None), "no thinker_config"),
        (lambda c: c.update(thinker_config={"text_config": 3}), "text_config is a int"),
        (
            lambda c: c.update(quantization_config={"quant_method": "fp8"}),
            "by 'fp8'; omniport reads gptq and awq",
        ),
        (lambda c: c["token2wav_config"]["dit_config"].update(dim=64, hidden_size=65), "dim=64 and hidden_size=65"),
        (lambda c: c["talker_config"].update(rope_scaling={"type": "yarn"}), "'yarn' is not supported"),
        (lambda c: c["talker_config"].update(rope_scaling={"mrope_section": [1, 1, 1]}), "adds up to 3, expected 16"),
        (lambda c: c["thinker_config"]["text_config"].update(hidden_size="wide"), "not a usable"),
    ],
)
def test_bad_config(folder: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    edit_json(folder / "config.json", change)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(folder)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "not JSON"), (b"[]", "holds a JSON list"), (b"\xff\xfe", "not JSON"), (b"[" * 200_000, "not JSON")],
    ids=["cut", "list", "binary", "deep"],
)
def test_config_that_is_not_an_object(folder: Path, content: bytes, message: str) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder)


# --- weight files ------------------------------------------------------------------------------------------------


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match="no folder"):
        Checkpoint.open(tmp_path / "gone")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is a file"):
        Checkpoint.open(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (None, "holds no weights"),
        ("pytorch_model-00001-of-00002.bin", "pickled weights only"),
        ("adapter_model.safetensors", "LoRA adapter"),
        ("model-00001-of-00002.safetensors", "neither model.safetensors.index.json nor model.safetensors"),
    ],
)
def test_no_usable_weights(folder: Path, file: str | None, message: str) -> None:
    remove_weights(folder)
    if file is not None:
        (folder / file).write_bytes(b"")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "model-00009.safetensors"}}, r"names 1 shard.*model-00009\.safetensors"),
        ({"weight_map": {"a": "../model.safetensors"}}, "same folder"),
        ({"weight_map": {"a": 3}}, "same folder"),
        ({"weight_map": {}}, "no weight_map"),
        ({}, "no weight_map"),
    ],
)
def test_bad_index(folder: Path, index: dict[str, Any], message: str) -> None:
    write_json(folder / "model.safetensors.index.json", index)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder)


def test_index_that_names_a_tensor_its_shards_lack(folder: Path) -> None:
    def add(index: dict[str, Any]) -> None:
        index["weight_map"]["thinker.gone"] = "model-00001-of-00002.safetensors"

    edit_json(folder / "model.safetensors.index.json", add)
    with pytest.raises(CheckpointError, match=r"thinker\.gone"):
        Checkpoint.open(folder)


def test_one_name_twice(folder: Path) -> None:
    remove_weights(folder)
    names = ("thinker.model.norm.weight", "thinker.model.language_model.norm.weight")
    save_file({name: torch.ones(2) for name in names}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="two tensors are named"):
        Checkpoint.open(folder)


def test_truncated_shard(folder: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is truncated.*Download"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("thinker.model.layers.0.self_attn.q_proj.lora_A.default.weight", r"LoRA adapter.*merge_and_unload"),
        ("thinker.model.layers.0.self_attn.q_proj.base_layer.weight", r"LoRA adapter.*merge_and_unload"),
        ("base_model.model.thinker.lm_head.weight", r"'base_model\.model\.', which a trainer's wrapper"),
        ("module.thinker.lm_head.weight", r"'module\.', which a trainer's wrapper"),
        ("thinker.module.lm_head.weight", r"'module\.', which a trainer's wrapper"),
        ("thinker.norm.weight", "incomplete"),
    ],
)
def test_a_weight_that_is_missing_says_what_the_others_tell(folder: Path, name: str, hint: str) -> None:
    remove_weights(folder)
    save_file({name: torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"'thinker\.lm_head\.weight' is missing .*{hint}"):
        Checkpoint.open(folder).read("thinker.lm_head.weight")


def blob(header: bytes, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(**fields: object) -> bytes:
    return json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | fields}).encode()


OVERLAP = {"a": {"dtype": "U8", "shape": [5], "data_offsets": [0, 5]}}
HOSTILE = {
    "empty": (b"", "fewer than the 8"),
    "short prefix": (b"\1\0\0", "fewer than the 8"),
    "header past the end": (blob(entry(), b"", 10_000), "truncated"),
    "huge header": (blob(entry(), length=MAX_HEADER + 1), "more than"),
    "not an object": (blob(b"[1]", b""), "does not start"),
    "not json": (blob(b"{nope}"), "not JSON"),
    "not utf-8": (blob(b'{"\xff": 1}'), "not JSON"),
    "entry is a list": (blob(b'{"w": []}'), "exactly dtype"),
    "missing field": (blob(b'{"w": {"dtype": "F32", "shape": [2]}}'), "exactly dtype"),
    "unknown dtype": (blob(entry(dtype="F33")), "has dtype 'F33'"),
    "dtype is a list": (blob(entry(dtype=["F32"])), "has dtype"),
    "negative shape": (blob(entry(shape=[-2])), "has shape"),
    "shape of floats": (blob(entry(shape=[2.0])), "has shape"),
    "huge shape": (blob(entry(shape=[2**40, 2**40])), "spans 8 bytes"),
    "offsets of one": (blob(entry(data_offsets=[0])), "data_offsets"),
    "backwards": (blob(entry(data_offsets=[8, 0])), "spans -8 bytes"),
    "wrong size": (blob(entry(shape=[3])), "spans 8 bytes"),
    "past the end": (blob(entry(), b"\0" * 7), "truncated"),
    "trailing bytes": (blob(entry(), b"\0" * 9), "1 bytes follow"),
    "gap": (blob(entry(data_offsets=[4, 12]), b"\0" * 12), "leaves a gap"),
    "overlap": (
        blob(json.dumps(OVERLAP | {"b": {"dtype": "U8", "shape": [5], "data_offsets": [3, 8]}}).encode()),
        "overlaps",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_here_and_by_the_reference(tmp_path: Path, name: str) -> None:
    content, message = HOSTILE[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile.open(path)
    with pytest.raises((safetensors.SafetensorError, OSError)), safetensors.safe_open(path, "np"):
        pass


def test_name_given_twice_in_a_header(tmp_path: Path) -> None:
    info = b'{"dtype": "U8", "shape": [4], "data_offsets": [%d, %d]}'
    header = b'{"w": ' + info % (0, 4) + b', "w": ' + info % (4, 8) + b"}"
    (tmp_path / "x.safetensors").write_bytes(blob(header))
    with pytest.raises(CheckpointError, match="'w' given twice"):
        SafetensorsFile.open(tmp_path / "x.safetensors")


# --- ids ---------------------------------------------------------------------------------------------------------


def hub_error(kind: type[hub_errors.HfHubHTTPError]) -> Exception:
    return kind("no", response=httpx.Response(404, request=httpx.Request("GET", "https://hub.invalid")))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error(hub_errors.GatedRepoError), "gated.*hf auth login"),
        (hub_error(hub_errors.RepositoryNotFoundError), "no model 'org/name'.*spelling"),
        (hub_errors.LocalEntryNotFoundError("offline\nmore"), r"LocalEntryNotFoundError: offline\).*network"),
        (httpx.ConnectError("refused"), "ConnectError: refused"),
        (OSError(28, "No space left on device"), "No space left.*free disk space"),
    ],
)
def test_hugging_face_failures(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open("org/name")


def test_hugging_face_download(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    calls: list[tuple[str, list[str]]] = []

    def download(repo: str, *, allow_patterns: list[str]) -> str:
        calls.append((repo, allow_patterns))
        return str(folder)

    lines: list[str] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert Checkpoint.open("org/name", progress=lines.append).name == "org/name"
    assert calls[0][0] == "org/name"
    assert "*.safetensors" in calls[0][1]
    assert "spk_dict.pt" in calls[0][1]
    assert not any(pattern.endswith(("bin", "py")) for pattern in calls[0][1])
    assert lines[0] == "fetching org/name from Hugging Face"


def test_modelscope(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ExportError, match="pip install modelscope"):
        Checkpoint.open("modelscope:org/name")
    calls: list[str] = []

    def download(repo: str, **_: object) -> str:
        calls.append(repo)
        if repo == "org/gone":
            raise RuntimeError("not found")
        return str(folder)

    monkeypatch.setitem(sys.modules, "modelscope", SimpleNamespace(snapshot_download=download))
    assert Checkpoint.open("modelscope:org/name").name == "modelscope:org/name"
    assert calls == ["org/name"]
    with pytest.raises(CheckpointError, match=r"org/gone from ModelScope .*not found"):
        Checkpoint.open("modelscope:org/gone")


def test_a_folder_wins_over_an_id(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.chdir(folder.parent.parent)
    assert Checkpoint.open(f"{folder.parent.name}/{folder.name}").path.name == folder.name


# --- front ends --------------------------------------------------------------------------------------------------


def test_audio_frontend(folder: Path) -> None:
    ckpt = Checkpoint.open(folder)
    audio = frontends.audio_frontend(ckpt)
    assert (audio.sampling_rate, audio.n_fft, audio.hop_length, audio.n_mels) == (16000, 400, 160, 128)
    assert (audio.chunk_frames, audio.chunk_tokens, audio.max_seconds) == (200, 50, 300.0)
    edit_json(folder / "preprocessor_config.json", lambda c: c.update(feature_size=80))
    with pytest.raises(CheckpointError, match=r"feature_size.* is 80 and .*num_mel_bins is 128"):
        frontends.audio_frontend(ckpt)


def test_vision_frontend(folder: Path) -> None:
    ckpt = Checkpoint.open(folder)
    vision = frontends.vision_frontend(ckpt)
    assert (vision.min_pixels, vision.max_pixels) == (3136, 12845056)
    assert (vision.patch_size, vision.merge_size, vision.temporal_patch_size, vision.window_size) == (14, 2, 2, 112)
    assert vision.image_mean == (0.48145466, 0.4578275, 0.40821073)
    flat = json.loads((folder / "preprocessor_config.json").read_text())
    size = {"shortest_edge": flat.pop("min_pixels"), "longest_edge": flat.pop("max_pixels")}
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no preprocessor_config\.json"):
        frontends.vision_frontend(ckpt)
    # transformers 5 saves one file with a section for each processor.
    write_json(folder / "processor_config.json", {"image_processor": {**flat, "size": size}, "feature_extractor": flat})
    assert frontends.vision_frontend(ckpt) == vision
    assert frontends.audio_frontend(ckpt).max_seconds == 300.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(patch_size=16), "patch_size is 16 and .* is 14"),
        (lambda c: c.update(merge_size=4), "merge_size is 4 and .* is 2"),
        (lambda c: c.pop("image_std"), "lacks usable"),
        (lambda c: c.update(image_std=[1, 0, 1]), "three positive deviations"),
        (lambda c: c.update(max_pixels=10), "0 < min <= max"),
        (lambda c: c.pop("min_pixels"), "lacks usable"),
    ],
)
def test_bad_vision_settings(folder: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    edit_json(folder / "preprocessor_config.json", change)
    with pytest.raises(CheckpointError, match=message):
        frontends.vision_frontend(Checkpoint.open(folder))


def test_special_tokens_come_from_their_strings(folder: Path) -> None:
    ckpt = Checkpoint.open(folder)
    tokens = frontends.special_tokens(ckpt)
    stored = json.loads((folder / "added_tokens.json").read_text())
    for field, text in frontends.TOKEN_STRINGS.items():
        assert getattr(tokens, field) == stored[text]
    assert tokens.audio != 151646  # the tiny checkpoint keeps them elsewhere


@pytest.mark.parametrize("name", ["audio_token_index", "image_token_index", "video_token_index", "audio_end_token_id"])
def test_config_that_states_another_token_id(folder: Path, name: str) -> None:
    edit_json(folder / "config.json", lambda c: c["thinker_config"].update({name: 5}))
    with pytest.raises(CheckpointError, match=rf"thinker_config\.{name} is 5"):
        frontends.special_tokens(Checkpoint.open(folder))


def test_tokenizer_without_a_control_token(folder: Path) -> None:
    def rename(document: dict[str, Any]) -> None:
        next(t for t in document["added_tokens"] if t["content"] == "<|AUDIO|>")["content"] = "<|SOUND|>"

    def rename_there(config: dict[str, Any]) -> None:
        rename({"added_tokens": config["added_tokens_decoder"].values()})
        config["additional_special_tokens"].remove("<|AUDIO|>")
        for name in ("audio_token", "extra_special_tokens"):
            config.pop(name, None)

    edit_json(folder / "tokenizer.json", rename)
    edit_json(folder / "tokenizer_config.json", rename_there)
    with pytest.raises(CheckpointError, match=r"no token '<\|AUDIO\|>'"):
        frontends.special_tokens(Checkpoint.open(folder))


def test_chat_spec(folder: Path) -> None:
    ckpt = Checkpoint.open(folder)
    tokens = frontends.special_tokens(ckpt)
    stop = (tokens.im_end, tokens.endoftext)
    assert frontends.chat_spec(ckpt) == ChatSpec(system_prompt=frontends.SPEECH_PROMPT, stop=stop)
    assert frontends.SPEECH_PROMPT.endswith("as well as generating text and speech.")
    edit_json(folder / "generation_config.json", lambda c: c.update(eos_token_id=[tokens.im_end, 9]))
    assert frontends.chat_spec(ckpt).stop == (*stop, 9)
    edit_json(folder / "generation_config.json", lambda c: c.update(eos_token_id=10**6))
    with pytest.raises(CheckpointError, match="eos_token_id has id 1000000"):
        frontends.chat_spec(ckpt)
    edit_json(folder / "generation_config.json", lambda c: c.pop("eos_token_id"))
    assert frontends.chat_spec(ckpt).stop == stop
    (folder / "chat_template.jinja").write_text("[INST] {{ messages }} [/INST]")
    with pytest.raises(CheckpointError, match="ChatML"):
        frontends.chat_spec(ckpt)


def test_speech_tokens_and_sampling(folder: Path) -> None:
    ckpt = Checkpoint.open(folder)
    talker = ckpt.config.talker_config
    codec = CodecTokens(pad=8292, bos=8293, eos=8294, mask=8296, stop=(8292, 8294), suppress=(8293,))
    assert frontends.codec_tokens(ckpt) == codec
    text = frontends.text_tokens(ckpt)
    assert text == TextTokens(
        bos=talker.tts_text_start_token_id, eos=talker.tts_text_end_token_id, pad=talker.tts_text_pad_token_id
    )
    thinker, speech = frontends.sampling_defaults(ckpt)
    assert (thinker.temperature, thinker.max_new_tokens, thinker.repetition_penalty) == (0.0, 1024, 1.0)
    assert (speech.top_k, speech.top_p, speech.temperature) == (40, 0.8, 0.9)
    assert (speech.repetition_penalty, speech.max_new_tokens) == (1.05, 4096)
    edit_json(folder / "config.json", lambda c: c["talker_config"].update(tts_text_pad_token_id=10**6))
    with pytest.raises(CheckpointError, match="tts text pad has id 1000000"):
        frontends.text_tokens(Checkpoint.open(folder))
    edit_json(folder / "config.json", lambda c: c["talker_config"].update(tts_codec_end_token_id=-1))
    with pytest.raises(CheckpointError, match="tts codec eos has id -1"):
        frontends.codec_tokens(Checkpoint.open(folder))


# --- tokenizer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["tokenizer_config.json", "added_tokens.json"])
def test_built_tokenizer_equals_the_stored_one(folder: Path, source: str) -> None:
    ckpt = Checkpoint.open(folder)
    assert tokenizer_json(ckpt) == (folder / "tokenizer.json").read_bytes()
    stored = load_tokenizer(ckpt)
    (folder / "tokenizer.json").unlink()
    if source == "added_tokens.json":
        edit_json(folder / "tokenizer_config.json", lambda c: c.pop("added_tokens_decoder"))
    built = load_tokenizer(Checkpoint.open(folder))
    assert built.get_vocab() == stored.get_vocab()
    for text in TEXTS:
        ids = stored.encode(text).ids
        assert len(ids) > 5
        assert built.encode(text).ids == ids
        assert built.decode(ids, skip_special_tokens=False) == stored.decode(ids, skip_special_tokens=False)
    assert stored.encode("cafe\u0301").ids == stored.encode("caf\u00e9").ids


def test_tokenizer_equals_transformers(folder: Path) -> None:
    from transformers import AutoTokenizer

    (folder / "tokenizer.json").unlink()
    reference = AutoTokenizer.from_pretrained(folder)
    built = load_tokenizer(Checkpoint.open(folder))
    for text in TEXTS:
        assert built.encode(text).ids == reference(text)["input_ids"]


def test_tokenizer_from_vocab_refuses_ids_it_cannot_keep() -> None:
    vocab = {"a": 0, "b": 1, "ab": 2}
    assert json.loads(tokenizer_from_vocab(vocab, [("a", "b")], {3: "<|x|>"}))["added_tokens"][0]["id"] == 3
    with pytest.raises(CheckpointError, match=r"'<\|x\|>' would get id 3, expected 5"):
        tokenizer_from_vocab(vocab, [("a", "b")], {5: "<|x|>"})
    with pytest.raises(CheckpointError, match="do not make a BPE tokenizer"):
        tokenizer_from_vocab(vocab, [("b", "a")], {})


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{", "cannot be loaded as a tokenizer"),
        ("tokenizer.json", '{"model": 3}', "cannot be loaded as a tokenizer"),
        ("merges.txt", "#version: 0.2\na b c\n", "line 2: 'a b c'"),
        ("vocab.json", "[1]", "JSON list"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"7": {}}}', "added_tokens_decoder"),
    ],
)
def test_bad_tokenizer_files(folder: Path, file: str, content: str, message: str) -> None:
    if file != "tokenizer.json":
        (folder / "tokenizer.json").unlink()
    (folder / file).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        tokenizer_json(Checkpoint.open(folder))


def test_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        tokenizer_json(Checkpoint.open(folder))


# --- what fine-tunes leave behind --------------------------------------------------------------------------------


def test_one_whole_file_wins_over_an_index_as_in_transformers(folder: Path) -> None:
    """A fine-tune saved over a copy of its sharded base."""
    tuned = {"thinker.lm_head.weight": torch.full((3, 2), 7.0)}
    save_file(tuned, folder / "model.safetensors")
    ckpt = Checkpoint.open(folder)
    assert ckpt.keys() == ["thinker.lm_head.weight"]
    assert (ckpt.read("thinker.lm_head.weight", 0, 3) == 7.0).all()


@pytest.mark.parametrize("thinker_only", [False, True])
@pytest.mark.parametrize("name", ["tuned.safetensors", "tuned.safetensors.index.json"])
def test_the_weights_that_config_json_names_win_as_in_transformers(folder: Path, name: str, thinker_only: bool) -> None:
    tuned = {"thinker.lm_head.weight": torch.full((3, 2), 7.0)}
    save_file(tuned, folder / "tuned.safetensors")
    write_json(folder / "tuned.safetensors.index.json", {"weight_map": dict.fromkeys(tuned, "tuned.safetensors")})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if thinker_only:
        config = config["thinker_config"] | {"model_type": "qwen2_5_omni_thinker"}
    write_json(folder / "config.json", config | {"transformers_weights": name})
    ckpt = Checkpoint.open(folder)
    assert ckpt.keys() == ["thinker.lm_head.weight"]
    assert ckpt.config.transformers_weights == name  # by which validation's reference chooses


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "x.bin", "", 3, ["x"]])
def test_config_json_names_weights_that_cannot_be(folder: Path, name: object) -> None:
    edit_json(folder / "config.json", lambda config: config.update(transformers_weights=name))
    with pytest.raises(CheckpointError, match=r"as transformers_weights; expected"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["gone.safetensors", "gone.safetensors.index.json", "a\0.safetensors"])
def test_config_json_names_weights_that_are_not_there(folder: Path, name: str) -> None:
    edit_json(folder / "config.json", lambda config: config.update(transformers_weights=name))
    with pytest.raises(CheckpointError, match="cannot read"):
        Checkpoint.open(folder)


def test_a_folder_of_that_name_is_no_file_of_weights(folder: Path) -> None:
    (folder / "model.safetensors").mkdir()
    assert "talker.codec_head.weight" in Checkpoint.open(folder)


def test_a_pointer_of_git_lfs(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "consolidated.safetensors"])
def test_weights_under_another_name(folder: Path, name: str) -> None:
    remove_weights(folder)
    save_file({"thinker.lm_head.weight": torch.zeros(3, 2)}, folder / name)
    with pytest.raises(CheckpointError, match="transformers_weights"):
        Checkpoint.open(folder)


def test_a_byte_order_mark_is_no_part_of_a_file(folder: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    assert load_tokenizer(Checkpoint.open(folder)).encode("hello").ids


def test_truncation_and_padding_of_a_trainer_are_left_out(folder: Path) -> None:
    plain = load_tokenizer(Checkpoint.open(folder)).encode(TEXTS[0] * 4).ids

    def leave(document: dict[str, Any]) -> None:
        document["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        document["padding"] = {
            "strategy": {"Fixed": 999},
            "direction": "Left",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<|endoftext|>",
        }

        document["model"]["dropout"] = 1.0

    edit_json(folder / "tokenizer.json", leave)
    written = json.loads(tokenizer_json(Checkpoint.open(folder)))
    assert written["truncation"] is None
    assert written["padding"] is None
    assert not written["model"]["dropout"]
    assert load_tokenizer(Checkpoint.open(folder)).encode(TEXTS[0] * 4).ids == plain


@pytest.mark.parametrize("name", ["e" * 300, "a\0b"])
def test_a_shard_whose_name_no_file_can_have(tiny_checkpoint: Path, tmp_path: Path, name: str) -> None:
    shutil.copy(tiny_checkpoint / "config.json", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.weight": name}}))
    with pytest.raises(CheckpointError, match=r"names 1 shard\(s\) that are not in"):
        Checkpoint.open(tmp_path)
