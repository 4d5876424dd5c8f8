"""Synthetic checkpoints: layout, determinism, errors, and (transformers being the judge) healthy activations."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omniport.export.checkpoint.control_tokens import CONTROL_TOKENS
from omniport.export.synthetic import make_checkpoint as synthetic
from omniport.export.synthetic import random_weights as synthetic_weights
from omniport.export.synthetic.geometries import checkpoint_config
from omniport.export.synthetic.make_checkpoint import SIZES, hub_key, make_checkpoint
from omniport.export.synthetic.random_weights import Plan, Scaling, tensor_blocks, write_shards
from omniport.export.synthetic.tokenizer_files import train_tokenizer
from omniport.runtime.errors import ExportError, UsageError
from transformers import AutoTokenizer, PreTrainedModel, Qwen2_5OmniForConditionalGeneration, WhisperFeatureExtractor

CODEBOOK = 8193
PROMPTS = ("What do you see in this picture?", "Tell me about boats and trains.", "你好", "1 2 3 4 5")


@pytest.fixture(scope="module", autouse=True)
def quiet_transformers() -> Iterator[None]:
    """transformers warns that thinker ids lie outside the talker's vocabulary, as they do in the real config."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Any:
    return Qwen2_5OmniForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def outlier_model(tiny_outlier_checkpoint: Path) -> Any:
    return Qwen2_5OmniForConditionalGeneration.from_pretrained(tiny_outlier_checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_checkpoint)


def prompt_ids(tokenizer: Any, text: str) -> torch.Tensor:
    messages = [{"role": "system", "content": "You speak."}, {"role": "user", "content": text}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return torch.tensor([tokenizer.encode(chat)])


def relative_change(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).pow(2).mean().sqrt() / b.pow(2).mean().sqrt()).item()


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


# --- layout --------------------------------------------------------------------------------------------------


def test_has_every_file_of_a_hub_checkpoint(tiny_checkpoint: Path) -> None:
    names = {p.name for p in tiny_checkpoint.iterdir()}
    shards = {n for n in names if n.endswith(".safetensors")}
    assert len(shards) >= 3
    assert names - shards == {
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors.index.json",
        "preprocessor_config.json",
        "special_tokens_map.json",
        "spk_dict.pt",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    }


def test_keys_have_the_hub_names(tiny_checkpoint: Path, model: Any) -> None:
    from safetensors import safe_open

    index = json.loads((tiny_checkpoint / "model.safetensors.index.json").read_text())
    weight_map = index["weight_map"]
    for key in (
        "thinker.model.embed_tokens.weight",
        "thinker.model.layers.0.self_attn.q_proj.bias",
        "thinker.lm_head.weight",
        "thinker.audio_tower.layers.1.self_attn.out_proj.bias",
        "thinker.audio_tower.audio_bos_eos_token.weight",
        "thinker.visual.blocks.3.attn.q.weight",
        "thinker.visual.merger.mlp.2.bias",
        "talker.thinker_to_talker_proj.weight",
        "talker.model.layers.0.mlp.down_proj.weight",
        "talker.codec_head.weight",
        "token2wav.code2wav_dit_model.transformer_blocks.0.attn.to_out.0.weight",
        "token2wav.code2wav_dit_model.input_embed.spk_encoder.asp.tdnn.conv.weight",
        "token2wav.code2wav_bigvgan_model.ups.5.0.weight",
        "token2wav.code2wav_bigvgan_model.resblocks.17.activations.5.act.alpha",
    ):
        assert key in weight_map
    assert not any("language_model" in key for key in weight_map)
    seen: dict[str, str] = {}
    elements = stored = 0
    for shard in sorted(set(weight_map.values())):
        with safe_open(tiny_checkpoint / shard, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                tensor = file.get_tensor(key)
                assert tensor.dtype == (torch.float32 if key.startswith("token2wav.") else torch.bfloat16)
                assert torch.isfinite(tensor).all()
                assert tensor.float().abs().max() > 0
                seen[key] = shard
                elements += tensor.numel()
                stored += tensor.nbytes
    assert seen == weight_map
    key = "token2wav.code2wav_dit_model.rotary_embed.inv_freq"
    with safe_open(tiny_checkpoint / seen[key], framework="pt") as file:
        assert torch.allclose(file.get_tensor(key), model.token2wav.code2wav_dit_model.rotary_embed.inv_freq, rtol=1e-6)
    assert index["metadata"]["total_size"] == stored
    assert 5_000_000 < elements < 10_000_000


@pytest.mark.parametrize(
    ("ours", "hub"),
    [
        ("thinker.model.language_model.layers.0.mlp.up_proj.weight", "thinker.model.layers.0.mlp.up_proj.weight"),
        ("thinker.model.visual.patch_embed.proj.weight", "thinker.visual.patch_embed.proj.weight"),
        ("thinker.model.audio_tower.conv1.bias", "thinker.audio_tower.conv1.bias"),
        ("talker.model.norm.weight", "talker.model.norm.weight"),
    ],
)
def test_hub_key(ours: str, hub: str) -> None:
    assert hub_key(ours) == hub


def test_transformers_finds_nothing_missing_or_unexpected(tiny_checkpoint: Path) -> None:
    load = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]
    _, info = load(Qwen2_5OmniForConditionalGeneration, tiny_checkpoint, output_loading_info=True)
    assert {key: list(value) for key, value in info.items() if value} == {}


def test_geometry_exercises_every_structural_feature(model: Any) -> None:
    config = model.config
    text, talker = config.thinker_config.text_config, config.talker_config
    assert text.num_key_value_heads < text.num_attention_heads
    assert talker.num_key_value_heads < talker.num_attention_heads
    assert talker.embedding_size == text.hidden_size != talker.hidden_size
    assert talker.num_attention_heads * talker.head_dim != talker.hidden_size
    for part, head_dim in ((text, text.hidden_size // text.num_attention_heads), (talker, talker.head_dim)):
        assert 2 * sum(part.rope_parameters["mrope_section"]) == head_dim
    dit = config.token2wav_config.dit_config
    assert list(dit.look_ahead_layers) == [2]
    assert list(dit.look_backward_layers) == [0, 3]


def test_no_control_token_sits_at_its_real_id(model: Any, tokenizer: Any) -> None:
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in CONTROL_TOKENS}
    assert len(set(ids.values())) == len(CONTROL_TOKENS)
    assert max(ids.values()) < model.config.thinker_config.text_config.vocab_size
    assert ids["<|im_start|>"] != ids["<|endoftext|>"] + 1  # offsets differ from the real ones too
    thinker = model.config.thinker_config
    assert ids["<|AUDIO|>"] == thinker.audio_token_id == model.config.talker_config.audio_token_id
    assert ids["<|IMAGE|>"] == thinker.image_token_id
    assert ids["<|VIDEO|>"] == thinker.video_token_id
    assert model.thinker.generation_config.eos_token_id == ids["<|im_end|>"]
    assert tokenizer.encode("user") == [thinker.user_token_id]


def test_tokenizer_round_trips_and_loads_without_tokenizer_json(
    tiny_checkpoint: Path, tokenizer: Any, tmp_path: Path
) -> None:
    text = "Hello there, it's 42 o'clock.\n你好 안녕 été 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    for path in tiny_checkpoint.iterdir():
        if path.suffix != ".safetensors" and path.name != "tokenizer.json":
            shutil.copy(path, tmp_path)
    rebuilt = AutoTokenizer.from_pretrained(tmp_path)
    chat = f"<|im_start|>user\n{text}<|AUDIO|><|im_end|>"
    assert rebuilt.encode(chat) == tokenizer.encode(chat)


def test_small_puts_control_tokens_at_the_real_ids() -> None:
    trained = train_tokenizer(SIZES["small"].regular_tokens, real_ids=True)
    assert len(trained.vocab) == 151643
    assert sorted(trained.vocab.values()) == list(range(151643))
    expected = {"<|endoftext|>": 151643, "<|im_end|>": 151645, "<|AUDIO|>": 151646, "<|IMAGE|>": 151655}
    assert {token: trained.controls[token] for token in expected} == expected


# --- the published sizes -------------------------------------------------------------------------------------


def published(size: str) -> dict[str, Any]:
    return checkpoint_config(SIZES[size], train_tokenizer(SIZES[size].regular_tokens, real_ids=True))


@pytest.mark.parametrize(
    ("size", "text", "talker", "parameters"),
    [
        # docs/model.md, and the sizes that the hub gives for the published checkpoints
        ("3b", (2048, 36, 16, 2, 11008, 151936), (896, 24, 14, 2, 64, 4864), 5_537_120_640),
        ("7b", (3584, 28, 28, 4, 18944, 152064), (896, 24, 12, 4, 128, 18944), 10_732_225_408),
    ],
)
def test_published_geometry(
    tmp_path: Path, size: str, text: tuple[int, ...], talker: tuple[int, ...], parameters: int
) -> None:
    config = published(size)
    names = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
    thinker, voice = config["thinker_config"], config["talker_config"]
    got = [thinker["text_config"][name] for name in (*names, "intermediate_size", "vocab_size")]
    assert tuple(got) == text
    assert tuple(voice[name] for name in (*names, "head_dim", "intermediate_size")) == talker
    assert voice["embedding_size"] == text[0]
    assert (thinker["audio_config"]["encoder_layers"], thinker["vision_config"]["depth"]) == (32, 32)
    dit = config["token2wav_config"]["dit_config"]
    assert (dit["depth"], dit["look_ahead_layers"], dit["look_backward_layers"]) == (22, [10], [0, 20])
    # the ids do not move with the 7B's larger vocabulary
    assert voice["tts_text_end_token_id"] == 151861
    assert thinker["audio_token_index"] == 151646
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = synthetic._shapes(tmp_path)
    assert sum(math.prod(shape) for key, shape in shapes.items() if not key.endswith(".inv_freq")) == parameters


def test_published_size_needs_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """22 GB are asked for before a byte of them is written."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=20 * 10**9))
    with pytest.raises(ExportError, match=r"20,000 MB free and the checkpoint needs 22,363 MB"):
        make_checkpoint(tmp_path / "out", size="7b")
    assert list(tmp_path.iterdir()) == []


def test_shards_are_written_in_bounded_memory(tmp_path: Path) -> None:
    """Two weights of 50 MB take no more than blocks of them: 4 M values each as they are drawn, and in BF16."""
    scaling = Scaling(text_rows={}, codec_rows={}, codec_std=1.0, wave_gain=1.0)
    shapes = {f"thinker.model.layers.0.mlp.{name}_proj.weight": (6144, 4096) for name in ("up", "gate")}
    tracemalloc.start()
    write_shards(tmp_path, shapes, scaling, seed=0, shard_bytes=1 << 30)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    (shard,) = tmp_path.glob("*.safetensors")
    assert shard.stat().st_size > 2 * 2 * 6144 * 4096
    assert peak < 72 << 20


def test_feature_extractor_takes_five_minutes(tiny_checkpoint: Path) -> None:
    extractor = WhisperFeatureExtractor.from_pretrained(tiny_checkpoint)
    assert (extractor.n_samples, extractor.nb_max_frames, extractor.feature_size) == (4_800_000, 30_000, 128)


def test_two_voices(tiny_checkpoint: Path, model: Any) -> None:
    voices = torch.load(tiny_checkpoint / "spk_dict.pt", weights_only=True)
    assert set(voices) == {"Chelsie", "Ethan"}
    frames = set()
    for voice in voices.values():
        assert voice["cond"].shape == (1, 192)
        assert voice["cond"].dtype == torch.float32
        assert voice["ref_mel"].shape[::2] == (1, 80)
        assert -11 < voice["ref_mel"].min() < voice["ref_mel"].max() < 1
        frames.add(voice["ref_mel"].shape[1])
        assert isinstance(voice["bos_token"], int)
        assert voice["bos_token"] < model.config.thinker_config.text_config.vocab_size
    assert len(frames) == 2
    assert voices["Chelsie"]["bos_token"] != voices["Ethan"]["bos_token"]


# --- determinism ---------------------------------------------------------------------------------------------


def test_same_seed_same_bytes_and_another_seed_differs(tiny_checkpoint: Path, tmp_path: Path) -> None:
    again = digest(make_checkpoint(tmp_path / "again", size="tiny", seed=0))
    other = digest(make_checkpoint(tmp_path / "other", size="tiny", seed=1))
    first = digest(tiny_checkpoint)
    assert again == first
    changed = {name for name in first if first[name] != other[name]}
    assert changed == {name for name in first if name.endswith((".safetensors", ".pt"))}


def test_blocks_do_not_depend_on_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(std=0.5, centre=5, rows={(3, 20): 0.1}, columns={2: 9.0}, values={5: 7.0}, ramp=(0.0, 1.0))
    whole = np.concatenate(list(tensor_blocks("key", (33, 5), plan, seed=3)))
    monkeypatch.setattr(synthetic_weights, "_BLOCK_ELEMENTS", 20)
    parts = list(tensor_blocks("key", (33, 5), plan, seed=3))
    assert len(parts) > 3
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert (whole[5] == 7.0).all()
    assert whole.std() > 0.1


# --- health of the activations, judged by transformers ---------------------------------------------------------


def sample_mel(model: Any, codes: torch.Tensor, voice: str = "Chelsie") -> torch.Tensor:
    speaker = model.speaker_map[voice]
    torch.manual_seed(7)  # the same starting noise for all
    mel: torch.Tensor = model.token2wav.code2wav_dit_model.sample(speaker["cond"], speaker["ref_mel"], codes)
    return mel


def test_mel_and_waveform_are_healthy(model: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    codes, other = (torch.randint(0, CODEBOOK, (1, 24), generator=draw) for _ in range(2))
    with torch.no_grad():
        mel = sample_mel(model, codes)
        vocoder = model.token2wav.code2wav_bigvgan_model
        wave = vocoder(mel)
        louder = vocoder(mel * 1.1)
    assert mel.shape == (1, 80, 48)
    assert -6 < mel.mean() < -4
    assert mel.std() > 0.8
    assert mel.min() > -12
    assert mel.max() < 2
    assert wave.shape == (48 * 240,)
    assert 0.02 < wave.pow(2).mean().sqrt() < 0.3
    assert wave.abs().max() < 1
    # neither constant nor dying away
    assert abs(wave.mean()) < 0.2 * wave.std()
    assert 0.5 < wave[:5760].std() / wave[5760:].std() < 2
    assert relative_change(louder, wave) > 0.01
    assert relative_change(sample_mel(model, other), mel) > 0.05
    assert relative_change(sample_mel(model, codes, "Ethan"), mel) > 0.05


def check_replies(model: Any, tokenizer: Any) -> None:
    vocab = model.config.thinker_config.text_config.vocab_size
    replies = set()
    for text in PROMPTS:
        ids = prompt_ids(tokenizer, text)
        out = model.thinker.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        reply = out.sequences[0, ids.shape[1] :].tolist()
        scores = torch.cat(out.scores)
        assert torch.isfinite(scores).all()
        assert scores.shape[1] == vocab
        assert 2 < scores[:, :500].std() < 8
        assert len(reply) > 3
        assert len(set(reply)) >= min(6, len(reply) - 1)
        # replies are text: nothing but the end token lies outside the trained vocabulary
        assert max(reply[:-1]) < len(tokenizer) - len(CONTROL_TOKENS)
        replies.add(tuple(reply))
    assert len(replies) == len(PROMPTS)


def check_speech(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[list[int]] = []

    def keep(code: torch.Tensor, **_: object) -> torch.Tensor:
        heard.append(code[0].tolist())
        return torch.zeros(1)

    monkeypatch.setattr(model.token2wav, "forward", keep)
    for sampled in (False, True):
        for text in PROMPTS[:2]:
            ids = prompt_ids(tokenizer, text)
            torch.manual_seed(0)
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                thinker_do_sample=False,
                thinker_max_new_tokens=12,
                talker_max_new_tokens=40,
                talker_do_sample=sampled,
            )
    assert len(heard) == 4
    for codes in heard:
        assert 24 <= len(codes) <= 40
        assert max(codes) < CODEBOOK
        assert len(set(codes)) >= 10
    assert len({tuple(codes) for codes in heard}) == 4


def test_replies_vary(model: Any, tokenizer: Any) -> None:
    check_replies(model, tokenizer)


def test_codes_vary_and_stay_inside_the_codebook(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check_speech(model, tokenizer, monkeypatch)


def test_encoders_match_the_scale_of_the_token_embeddings(model: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    patches = 0.3 * torch.randn(320, 1176, generator=draw) + torch.randn(320, 1, generator=draw)
    mel = 0.05 * torch.randn(128, 500, generator=draw).cumsum(1)
    with torch.no_grad():
        seen = model.thinker.model.visual(patches, grid_thw=torch.tensor([[1, 16, 20]])).pooler_output
        heard = model.thinker.model.audio_tower(mel, feature_lens=torch.tensor([500])).last_hidden_state
    for embeds in (seen, heard):
        assert 0.5 < embeds.std() < 2
        assert (embeds - embeds.mean(0)).std() > 0.2


# --- outliers ------------------------------------------------------------------------------------------------


def test_outliers_are_planted_and_the_model_still_talks(
    model: Any, outlier_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompt_ids(tokenizer, PROMPTS[0])
    for part, plain in (
        (outlier_model.thinker.model.language_model, model.thinker.model.language_model),
        (outlier_model.talker.model, model.talker.model),
    ):
        for layer, other in zip(part.layers, plain.layers, strict=True):
            bias = layer.self_attn.k_proj.bias.abs()
            assert ((bias >= 9.9) & (bias <= 101)).sum() >= 4
            assert other.self_attn.k_proj.bias.abs().max() < 1
            gain = layer.input_layernorm.weight
            assert ((gain > 19.8) & (gain < 60.5)).sum() == 3
    peak = normed_peak(outlier_model, ids)
    assert peak > 20 * normed_peak(model, ids)
    check_replies(outlier_model, tokenizer)
    check_speech(outlier_model, tokenizer, monkeypatch)


def normed_peak(model: Any, ids: torch.Tensor) -> float:
    """Largest activation behind a layer norm of the thinker."""
    peaks: list[float] = []
    hooks = [
        layer.input_layernorm.register_forward_hook(lambda _m, _i, out: peaks.append(out.abs().max().item()))
        for layer in model.thinker.model.language_model.layers
    ]
    with torch.no_grad():
        model.thinker(input_ids=ids, attention_mask=torch.ones_like(ids))
    for hook in hooks:
        hook.remove()
    return max(peaks)


# --- errors --------------------------------------------------------------------------------------------------


def test_unknown_size_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'huge'.*tiny, small"):
        make_checkpoint(tmp_path / "out", size="huge")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_never_overwrites(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    keep = out if kind == "file" else out / "precious.txt"
    keep.parent.mkdir(exist_ok=True)
    keep.write_text("mine")
    with pytest.raises(UsageError, match="not an empty folder"):
        make_checkpoint(out, size="tiny")
    assert keep.read_text() == "mine"


@pytest.mark.parametrize(
    ("failure", "expected"),
    [(OSError(errno.ENOSPC, "No space left on device"), ExportError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, expected: type[BaseException]
) -> None:
    def fail_late(key: str, done: int, total: int) -> None:
        if done > total // 2:
            raise failure

    with pytest.raises(expected):
        make_checkpoint(tmp_path / "out", size="tiny", progress=fail_late)
    assert list(tmp_path.iterdir()) == []


def test_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> Callable[..., None]:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(synthetic, "_shapes", absent)
    with pytest.raises(ExportError, match=r"torch.*omniport\[export\]"):
        make_checkpoint(tmp_path / "out", size="tiny")
    assert list(tmp_path.iterdir()) == []


def test_fills_an_empty_folder_and_reports_progress(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    steps: list[tuple[int, int]] = []
    assert make_checkpoint(out, size="tiny", progress=lambda key, done, total: steps.append((done, total))) == out
    done = [step[0] for step in steps]
    assert done == sorted(done)
    assert done[-1] == steps[-1][1]
    assert (out / "config.json").exists()
    assert [p.name for p in out.parent.iterdir()] == ["out"]
