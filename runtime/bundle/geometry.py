"""Check the numbers of a manifest: each has a range, and they agree with each other and with the graphs' shapes.

Ranges are wide, far beyond any published model: they keep a damaged or hostile file from asking for memory or time that
nobody has. Every message names the field.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ..errors import BundleError
from .graph_spec import GraphSpec
from .manifest import DecoderGeometry, Manifest

_WIDTH, _IDS, _RATE = (1, 1 << 17), (0, 1 << 24), (1000, 384_000)

#: field -> least and most. A field that is not here is a number from 1 to 2**31.
_RANGES: Mapping[str, tuple[float, float]] = {
    "sampling_rate": _RATE,
    "sample_rate": _RATE,
    "n_fft": (2, 1 << 16),
    "hop_length": (1, 1 << 16),
    "n_mels": (1, 1024),
    "chunk_frames": (1, 1 << 14),
    "chunk_tokens": (1, 1 << 14),
    "max_seconds": (1e-3, 3600),
    "patch_size": (1, 128),
    "temporal_patch_size": (1, 16),
    "merge_size": (1, 16),
    "window_size": (1, 8192),
    "image_mean": (-1e3, 1e3),
    "image_std": (1e-6, 1e3),
    "min_pixels": (1, 1 << 28),
    "max_pixels": (1, 1 << 28),
    "video_min_pixels": (1, 1 << 28),
    "video_max_pixels": (1, 1 << 28),
    "video_fps": (1e-3, 1000),
    "video_max_frames": (1, 1 << 16),
    "hidden_size": _WIDTH,
    "embedding_size": _WIDTH,
    "intermediate_size": (1, 1 << 20),
    "num_layers": (1, 1024),
    "num_heads": (1, 4096),
    "num_kv_heads": (1, 4096),
    "head_dim": (1, 4096),
    "vocab_size": (1, 1 << 24),
    "rope_theta": (1, 1e12),
    "mrope_section": (0, 4096),
    "rms_norm_eps": (1e-30, 1),
    "max_context": (2, 1 << 22),
    "mel_dim": (1, 1024),
    "repeats": (1, 64),
    "block_size": (1, 4096),
    "look_back_blocks": (0, 64),
    "look_ahead_blocks": (0, 64),
    "num_embeds": _IDS,
    "speaker_dim": _WIDTH,
    "reference_dim": _WIDTH,
    "codec_hz": (0.1, 1000),
    "past_layers": (0, 1024),
    "past_width": _WIDTH,
    "hop": (1, 1 << 16),
    "context_frames": (0, 4096),
    "max_new_tokens": (1, 1 << 24),
    "temperature": (0, 100),
    "top_k": _IDS,
    "top_p": (1e-9, 1),
    "repetition_penalty": (1e-3, 1000),
    "grid": (0, 1),
    "table": (0, 1),
    "stages": (0, 1 << 16),
    "guidance_scale": (-1000, 1000),
    "sway": (-1000, 1000),
    "position_id_per_seconds": (1, 1 << 16),
    "seconds_per_chunk": (1e-2, 3600),
}
_DEFAULT = (1, 1 << 31)
_PARTS = (
    "audio",
    "vision",
    "thinker",
    "thinker_sampling",
    "kv",
    "talker",
    "talker_sampling",
    "dit",
    "vocoder",
    "solver",
)


def number_problems(manifest: Manifest) -> Iterator[str]:
    """What is wrong with the numbers of a manifest, the worst first."""
    for name in _PARTS:
        part = getattr(manifest, name)
        if part is not None:
            yield from _range_problems(f"{name}.", msgspec.structs.asdict(part))
    own = {name: getattr(manifest, name) for name in ("position_id_per_seconds", "seconds_per_chunk")}
    yield from _range_problems("", own)
    for name, graph in manifest.graphs.items():
        if not 1 <= graph.opset <= 100:
            yield f"graph {name!r} has opset {graph.opset}; 1 to 100 was expected"
        sizes = [dim for tensor in (*graph.inputs, *graph.outputs) for dim in tensor.shape if isinstance(dim, int)]
        sizes += [span.max for span in graph.dims.values()]
        if sizes and max(sizes) > _DEFAULT[1]:
            yield f"graph {name!r} has a size of {max(sizes)}; at most {_DEFAULT[1]} was expected"
    yield from _agreement_problems(manifest)


def check_shapes(manifest: Manifest, path: Path) -> None:
    """Compare the graphs' shapes with the sizes that other fields state, before anything is run.

    Args:
        path: of the bundle, for messages.

    Raises:
        BundleError: names the first tensor that differs.
    """
    for name, graph in manifest.graphs.items():
        for problem in _shape_problems(manifest, name, graph):
            raise BundleError(f"{path}: {problem}. Export the bundle again")


def _range_problems(where: str, fields: Mapping[str, Any]) -> Iterator[str]:
    for field, value in fields.items():
        least, most = _RANGES.get(field, _DEFAULT)
        for number in _numbers(value):
            if not math.isfinite(number) or not least <= number <= most:
                yield f"{where}{field} is {number!r}; {least:g} to {most:g} was expected"


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def _agreement_problems(manifest: Manifest) -> Iterator[str]:
    audio, vision = manifest.audio, manifest.vision
    if audio.hop_length > audio.n_fft:
        yield f"audio.hop_length {audio.hop_length} is above audio.n_fft {audio.n_fft}"
    unit = vision.patch_size * vision.merge_size
    if vision.window_size % unit:
        yield f"vision.window_size {vision.window_size} is no multiple of patch_size * merge_size, {unit}"
    for low, high in (("min_pixels", "max_pixels"), ("video_min_pixels", "video_max_pixels")):
        if getattr(vision, low) > getattr(vision, high):
            yield f"vision.{low} {getattr(vision, low)} is above vision.{high} {getattr(vision, high)}"
    for name, decoder in manifest.decoders.items():
        yield from _decoder_problems(name, decoder)
    dit, vocoder = manifest.dit, manifest.vocoder
    if dit is not None and vocoder is not None:
        rate = dit.codec_hz * dit.repeats * vocoder.hop
        if not math.isclose(rate, vocoder.sample_rate, rel_tol=1e-6):
            yield f"dit.codec_hz * dit.repeats * vocoder.hop is {rate:g}; vocoder.sample_rate is {vocoder.sample_rate}"


def _decoder_problems(name: str, decoder: DecoderGeometry) -> Iterator[str]:
    if decoder.num_heads % decoder.num_kv_heads:
        yield f"{name} has {decoder.num_heads} heads for {decoder.num_kv_heads} KV heads; a multiple was expected"
    if 2 * sum(decoder.mrope_section) != decoder.head_dim:
        yield f"{name}.mrope_section {decoder.mrope_section} does not add up to half of head_dim {decoder.head_dim}"


def _shape_problems(manifest: Manifest, name: str, graph: GraphSpec) -> Iterator[str]:
    expected = _shapes(manifest, name)
    for tensor in (*graph.inputs, *graph.outputs):
        wanted = expected.get("past" if tensor.name.startswith(("past_", "present_")) else tensor.name, ())
        what = f"tensor {tensor.name!r} of graph {name!r} has shape {tensor.shape}"
        if wanted and len(tensor.shape) != len(wanted):
            yield f"{what}; {len(wanted)} dimensions were expected"
        for dim, size in zip(tensor.shape, wanted, strict=False):
            if size is not None and isinstance(dim, int) and dim != size:
                yield f"{what}; {size} instead of {dim} was expected"


def _shapes(manifest: Manifest, name: str) -> dict[str, tuple[int | None, ...]]:
    """Sizes of a graph's tensors that other fields state; None for the others."""
    audio, vision, dit = manifest.audio, manifest.vision, manifest.dit
    width = manifest.thinker.embedding_size
    if name in manifest.decoders:
        decoder = manifest.decoders[name]
        return {
            "inputs_embeds": (None, None, decoder.embedding_size),
            "logits": (None, decoder.vocab_size),
            "hidden": (None, None, decoder.hidden_size),
            "past": (None, decoder.num_kv_heads, None, decoder.head_dim),
        }
    if name == "audio_encoder":
        return {"mel": (None, audio.n_mels, audio.chunk_frames), "embeds": (None, audio.chunk_tokens, width)}
    if name == "vision_encoder":
        patch = 3 * vision.temporal_patch_size * vision.patch_size**2
        return {
            "patches": (None, None, patch),
            "window_valid": (None, (vision.window_size // vision.patch_size) ** 2),
            "embeds": (None, width),
        }
    if dit is None:
        return {}
    if name == "bigvgan":
        return {"mel": (None, dit.mel_dim, None)}
    if name == "dit":
        return {
            "x": (None, None, dit.mel_dim),
            "speaker": (None, dit.speaker_dim),
            "reference": (None, dit.reference_dim),
            "velocity": (None, None, dit.mel_dim),
            "past": (None, dit.block_size, dit.past_width),
        }
    return {}
