"""Compare each exported graph with its transformers module, one part in memory at a time.

The reference is transformers' own class with the checkpoint's weights loaded by name; it shares no code with the
modules that are exported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omniport.runtime.backends import open_backend
from omniport.runtime.backends.base import Backend, Graph
from omniport.runtime.bundle.manifest import DitGeometry, Manifest, SolverSpec
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import UsageError
from omniport.runtime.media.image import VisionInput, image_input, video_input
from omniport.runtime.media.log_mel import audio_tokens, chunk_mel, log_mel
from torch import nn

from ..checkpoint.checkpoint import Checkpoint
from ..models.voices import Speaker, load_speakers
from .reference_modules import load_reference

Array = NDArray[Any]

#: relative RMS error allowed by the precision of a graph's weights: float32 differs by the order of summation only;
#: float16 and bfloat16 round every activation to 11 and 8 bits.
TOLERANCES: Mapping[str, float] = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 8e-2}

#: below this root mean square a reference proves nothing
MIN_ENERGY = 1e-3


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        ours: runs the graph -> array.
        reference: runs the transformers module -> array of the same shape.
        inputs: everything that the reference's result depends on besides the weights.
    """

    graph: str
    name: str
    ours: Callable[[Graph], Array]
    reference: Callable[[nn.Module], torch.Tensor]
    inputs: tuple[Array, ...] = ()


@dataclass(frozen=True)
class ParityRow:
    """Result of one comparison. ``rel_rms``: RMS of the difference over RMS of the reference."""

    graph: str
    case: str
    rel_rms: float
    max_abs: float
    energy: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the reference has energy and the error is finite and within tolerance."""
        return self.energy > MIN_ENERGY and bool(np.isfinite(self.rel_rms)) and self.rel_rms <= self.tolerance


def check_bundle(
    bundle: str | Path,
    checkpoint: str | Path,
    *,
    backend: str = "ort-cpu",
    cases: Callable[[Bundle, Checkpoint], Sequence[Case]] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[ParityRow]:
    """Compare every graph of a bundle with its transformers module.

    Args:
        bundle: bundle folder.
        checkpoint: the checkpoint it was exported from.
        cases: makes the comparisons; random inputs of several shapes by default.
        progress: called with the case, and the number done and in total.

    Raises:
        UsageError: the bundle was exported from another checkpoint.
    """
    opened, ckpt = Bundle.open(bundle), Checkpoint.open(checkpoint)
    manifest = opened.manifest
    if manifest.source.fingerprint != ckpt.fingerprint:
        raise UsageError(
            f"{bundle} was exported from {manifest.source.name} with fingerprint {manifest.source.fingerprint[:12]}, "
            f"and {checkpoint} has {ckpt.fingerprint[:12]}. Give the checkpoint it was exported from, or export again."
        )
    listed = list((cases or standard_cases)(opened, ckpt))
    rows: list[ParityRow] = []
    engine = open_backend(backend, opened)
    try:
        for name in dict.fromkeys(case.graph for case in listed):
            reference = load_reference(ckpt, name)
            for case in (c for c in listed if c.graph == name):
                if progress is not None:
                    progress(f"{name}: {case.name}", len(rows), len(listed))
                rows.append(_compare(case, engine, reference, TOLERANCES[manifest.graphs[name].precision]))
            del reference
    finally:
        engine.close()
    return rows


def _compare(case: Case, engine: Backend, reference: nn.Module, tolerance: float) -> ParityRow:
    with torch.no_grad():
        wanted = case.reference(reference).double().numpy()
    got = case.ours(engine.graph(case.graph)).astype(np.float64)
    if got.shape != wanted.shape:
        raise AssertionError(f"{case.graph} {case.name}: shape {got.shape}, the reference has {wanted.shape}")
    difference = got - wanted
    energy = float(np.sqrt(np.mean(wanted**2)))
    return ParityRow(
        graph=case.graph,
        case=case.name,
        rel_rms=float(np.sqrt(np.mean(difference**2)) / max(energy, 1e-30)),
        max_abs=float(np.abs(difference).max()),
        energy=energy,
        tolerance=tolerance,
    )


def standard_cases(bundle: Bundle, ckpt: Checkpoint) -> list[Case]:
    """Random inputs in realistic ranges, several shapes per graph."""
    rng, manifest = np.random.default_rng(0), bundle.manifest
    cases: list[Case] = []
    if "audio_encoder" in manifest.graphs:
        for seconds in (0.31, 2.0, 7.03):
            cases.append(audio_case(f"{seconds:g} s of noise", _noise(rng, seconds), manifest))
    if "vision_encoder" in manifest.graphs:
        for height, width in ((112, 112), (210, 87)):
            image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            cases.append(vision_case(f"image {height}x{width}", image_input(image, manifest.vision)))
        frames = rng.integers(0, 256, (4, 64, 100, 3), dtype=np.uint8)
        cases.append(vision_case("video of 4 frames", video_input(frames, manifest.vision)))
    if "thinker" in manifest.graphs:
        cases += [case for length in (1, 17, 200) for case in thinker_cases(length, ckpt, rng)]
    if "talker" in manifest.graphs:
        cases += [talker_case(length, ckpt, rng) for length in (1, 17, 200)]
    if "dit" in manifest.graphs:
        voices = load_speakers(ckpt.path / "spk_dict.pt")
        last = len(_solver(manifest).table) - 1
        for name, length, step in zip(cycle(voices), (12, 13, 61), (0, last // 2, last), strict=False):
            codes = rng.integers(0, _dit(manifest).num_embeds, (1, length))
            x = rng.standard_normal((1, length * _dit(manifest).repeats, _dit(manifest).mel_dim), np.float32)
            cases.append(dit_case(f"{length} codes, {name}, step {step}", x, codes, step, name, bundle, voices[name]))
    if "bigvgan" in manifest.graphs:
        for length in (7, 60):
            mel = rng.normal(-5, 2, (1, 80, length)).astype(np.float32)
            cases.append(bigvgan_case(f"{length} mel frames", mel))
    return cases


def audio_case(name: str, samples: NDArray[np.float32], manifest: Manifest) -> Case:
    """16 kHz samples through log-mel and the encoder, padding rows dropped."""
    mel = log_mel(samples, manifest.audio)
    total = mel.shape[1]

    def ours(graph: Graph) -> Array:
        chunks, frames = chunk_mel(mel, manifest.audio)
        rows = graph.run({"mel": chunks, "frames": frames})["embeds"]
        return rows.reshape(-1, rows.shape[-1])[: audio_tokens(total)]

    def reference(module: nn.Module) -> torch.Tensor:
        output = module(input_features=torch.from_numpy(mel), feature_lens=torch.tensor([total]))
        return torch.as_tensor(output.last_hidden_state)

    return Case("audio_encoder", name, ours, reference, (mel,))


def vision_case(name: str, vision: VisionInput) -> Case:
    """One image or one video."""

    def ours(graph: Graph) -> Array:
        feeds: dict[str, Array] = {
            "patches": vision.patches,
            "grid_hw": vision.grid_hw,
            "window_index": vision.window_index,
            "window_valid": vision.window_valid,
        }
        return graph.run(feeds)["embeds"]

    def reference(module: nn.Module) -> torch.Tensor:
        patches = torch.from_numpy(vision.patches).flatten(0, 1)
        return torch.as_tensor(module(patches, grid_thw=torch.tensor([vision.grid_thw])).pooler_output)

    return Case("vision_encoder", name, ours, reference, (vision.patches, np.array(vision.grid_thw)))


def _decoder_feeds(embeds: Array, positions: Array) -> dict[str, Array]:
    length = embeds.shape[1]
    return {
        "inputs_embeds": embeds,
        "position_ids": positions,
        "kv_positions": np.arange(length, dtype=np.int64),
        "write_index": np.zeros(1, np.int64),
    }


def _positions(length: int, rng: np.random.Generator) -> Array:
    """Three unequal, growing components, as multimodal prompts have: [3, 1, length]."""
    return np.cumsum(rng.integers(0, 3, (3, 1, length)), axis=-1).astype(np.int64)


def _embeddings(part: str, length: int, ckpt: Checkpoint, rng: np.random.Generator) -> Array:
    """Rows of the token-embedding table: the range that the decoder was made for. [1, length, width]."""
    key = f"{part}.model.embed_tokens.weight"
    rows = [ckpt.read(key, int(i), int(i) + 1) for i in rng.integers(0, ckpt.shape(key)[0], length)]
    return np.concatenate(rows).astype(np.float32)[None]


def thinker_cases(length: int, ckpt: Checkpoint, rng: np.random.Generator) -> Iterator[Case]:
    """Prefill of random tokens: hidden states of every token, and the last token's logits."""
    embeds, positions = _embeddings("thinker", length, ckpt, rng), _positions(length, rng)
    yield from decoder_cases("thinker", f"{length} tokens", embeds, positions, length + 7)


def talker_case(length: int, ckpt: Checkpoint, rng: np.random.Generator) -> Case:
    """Prefill of random tokens: the last token's logits."""
    embeds, positions = _embeddings("talker", length, ckpt, rng), _positions(length, rng)
    (case,) = decoder_cases("talker", f"{length} tokens", embeds, positions, length + 7)
    return case


def decoder_cases(
    graph: str, name: str, embeds: NDArray[np.float32], positions: NDArray[np.int64], capacity: int
) -> Iterator[Case]:
    """Prefill of given embeddings, in one piece: the thinker's hidden states, and the last token's logits.

    Args:
        graph: ``thinker`` or ``talker``.
        embeds: [1, S, E]. positions: int64 [3, 1, S]. capacity: of the KV cache, in tokens.
    """

    def ours(output: str) -> Callable[[Graph], Array]:
        return lambda g: g.run(_decoder_feeds(embeds, positions), g.new_cache(capacity))[output]

    def hidden(module: nn.Module) -> torch.Tensor:
        return reference_hidden(module, graph, embeds, positions)

    def logits(module: nn.Module) -> torch.Tensor:
        return reference_logits(module, graph, hidden(module)[:, -1])

    if graph == "thinker":
        yield Case(graph, f"{name}, hidden", ours("hidden"), hidden, (embeds, positions))
    yield Case(graph, f"{name}, logits", ours("logits"), logits, (embeds, positions))


def reference_hidden(
    module: nn.Module, graph: str, embeds: NDArray[np.float32], positions: NDArray[np.int64]
) -> torch.Tensor:
    """States after the final norm [1, S, H] of a decoder's reference; arguments as for `decoder_cases`."""
    x = torch.from_numpy(embeds)
    if graph == "talker":
        module, x = module.get_submodule("model"), module.get_submodule("thinker_to_talker_proj")(x)
    output = module(inputs_embeds=x, position_ids=torch.from_numpy(positions))
    return torch.as_tensor(output.last_hidden_state)


def reference_logits(module: nn.Module, graph: str, hidden: torch.Tensor) -> torch.Tensor:
    """[..., H] -> [..., V]."""
    return torch.as_tensor(module.get_submodule("lm_head" if graph == "thinker" else "codec_head")(hidden))


def dit_case(
    name: str, x: NDArray[np.float32], codes: Array, step: int, voice: str, bundle: Bundle, speaker: Speaker
) -> Case:
    """Guided velocity at one time point of the schedule; the voice's vectors are the bundle's.

    Args:
        x: [1, T, mel]. codes: int64 [1, T/2]. step: index into the solver's table.
        speaker: the voice as the checkpoint stores it, for the reference.
    """
    vectors = bundle.voice(voice)
    solver = _solver(bundle.manifest)

    def ours(graph: Graph) -> Array:
        feeds: dict[str, Array] = {
            "x": x,
            "codes": codes,
            "step": np.array([step], np.int64),
            **vectors.feeds(),
        }
        return graph.run(feeds)["velocity"]

    def reference(module: nn.Module) -> torch.Tensor:
        output = module(
            hidden_states=torch.from_numpy(x),
            condition_vector=torch.from_numpy(speaker.ref_mel)[None],
            speaker_embedding=torch.from_numpy(speaker.cond)[None, None].expand(-1, x.shape[1], -1),
            quantized_code=torch.from_numpy(codes),
            time_step=torch.tensor(solver.table[step]),
        )
        guided, null = output.chunk(2, dim=0)
        return torch.as_tensor(guided + (guided - null) * solver.guidance_scale)

    settings = np.array([solver.table[step], solver.guidance_scale])
    return Case("dit", name, ours, reference, (x, codes, speaker.ref_mel, speaker.cond, settings))


def bigvgan_case(name: str, mel: NDArray[np.float32]) -> Case:
    """mel float32 [1, 80, T] to samples."""
    return Case(
        "bigvgan",
        name,
        lambda graph: graph.run({"mel": mel})["wav"],
        lambda module: torch.as_tensor(module(torch.from_numpy(mel))).reshape(1, -1),
        (mel,),
    )


def _noise(rng: np.random.Generator, seconds: float) -> NDArray[np.float32]:
    return (0.1 * rng.standard_normal(int(16000 * seconds))).astype(np.float32)


def _solver(manifest: Manifest) -> SolverSpec:
    assert manifest.solver is not None
    return manifest.solver


def _dit(manifest: Manifest) -> DitGeometry:
    assert manifest.dit is not None
    return manifest.dit
