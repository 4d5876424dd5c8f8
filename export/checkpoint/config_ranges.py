"""Ranges of the numbers in config.json: a damaged or hostile file must not ask for endless layers or memory.

They are far beyond any published model. What the numbers mean together is checked where they meet the weights' shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from omniport.runtime.errors import CheckpointError

_LAYERS, _WIDTH, _IDS = (0, 1024), (1, 1 << 17), (1, 1 << 24)
#: field -> least and most; the others are numbers of 31 bits
_RANGES: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("num_hidden_layers", "encoder_layers", "num_layers", "depth", "max_window_layers"), _LAYERS),
    **dict.fromkeys(
        ("hidden_size", "d_model", "embed_dim", "embedding_size", "dim", "output_dim", "out_hidden_size"), _WIDTH
    ),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "mlp_dim"), (1, 1 << 20)),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads", "heads", "head_dim"), (1, 4096)),
    **dict.fromkeys(("vocab_size", "num_embeds", "max_position_embeddings"), _IDS),
    "max_source_positions": (1, 1 << 14),
    "rope_theta": (1, 1e12),
}
_DEFAULT = (-(2.0**31), 2.0**31)
_MOST_ITEMS = 4096
_MOST_DEPTH = 32


def check_numbers(raw: Mapping[str, Any]) -> None:
    """Check every number of config.json's object.

    Raises:
        CheckpointError: one is outside its range, or a list has no end; names the field.
    """
    for problem in _problems(raw, "", "", 0):
        raise CheckpointError(f"config.json: {problem}. Download the file again.")


def _problems(value: Any, where: str, field: str, depth: int) -> Iterator[str]:
    if depth > _MOST_DEPTH:
        yield f"{where[:200]} is nested more than {_MOST_DEPTH} deep"
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _problems(inner, f"{where}.{key}" if where else str(key), str(key), depth + 1)
    elif isinstance(value, list):
        if len(value) > _MOST_ITEMS:
            yield f"{where} has {len(value)} items; at most {_MOST_ITEMS} were expected"
            return
        for inner in value:
            yield from _problems(inner, where, field, depth + 1)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        least, most = _RANGES.get(field, _DEFAULT)
        if not math.isfinite(value) or not least <= value <= most:
            yield f"{where} is {str(value)[:40]}; {least:g} to {most:g} was expected"
