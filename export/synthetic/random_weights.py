"""Draw random weights whose activations neither vanish nor saturate, and write them shard by shard.

Every tensor depends on the seed and its key alone, so order, sharding and the other tensors do not matter.
Gains follow from the usual fan-in argument (weights of variance ``gain^2 / fan_in`` keep unit variance through a
linear layer); the few that are not derived were measured, and tests assert what they must achieve.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omniport.runtime.system.progress import Progress

"""called with (what, done, total)"""

_BLOCK_ELEMENTS = 1 << 22
#: threads that draw tensors
_THREADS = 2


@dataclass(frozen=True)
class Outliers:
    """Large activations planted in one decoder stack, as trained Qwen2.5 weights have them."""

    norm_gain: Mapping[int, float]
    """residual channel -> gain of the layer norms there"""
    residual: float
    """how much louder those channels are in the residual stream"""
    key_bias: Mapping[int, float]
    """row of every layer's key projection -> bias"""


@dataclass(frozen=True)
class Scaling:
    """What the recipes need to know about one model.

    Row gains map row ranges ``(start, stop)`` of an output head to a factor; rows not named keep 1.
    """

    text_rows: Mapping[tuple[int, int], float]
    codec_rows: Mapping[tuple[int, int], float]
    codec_std: float
    """DiT codec embeddings: they share the input projection with the noise and the speaker"""
    wave_gain: float
    """last vocoder convolution"""
    outliers: Mapping[str, Outliers] = field(default_factory=dict)
    """per stack: ``thinker``, ``talker``"""


@dataclass(frozen=True)
class Plan:
    """How one tensor is drawn: ``mean + std * normal``, then rows and columns scaled."""

    std: float
    mean: float = 0.0
    centre: int = 0
    """take the mean out of every so many consecutive elements of a row (no response to a constant); 0: do not"""
    rows: Mapping[tuple[int, int], float] = field(default_factory=dict)
    columns: Mapping[int, float] = field(default_factory=dict)
    values: Mapping[int, float] = field(default_factory=dict)
    """rows that are set instead of drawn"""
    ramp: tuple[float, float] | None = None
    """first and last value of a ramp added along the first axis"""


def generator(seed: int, key: str) -> np.random.Generator:
    """The random stream of one tensor."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


# --- recipes -------------------------------------------------------------------------------------------------

# (pattern, gain): weights of std gain / sqrt(fan_in). First match wins.
_GAINS: tuple[tuple[str, float], ...] = (
    # decoders: scores of std about 2 make attention choose, so that replies depend on more than the last token
    (r"^(thinker|talker)\.model\.layers\..*\.(q_proj|k_proj)\.weight$", 1.4),
    (r"^(thinker|talker)\.model\.layers\..*\.(v_proj|o_proj|down_proj)\.weight$", 1.4),
    (r"^thinker\.lm_head\.weight$", 4.0),
    (r"^talker\.codec_head\.weight$", 4.0),
    (r"^talker\.thinker_to_talker_proj\.weight$", 0.8),
    # encoders
    (r"^thinker\.audio_tower\.conv[12]\.weight$", 1.5),
    (r"^thinker\.(audio_tower|visual)\..*(\.|_)(q|k|v|q_proj|k_proj|v_proj)\.weight$", 1.4),
    (r"^thinker\.visual\.merger\.mlp\.2\.weight$", 1.5),
    # flow matching: modulations of std 0.3, mel of std about 1.5 around -5
    (r"\.code2wav_dit_model\..*\.(attn_norm|norm_out)\.linear\.weight$", 0.5),
    (r"\.code2wav_dit_model\..*\.attn\.to_(q|k|v)\.weight$", 1.4),
    (r"\.code2wav_dit_model\.proj_out\.weight$", 0.7),
    (r"\.spk_encoder\..*\.conv\.weight$", 1.4),
    (r"\.spk_encoder\.fc\.weight$", 0.7),
    # vocoder
    (r"\.code2wav_bigvgan_model\.conv_pre\.weight$", 2.5),
    (r"\.code2wav_bigvgan_model\.resblocks\..*\.convs1\..*\.weight$", 1.0),
    (r"\.code2wav_bigvgan_model\.resblocks\..*\.convs2\..*\.weight$", 0.5),
)
_MEL_RAMP = (-4.2, -5.8)


def _fan_in(key: str, shape: Sequence[int]) -> int:
    if ".code2wav_bigvgan_model.ups." in key:
        # ConvTranspose1d [in, out, kernel]: a sample sees kernel / stride taps, about two in every layer
        return shape[0] * 2
    return math.prod(shape[1:])


def plan_tensor(key: str, shape: Sequence[int], scaling: Scaling) -> Plan:
    """The recipe of a tensor, by its checkpoint key."""
    if key.endswith(".inv_freq"):
        return Plan(std=0.0, values={i: 10000.0 ** (-i / shape[0]) for i in range(shape[0])})
    plan = _base_plan(key, shape, scaling)
    is_decoder = key.startswith(("thinker.model.", "talker."))
    outliers = scaling.outliers.get(key.split(".", 1)[0]) if is_decoder else None
    return plan if outliers is None else _with_outliers(key, plan, outliers)


def _base_plan(key: str, shape: Sequence[int], scaling: Scaling) -> Plan:
    if key.endswith((".alpha", ".beta")):
        return Plan(std=0.2)  # the vocoder stores them as logarithms
    if key.endswith(("embed_tokens.weight", "audio_bos_eos_token.weight")):
        return Plan(std=1.0)
    if key.endswith("codec_embed.weight"):
        return Plan(std=scaling.codec_std)
    if key.endswith("proj_out.bias"):
        return Plan(std=0.3, ramp=_MEL_RAMP)
    if len(shape) == 1:
        is_norm = re.search(r"(norm\d?|layer_norm|layernorm|ln_q|ln_post)\.weight$", key) is not None
        return Plan(std=0.1, mean=1.0 if is_norm else 0.0)
    if key.endswith("conv_post.weight"):
        # each kernel by itself: no offset reaches the waveform
        return Plan(std=scaling.wave_gain / math.sqrt(_fan_in(key, shape)), centre=shape[-1])
    gain = next((gain for pattern, gain in _GAINS if re.search(pattern, key)), 1.0)
    plan = Plan(std=gain / math.sqrt(_fan_in(key, shape)))
    if key == "thinker.lm_head.weight":
        return replace(plan, rows=scaling.text_rows)
    if key == "talker.codec_head.weight":
        return replace(plan, rows=scaling.codec_rows)
    # Snake adds a positive mean to every channel; kernels that ignore constants keep it from building up. The speaker
    # encoder's first layer likewise ignores the level that all log mels share.
    ignores_constants = "bigvgan_model.resblocks" in key or "spk_encoder.blocks.0" in key
    return replace(plan, centre=math.prod(shape[1:]) if ignores_constants else 0)


def _with_outliers(key: str, plan: Plan, outliers: Outliers) -> Plan:
    gains = outliers.norm_gain
    if re.search(r"layers\.\d+\.(input_layernorm|post_attention_layernorm)\.weight$", key):
        return replace(plan, values=gains)
    if re.search(r"layers\.\d+\.(self_attn\.[qkv]_proj|mlp\.(gate|up)_proj)\.weight$", key):
        # readers of the normed stream undo the gain, as trained weights do
        return replace(plan, columns={c: 1.0 / (gain * outliers.residual) for c, gain in gains.items()})
    if re.search(r"(layers\.\d+\.(self_attn\.o_proj|mlp\.down_proj)|thinker_to_talker_proj)\.weight$", key):
        return replace(plan, rows={(c, c + 1): outliers.residual for c in gains})
    if key == "thinker.model.embed_tokens.weight":
        return replace(plan, columns=dict.fromkeys(gains, outliers.residual))
    if key.endswith("self_attn.k_proj.bias"):
        return replace(plan, values=outliers.key_bias)
    return plan


# --- writing -------------------------------------------------------------------------------------------------


def tensor_blocks(key: str, shape: Sequence[int], plan: Plan, seed: int) -> Iterator[NDArray[np.float32]]:
    """The tensor in blocks of whole rows, in order; each block is float32 [rows, elements per row]."""
    draw = generator(seed, key)
    width = math.prod(shape[1:])
    step = max(1, _BLOCK_ELEMENTS // width)
    for start in range(0, shape[0], step):
        stop = min(shape[0], start + step)
        block = draw.standard_normal((stop - start, width), dtype=np.float32)
        if plan.centre:
            groups = block.reshape(len(block), -1, plan.centre)
            groups -= groups.mean(axis=2, keepdims=True)
        block *= np.float32(plan.std)
        block += np.float32(plan.mean)
        if plan.ramp is not None:
            block += np.linspace(*plan.ramp, shape[0], dtype=np.float32)[start:stop, None]
        for (first, last), factor in plan.rows.items():
            block[max(0, first - start) : max(0, last - start)] *= np.float32(factor)
        for column, factor in plan.columns.items():
            block[:, column] *= np.float32(factor)
        for row, value in plan.values.items():
            if start <= row < stop:
                block[row - start] = value
        yield block


def _split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Keys in order, cut into shards of at most ``limit`` bytes (one tensor at least)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for key, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    return shards


def _float32(key: str) -> bool:
    return key.startswith("token2wav.")


def stored_bytes(key: str, shape: Sequence[int]) -> int:
    """Size of a tensor in the checkpoint."""
    return (4 if _float32(key) else 2) * math.prod(shape)


def write_shards(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    scaling: Scaling,
    *,
    seed: int,
    shard_bytes: int,
    metadata: bool = True,
    progress: Progress | None = None,
) -> None:
    """Write safetensors shards and their index as the published ones lie: token2wav float32, the rest bfloat16.

    Shards are cut in the order of ``shapes``; in a shard the wider dtype comes first, then names in order. Never
    holds more than a block of a tensor in each thread.

    The file layout is the safetensors format: little-endian header length, JSON header, then the data.

    Args:
        shard_bytes: most of one shard; one tensor at least.
        metadata: say in each header that the tensors are PyTorch's.
    """
    sizes = {key: stored_bytes(key, shape) for key, shape in shapes.items()}
    total = sum(sizes.values())
    shards = _split(sizes, shard_bytes)
    weight_map: dict[str, str] = {}
    done = 0
    for number, keys in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(keys, name)
        ordered = sorted(keys, key=lambda key: (not _float32(key), key))
        for key in _write_shard(folder / name, {key: shapes[key] for key in ordered}, scaling, seed, metadata):
            done += sizes[key]
            if progress is not None:
                progress(key, done, total)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write_shard(
    path: Path, shapes: Mapping[str, tuple[int, ...]], scaling: Scaling, seed: int, metadata: bool
) -> Iterator[str]:
    """Write one shard; yields the keys, in order, as they are written. Tensors are drawn in two threads."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}} if metadata else {}
    offsets, end = {}, 0
    for key, shape in shapes.items():
        offsets[key], size = end, stored_bytes(key, shape)
        end += size
        header[key] = {"dtype": "F32" if _float32(key) else "BF16", "shape": shape, "data_offsets": [offsets[key], end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded)
    with ThreadPoolExecutor(_THREADS) as pool:

        def write(key: str) -> str:
            with path.open("r+b") as file:
                file.seek(8 + len(encoded) + offsets[key])
                for block in tensor_blocks(key, shapes[key], plan_tensor(key, shapes[key], scaling), seed):
                    file.write(_stored(key, block).reshape(-1).view(np.uint8).data)
            return key

        try:
            yield from pool.map(write, shapes)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _stored(key: str, block: NDArray[np.float32]) -> NDArray[Any]:
    import ml_dtypes

    return block if _float32(key) else block.astype(ml_dtypes.bfloat16)
