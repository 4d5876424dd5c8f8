"""Tokens of a reply, as OpenAI's clients read them."""

from __future__ import annotations

from typing import Any

from omniport.runtime import Stats


def chat_usage(stats: Stats) -> dict[str, Any]:
    """Of a chat; completion tokens are those of the text and of the speech."""
    used = stats.usage
    completion = used.text + used.codec
    prompt = used.prompt
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": stats.prompt_tokens + completion,
        "prompt_tokens_details": {
            "text_tokens": prompt.text,
            "audio_tokens": prompt.audio,
            "image_tokens": prompt.image + prompt.video,
            "cached_tokens": stats.reused_tokens,
        },
        "completion_tokens_details": {
            "text_tokens": used.text,
            "audio_tokens": used.codec,
            "reasoning_tokens": 0,
        },
    }


def token_usage(stats: Stats) -> dict[str, Any]:
    """Of speech and transcriptions."""
    used = stats.usage
    output = used.text + used.codec
    return {
        "type": "tokens",
        "input_tokens": stats.prompt_tokens,
        "input_token_details": {"text_tokens": used.prompt.text, "audio_tokens": used.prompt.audio},
        "output_tokens": output,
        "total_tokens": stats.prompt_tokens + output,
    }
