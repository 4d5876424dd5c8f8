"""Voices: reading spk_dict.pt without running it, the speaker encoder, and the files that a bundle stores."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from omniport.export.checkpoint.checkpoint import Checkpoint
from omniport.export.models.ecapa import SpeakerEncoder, SpeakerSpec
from omniport.export.models.speakers import (
    SPEAKER_PREFIX,
    Speaker,
    load_speakers,
    null_reference,
    speaker_keys,
    speaker_vectors,
    spoken_mel,
    write_voice,
)
from omniport.runtime.errors import CheckpointError
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniDiTConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    ECAPA_TimeDelayNet,
    Qwen2_5OmniForConditionalGeneration,
)


def relative_rms(got: NDArray[Any], wanted: NDArray[Any]) -> float:
    energy = float(np.sqrt(np.mean(np.square(wanted, dtype=np.float64))))
    assert energy > 1e-3
    return float(np.sqrt(np.mean(np.square(got.astype(np.float64) - wanted)))) / energy


def mel(frames: int, seed: int = 0) -> torch.Tensor:
    """[1, frames, 80] that looks like a natural-log mel."""
    return torch.randn(1, frames, 80, generator=torch.Generator().manual_seed(seed)) * 2 - 5


@pytest.fixture(scope="module")
def ckpt(tiny_checkpoint: Path) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint)


# --- encoder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enc_res2net_scale": 4, "enc_kernel_sizes": [3, 5, 3, 3, 1], "enc_se_channels": 16, "enc_dim": 48},
        {"enc_channels": [32, 32, 32, 64], "enc_kernel_sizes": [5, 3, 3, 1], "enc_dilations": [1, 2, 5, 1]},
    ],
)
def test_encoder_equals_reference_on_random_weights(options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    config = Qwen2_5OmniDiTConfig(**options)
    reference = ECAPA_TimeDelayNet(config).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3)
    encoder = SpeakerEncoder(SpeakerSpec.from_config(config)).eval()
    encoder.load_state_dict(reference.state_dict(), strict=True)
    with torch.inference_mode():
        for frames in (encoder_min_frames(config), 23, 150):
            batch = torch.cat([mel(frames), mel(frames, seed=1)])
            wanted = reference(batch).numpy()
            assert relative_rms(wanted[0], wanted[1]) > 1e-2  # it does depend on the mel
            assert relative_rms(encoder(batch).numpy(), wanted) < 1e-5


def encoder_min_frames(config: Any) -> int:
    return SpeakerSpec.from_config(config).min_frames


def test_encoder_equals_reference_on_the_checkpoint(tiny_checkpoint: Path, ckpt: Checkpoint) -> None:
    model = Qwen2_5OmniForConditionalGeneration.from_pretrained(tiny_checkpoint)
    model.token2wav.float()
    reference = model.token2wav.code2wav_dit_model.input_embed.spk_encoder
    speakers = load_speakers(tiny_checkpoint / "spk_dict.pt")
    assert list(speakers) == list(model.speaker_map)
    vectors = speaker_vectors(ckpt, speakers)
    with torch.inference_mode():
        for name, stored in model.speaker_map.items():
            wanted = reference(stored["ref_mel"].float())[0].numpy()
            assert vectors[name].dtype == np.float32
            assert vectors[name].shape == (128,)
            assert relative_rms(vectors[name], wanted) < 1e-5
            zeros = reference(torch.zeros_like(stored["ref_mel"], dtype=torch.float32))[0].numpy()
            assert relative_rms(null_reference(ckpt), zeros) < 1e-5
    first, second = vectors.values()
    assert relative_rms(first, second) > 1e-2


def test_null_reference_does_not_depend_on_length(ckpt: Checkpoint) -> None:
    null = null_reference(ckpt)
    spec = SpeakerSpec.from_config(ckpt.config.token2wav_config.dit_config)
    assert spec.min_frames == 5  # reflect padding of 4 frames: kernel 3, dilation 4
    encoder = SpeakerEncoder(spec).eval()
    names = list(encoder.state_dict())
    weights = {name: torch.from_numpy(ckpt.read(SPEAKER_PREFIX + name).astype(np.float32)) for name in names}
    encoder.load_state_dict(weights)
    with torch.inference_mode():
        for frames in (5, 6, 64, 999):
            assert relative_rms(encoder(torch.zeros(1, frames, 80))[0].numpy(), null) < 1e-5
        with pytest.raises(RuntimeError, match=r"(?i)padding"):
            encoder(torch.zeros(1, 4, 80))
        assert relative_rms(encoder(mel(64))[0].numpy(), null) > 1e-2


def test_speaker_keys_are_what_the_checkpoint_stores(ckpt: Checkpoint) -> None:
    assert speaker_keys(ckpt) == {key for key in ckpt.keys() if key.startswith(SPEAKER_PREFIX)}  # noqa: SIM118
    assert len(speaker_keys(ckpt)) > 30


# --- spk_dict.pt -------------------------------------------------------------------------------------------------


def voice(**fields: Any) -> dict[str, Any]:
    return {"bos_token": 900, "cond": torch.randn(1, 192), "ref_mel": mel(40)} | fields


def save(tmp_path: Path, value: object) -> Path:
    torch.save(value, tmp_path / "spk_dict.pt")
    return tmp_path / "spk_dict.pt"


def test_load_speakers(tmp_path: Path) -> None:
    stored = voice()
    flat = voice(bos_token=torch.tensor([7]), cond=stored["cond"][0].half(), ref_mel=stored["ref_mel"][0].bfloat16())
    speakers = load_speakers(save(tmp_path, {"A": stored, "B": flat}))
    assert list(speakers) == ["A", "B"]
    assert (speakers["A"].bos_token, speakers["B"].bos_token) == (900, 7)
    for speaker in speakers.values():
        assert speaker.cond.shape == (192,)
        assert speaker.ref_mel.shape == (40, 80)
        assert speaker.cond.dtype == speaker.ref_mel.dtype == np.float32
    np.testing.assert_array_equal(speakers["A"].cond, stored["cond"][0].numpy())
    np.testing.assert_array_equal(speakers["A"].ref_mel, stored["ref_mel"][0].numpy())


class Hostile:
    """Unpickling it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickle_with_code_does_not_run(tmp_path: Path, legacy: bool) -> None:
    target = tmp_path / "created"
    path = tmp_path / "spk_dict.pt"
    torch.save({"A": voice(cond=Hostile(target))}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="refused"):
        load_speakers(path)
    assert not target.exists()
    torch.load(path, weights_only=False)  # the trap does work where code may run
    assert target.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\x80\x02}", b"hello"])
def test_corrupt_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "spk_dict.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"spk_dict\.pt"):
        load_speakers(tmp_path / "spk_dict.pt")


def test_truncated_file(tmp_path: Path) -> None:
    path = save(tmp_path, {"A": voice()})
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match="refused"):
        load_speakers(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no .*spk_dict\.pt"):
        load_speakers(tmp_path / "spk_dict.pt")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([voice()], "holds a list"),
        ({}, "holds a dict"),
        ({"A": 3}, "voice 'A' holds int"),
        ({"A": {"cond": torch.ones(1, 192)}}, r"holds \['cond'\], expected bos_token"),
        ({"A": voice(bos_token="x")}, "bos_token 'x'"),
        ({"A": voice(bos_token=-1)}, "bos_token -1"),
        ({"A": voice(cond=torch.ones(2, 192))}, r"cond of voice 'A' has shape \[2, 192\]"),
        ({"A": voice(cond=torch.ones(1, 192, dtype=torch.int64))}, "floating-point"),
        ({"A": voice(cond=torch.full((1, 192), float("nan")))}, "cond of voice 'A' holds NaN"),
        ({"A": voice(ref_mel=torch.ones(80))}, r"ref_mel of voice 'A' has shape \[80\]"),
        ({"A": voice(ref_mel=torch.ones(1, 0, 80))}, r"shape \[1, 0, 80\]"),
        ({"A": voice(ref_mel=torch.full((1, 9, 80), float("inf")))}, "ref_mel of voice 'A' holds NaN or infinite"),
    ],
)
def test_bad_voice(tmp_path: Path, value: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_speakers(save(tmp_path, value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bos_token": 10**6}, "bos_token is 1000000, expected below 1024"),
        ({"cond": np.ones(64, np.float32)}, "cond's width is 64, expected 192"),
        ({"ref_mel": np.ones((40, 100), np.float32)}, "ref_mel's bins is 100, expected 80"),
        ({"ref_mel": np.ones((4, 80), np.float32)}, "ref_mel's frames is 4, expected at least 5"),
    ],
)
def test_voice_of_another_model(ckpt: Checkpoint, change: dict[str, Any], message: str) -> None:
    fields = {"bos_token": 900, "cond": np.ones(192, np.float32), "ref_mel": np.ones((40, 80), np.float32)}
    with pytest.raises(CheckpointError, match=message):
        speaker_vectors(ckpt, {"A": Speaker(**(fields | change))})


def test_encoder_weight_of_wrong_shape(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"enc_attention_channels": 16', '"enc_attention_channels": 24'))
    with pytest.raises(CheckpointError, match=r"spk_encoder\.asp\..*expected \["):
        null_reference(Checkpoint.open(folder))


def test_threads_do_not_change_a_voice(ckpt: Checkpoint, tiny_checkpoint: Path) -> None:
    voices, before = load_speakers(tiny_checkpoint / "spk_dict.pt"), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append({name: vector.tobytes() for name, vector in speaker_vectors(ckpt, voices).items()})
        assert found[1:] == found[:1] * 2
    finally:
        torch.set_num_threads(before)


def test_write_voice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cond, reference = np.linspace(-1, 1, 192, dtype=np.float32), np.linspace(0, 2, 128, dtype=np.float32)
    for name in ("a.npz", "b.npz"):
        write_voice(tmp_path / name, cond, reference)
        monkeypatch.setattr(time, "time", lambda: 2e9)  # archives hold times; not this one
    with np.load(tmp_path / "a.npz", allow_pickle=False) as stored:
        assert sorted(stored.files) == ["reference", "speaker"]
        np.testing.assert_array_equal(stored["speaker"], cond)
        np.testing.assert_array_equal(stored["reference"], reference)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_recording_is_spoken_forwards_and_backwards() -> None:
    recording = np.asarray([[0, 1], [8, 9], [4, 5]], np.float32)
    spoken = spoken_mel(Speaker(0, np.zeros(192, np.float32), recording), 8)
    np.testing.assert_array_equal(spoken, recording[[1, 2, 2, 1, 0, 0, 1, 2]])
