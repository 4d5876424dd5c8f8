"""Read the voices of spk_dict.pt, and compute the vectors that a bundle stores.

spk_dict.pt maps a voice's name to ``bos_token`` (the text token that opens its speech), ``cond`` [1, 192] (speaker
conditioning) and ``ref_mel`` [1, T, 80] (a reference recording). The DiT sees the recording only through its ECAPA-TDNN
encoder, so the encoder runs here, once per voice, and never in a graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omniport.runtime.errors import CheckpointError
from omniport.runtime.system.files import open_regular
from omniport.runtime.system.foreign import foreign

from ..checkpoint.checkpoint import Checkpoint
from .ecapa import SpeakerEncoder, SpeakerSpec
from .module import torch_threads

Vector = NDArray[np.float32]

#: where the speaker encoder's weights are stored
SPEAKER_PREFIX = "token2wav.code2wav_dit_model.input_embed.spk_encoder."


@dataclass(frozen=True)
class Speaker:
    """One voice: its text-bos token, ``cond`` float32 [192] and ``ref_mel`` float32 [T, 80]."""

    bos_token: int
    cond: Vector
    ref_mel: Vector


def load_speakers(path: Path) -> dict[str, Speaker]:
    """Read spk_dict.pt without running any code that it may hold.

    Raises:
        CheckpointError: the file is missing or corrupt, holds anything but tensors and plain values, or a voice lacks
            a field, has a wrong shape or a value that is not finite.
    """
    if not path.exists():
        raise CheckpointError(f"no {path}: the voices are stored there. Copy spk_dict.pt from the base model.")
    with (
        foreign(
            CheckpointError,
            f"{path} is refused: it is corrupt, or holds something other than tensors and plain values",
            "Take spk_dict.pt from the base model.",
        ),
        open_regular(path) as file,
    ):
        stored = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(stored, dict) or not stored:
        raise CheckpointError(f"{path} holds a {type(stored).__name__}, expected a dict of voices.")
    return {str(name): _speaker(str(name), entry, path) for name, entry in stored.items()}


def spoken_mel(speaker: Speaker, frames: int) -> Vector:
    """Log mel float32 [frames, 80] of the voice's recording from its loudest frame, forwards and backwards in turns.

    To trained weights this is speech. What only looks like speech may lie where they never were, and half precision is
    far off there.
    """
    mel = speaker.ref_mel
    turns = np.roll(np.concatenate([mel, mel[::-1]]), -int(mel.mean(axis=1).argmax()), axis=0)
    return np.resize(turns, (frames, turns.shape[1])).astype(np.float32)


def speaker_keys(ckpt: Checkpoint) -> set[str]:
    """Names of the stored tensors that this module reads."""
    with torch.device("meta"):
        encoder = SpeakerEncoder(_spec(ckpt))
    return {SPEAKER_PREFIX + name for name in encoder.state_dict()}


def speaker_vectors(ckpt: Checkpoint, speakers: Mapping[str, Speaker]) -> dict[str, Vector]:
    """Each voice's ``reference`` float32 [128]: the encoder applied to its reference mel.

    Raises:
        CheckpointError: a voice does not fit the model (token id, vector width, mel bins, mel length), the encoder's
            weights are missing or wrong-shaped, or a result is not finite.
    """
    for name, speaker in speakers.items():
        _check_fit(ckpt, name, speaker)
    encoder = _encoder(ckpt)
    return {name: _encode(encoder, speaker.ref_mel, name) for name, speaker in speakers.items()}


def null_reference(ckpt: Checkpoint) -> Vector:
    """``reference`` float32 [128] of guidance's unconditioned half: the encoder applied to an all-zero mel.

    A constant mel stays constant through reflect-padded convolutions and pooling, so its length does not matter.
    """
    spec = _spec(ckpt)
    return _encode(_encoder(ckpt), np.zeros((spec.min_frames, spec.mel_dim), np.float32), "the null reference")


def write_voice(path: Path, cond: Vector, reference: Vector) -> None:
    """Write a voice's .npz: ``speaker`` float32 [192] and ``reference`` float32 [128]. Equal input, equal bytes."""
    with path.open("wb") as file:
        np.savez(file, speaker=np.asarray(cond, np.float32), reference=np.asarray(reference, np.float32))


def _speaker(name: str, entry: object, path: Path) -> Speaker:
    if not isinstance(entry, dict) or not {"bos_token", "cond", "ref_mel"} <= set(entry):
        got = sorted(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
        raise CheckpointError(f"{path}: voice {name!r} holds {got}, expected bos_token, cond and ref_mel.")
    token = entry["bos_token"]
    token = token.item() if isinstance(token, torch.Tensor) and token.numel() == 1 else token
    if not isinstance(token, int) or isinstance(token, bool) or token < 0:
        raise CheckpointError(f"{path}: voice {name!r} has bos_token {token!r}, expected a token id.")
    cond = _array(entry["cond"], 1, f"{path}: cond of voice {name!r}")
    return Speaker(token, cond, _array(entry["ref_mel"], 2, f"{path}: ref_mel of voice {name!r}"))


def _array(value: object, ndim: int, what: str) -> Vector:
    """A tensor, without its leading batch axis of one, as a finite float32 array of ``ndim`` axes."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise CheckpointError(f"{what} is {type(value).__name__}, expected a floating-point tensor.")
    squeezed = value[0] if value.ndim == ndim + 1 and value.shape[0] == 1 else value
    if squeezed.ndim != ndim or squeezed.numel() == 0:
        axes = "[1, width] or [width]" if ndim == 1 else "[1, frames, bins] or [frames, bins]"
        raise CheckpointError(f"{what} has shape {list(value.shape)}, expected {axes}.")
    array: Vector = squeezed.to(torch.float32).contiguous().numpy()
    if not np.isfinite(array).all():
        raise CheckpointError(f"{what} holds NaN or infinite values. Take spk_dict.pt from the base model.")
    return array


def _spec(ckpt: Checkpoint) -> SpeakerSpec:
    spec = SpeakerSpec.from_config(ckpt.config.token2wav_config.dit_config)
    if not len(spec.channels) == len(spec.kernels) == len(spec.dilations) >= 3:
        raise CheckpointError(
            f"dit_config of {ckpt.name}: enc_channels {spec.channels}, enc_kernel_sizes {spec.kernels} and "
            f"enc_dilations {spec.dilations} must have the same length, at least 3."
        )
    return spec


def _check_fit(ckpt: Checkpoint, name: str, speaker: Speaker) -> None:
    spec, dit = _spec(ckpt), ckpt.config.token2wav_config.dit_config
    vocab_size = ckpt.config.thinker_config.text_config.vocab_size
    frames, bins = speaker.ref_mel.shape
    checks: list[tuple[str, Any, str, bool]] = [
        ("bos_token", speaker.bos_token, f"below {vocab_size} (vocabulary)", speaker.bos_token < vocab_size),
        ("cond's width", speaker.cond.size, f"{dit.enc_emb_dim} (enc_emb_dim)", speaker.cond.size == dit.enc_emb_dim),
        ("ref_mel's bins", bins, f"{spec.mel_dim} (mel_dim)", bins == spec.mel_dim),
        ("ref_mel's frames", frames, f"at least {spec.min_frames}", frames >= spec.min_frames),
    ]
    for what, got, expected, good in checks:
        if not good:
            raise CheckpointError(
                f"voice {name!r} does not fit {ckpt.name}: {what} is {got}, expected {expected}. Take spk_dict.pt from "
                "the model that the checkpoint derives from."
            )


def _encoder(ckpt: Checkpoint) -> SpeakerEncoder:
    with torch.device("meta"):
        encoder = SpeakerEncoder(_spec(ckpt))
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in encoder.state_dict().items():
        ckpt.expect(SPEAKER_PREFIX + name, parameter.shape)
        weights[name] = torch.from_numpy(ckpt.read(SPEAKER_PREFIX + name).astype(np.float32))
    encoder.load_state_dict(weights, assign=True)
    return encoder.eval()


def _encode(encoder: SpeakerEncoder, mel: Vector, what: str) -> Vector:
    with torch.inference_mode(), torch_threads(1):
        vector: Vector = encoder(torch.from_numpy(mel)[None])[0].numpy()
    if not np.isfinite(vector).all():
        raise CheckpointError(f"the speaker encoder gave NaN or infinite values for {what}: its weights are corrupt.")
    return vector
