"""Tokens of a reply, as the Realtime protocol counts them."""

from __future__ import annotations

from typing import Any

from omniport.runtime import Stats
from omniport.runtime.events import TokenCounts


def response_usage(stats: Stats | None) -> dict[str, Any]:
    """Of a response; zeros for one that was never made."""
    stats = Stats() if stats is None else stats
    used = stats.usage
    given, made = stats.prompt_tokens, used.text + used.codec
    cached = _counts(used.cached)
    return {
        "total_tokens": given + made,
        "input_tokens": given,
        "output_tokens": made,
        "input_token_details": {
            **_counts(used.prompt),
            "cached_tokens": sum(cached.values()),
            "cached_tokens_details": cached,
        },
        "output_token_details": {"text_tokens": used.text, "audio_tokens": used.codec},
    }


def _counts(counts: TokenCounts) -> dict[str, int]:
    return {
        "text_tokens": counts.text,
        "audio_tokens": counts.audio,
        "image_tokens": counts.image + counts.video,
    }
