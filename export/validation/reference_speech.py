"""Say codes as the reference does: transformers' DiT, solved from a given noise, and its vocoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from omniport.runtime.bundle.parts import giving
from omniport.runtime.errors import UnknownVoice
from torch import nn

from ..checkpoint.checkpoint import Checkpoint
from ..models.speakers import Speaker, load_speakers
from .reference import Reference, array_key

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Solve:
    """The ODE: states x [E, T, 80] at which the guided velocity [E, T, 80] was evaluated at times [E]; mel [80, T]."""

    x: Floats
    velocity: Floats
    times: Floats
    mel: Floats


def reference_speech(reference: Reference, codes: Sequence[int], voice: str, noise: Floats) -> Floats:
    """The reference's sound of codes, whole, float32 [n].

    Args:
        noise: float32 [T, 80], the ODE's start, T at least 2 for every code.

    Raises:
        UnknownVoice: the checkpoint has no voice of that name.
    """
    solve = solve_flow(reference, codes, speaker_of(reference.checkpoint, voice), noise)
    return sound_of(reference, solve.mel)


def speaker_of(checkpoint: Checkpoint, voice: str) -> Speaker:
    """A voice of a checkpoint.

    Raises:
        UnknownVoice: there is none of that name.
    """
    speakers = load_speakers(checkpoint.path / "spk_dict.pt")
    if voice not in speakers:
        raise UnknownVoice(f"{checkpoint.name} has no voice {voice!r}; it has {', '.join(speakers)}")
    return speakers[voice]


def solve_flow(reference: Reference, codec_ids: Sequence[int], speaker: Speaker, noise: Floats) -> Solve:
    """The mel of codes, and how it came about; ``noise`` as of `reference_speech`."""
    codes = np.asarray([codec_ids], np.int64)

    def run(module: Any) -> dict[str, torch.Tensor]:
        states: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []
        times: list[torch.Tensor] = []

        def record(_module: nn.Module, _arguments: object, given: dict[str, Any], output: torch.Tensor) -> None:
            states.append(given["hidden_states"].clone())
            times.append(given["time_step"].reshape(1).clone())
            guided, null = output.chunk(2, dim=0)
            outputs.append(guided + (guided - null) * 0.5)  # sample's default guidance

        hook = module.register_forward_hook(record, with_kwargs=True)
        try:
            with _given_noise(noise):
                mel = module.sample(
                    torch.from_numpy(speaker.cond)[None],
                    torch.from_numpy(speaker.ref_mel)[None],
                    torch.from_numpy(codes),
                )
        finally:
            hook.remove()
        return {"x": torch.cat(states), "velocity": torch.cat(outputs), "times": torch.cat(times), "mel": mel[0]}

    case = f"reply {array_key(codes, noise[: 2 * codes.shape[1]], speaker.cond, speaker.ref_mel)}"
    kept = reference.result(giving("velocity").name, case, run)
    return Solve(kept["x"], kept["velocity"], kept["times"], kept["mel"])


def sound_of(reference: Reference, mel: Floats) -> Floats:
    """Samples float32 [n] of a mel [80, T]."""

    def run(module: Any) -> dict[str, torch.Tensor]:
        return {"wav": module(torch.from_numpy(mel)[None]).reshape(-1)}

    return reference.result(giving("wav").name, f"reply {array_key(mel)}", run)["wav"]


@contextmanager
def _given_noise(noise: Floats) -> Iterator[None]:
    """Hand out ``noise`` where ``Qwen2_5OmniToken2WavDiTModel.sample`` draws its own."""

    def given(shape: Sequence[int], **_options: object) -> torch.Tensor:
        _, frames, _ = shape
        if frames > len(noise):
            raise ValueError(f"noise has {len(noise)} mel frames, the speech needs {frames}")
        return torch.from_numpy(noise[None, :frames].copy())

    with mock.patch.object(torch, "randn", given):
        yield
