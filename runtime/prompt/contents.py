"""Read a message's content back from its tokens: its text, and which media stand where."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import Manifest
from .chat_template import end_of_reply
from .tokenizer import TextCodec


def content_of(ids: NDArray[np.int64], role: str, manifest: Manifest, codec: TextCodec) -> list[dict[str, Any]]:
    """Parts of a message, in order.

    Args:
        ids: int64 [S], the whole message with what the chat template sets around it.

    Returns:
        ``{"type": "text", "text": T}`` for text, ``{"type": KIND, "tokens": N}`` for an audio, image or video; a video
        with sound also has ``audio_tokens``.
    """
    tokens = manifest.tokens
    control = set(msgspec.structs.asdict(tokens).values())
    kinds = {tokens.audio: "audio", tokens.image: "image", tokens.video: "video"}
    parts: list[dict[str, Any]] = []
    text: list[int] = []
    listed = [int(token) for token in ids[: len(ids) - len(end_of_reply(manifest, codec))]]
    for before, token in zip([-1, *listed], listed, strict=False):
        if token not in control:
            text.append(token)
            continue
        if text:
            parts.append({"type": "text", "text": codec.decode(text)})
            text = []
        if token in (tokens.audio_bos, tokens.vision_bos) and before != tokens.vision_bos:
            parts.append({"type": "audio", "tokens": 0})
        elif token in kinds and parts and "tokens" in parts[-1]:  # a reply may hold such a token without a medium
            _count(parts[-1], kinds[token])
    if text:
        parts.append({"type": "text", "text": codec.decode(text)})
    parts[0]["text"] = parts[0]["text"].removeprefix(f"{role}\n")  # which the template sets before it
    return parts if parts[0]["text"] else parts[1:]


def _count(part: dict[str, Any], kind: str) -> None:
    """One token more of this kind in a medium, which is a video if any of its tokens is."""
    if kind == "audio" and part["type"] == "video":
        part["audio_tokens"] = part.get("audio_tokens", 0) + 1
        return
    if kind == "video" and part["type"] == "audio" and part["tokens"]:  # the sound came first
        part["audio_tokens"], part["tokens"] = part["tokens"], 0
    part["type"] = kind
    part["tokens"] += 1
