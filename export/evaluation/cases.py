"""Comparisons of exported graphs with their transformers modules.

The reference is transformers' own class with the checkpoint's weights loaded by name; it shares no code with the
modules that are exported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omniport.runtime.backends.base import Graph
from omniport.runtime.bundle.manifest import Manifest, SolverSpec
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.media.image import VisionInput
from omniport.runtime.media.log_mel import audio_tokens, chunk_mel, log_mel
from torch import nn

from ..models.voices import Speaker

Array = NDArray[Any]


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


def _solver(manifest: Manifest) -> SolverSpec:
    assert manifest.solver is not None
    return manifest.solver
