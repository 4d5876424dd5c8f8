"""Events in the words of clients that know the protocol's earlier form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Dialect = Literal["ga", "beta"]
_NAMES = {
    "response.output_audio.delta": "response.audio.delta",
    "response.output_audio.done": "response.audio.done",
    "response.output_audio_transcript.delta": "response.audio_transcript.delta",
    "response.output_audio_transcript.done": "response.audio_transcript.done",
    "response.output_text.delta": "response.text.delta",
    "response.output_text.done": "response.text.done",
    "conversation.item.added": "conversation.item.created",
}
_CONTENT = {"output_text": "text", "output_audio": "audio"}
_FORMATS = {
    "pcm16": "audio/pcm",
    "pcm24": "audio/pcm",
    "pcm": "audio/pcm",
    "wav": "audio/pcm",
    "g711_ulaw": "audio/pcmu",
    "g711_alaw": "audio/pcma",
}
_FORMAT_NAMES = {"audio/pcm": "pcm16", "audio/pcmu": "g711_ulaw", "audio/pcma": "g711_alaw"}
#: fields of a session or a response by which the earlier form is known
_OURS = frozenset(
    (
        "modalities",
        "voice",
        "input_audio_format",
        "output_audio_format",
        "turn_detection",
        "input_audio_transcription",
        "max_response_output_tokens",
    )
)


def is_beta(fields: Mapping[str, Any]) -> bool:
    """Whether a session or a response is written in the earlier form."""
    return "type" not in fields and not _OURS.isdisjoint(fields)


def as_ga(fields: Mapping[str, Any], heard_rate: int = 24000) -> dict[str, Any]:
    """A session or a response of the earlier form, in today's; anything else as it is.

    Args:
        heard_rate: Hz of sound that comes as ``pcm16``; DashScope's is 16000.
    """
    if not is_beta(fields):
        return dict(fields)
    known = {name: value for name, value in fields.items() if name not in _OURS}
    if "modalities" in fields:
        known["output_modalities"] = fields["modalities"]
    if "max_response_output_tokens" in fields:
        known["max_output_tokens"] = fields["max_response_output_tokens"]
    heard = {"turn_detection": "turn_detection", "input_audio_transcription": "transcription"}
    taken = {ours: fields[theirs] for theirs, ours in heard.items() if theirs in fields}
    taken |= _format(fields, "input", heard_rate)
    given = {"voice": fields["voice"]} if "voice" in fields else {}
    given |= _format(fields, "output", 24000)
    return {**known, "audio": {"input": taken, "output": given}}


def translated(event: Mapping[str, Any]) -> dict[str, Any] | None:
    """A server's event in the earlier form; None where that has none."""
    kind = event["type"]
    if kind == "conversation.item.done":
        return None
    made = {**event, "type": _NAMES.get(kind, kind)}
    if "item" in made:
        made["item"] = _item(made["item"])
    if "response" in made:
        made["response"] = _response(made["response"])
    if "session" in made:
        made["session"] = _session(made["session"])
    return made


def _format(fields: Mapping[str, Any], side: str, rate: int) -> dict[str, Any]:
    """By its name, or as DashScope's newer clients write it, with a ``sample_rate``."""
    name = fields.get(f"{side}_audio_format")
    if name is None:
        audio = fields.get("audio")
        held = audio.get(side) if isinstance(audio, dict) else None
        written = held.get("format") if isinstance(held, dict) else None
        if not isinstance(written, dict):
            return {}
        name, rate = written.get("type"), written.get("sample_rate", rate)
    return {"format": {"type": _FORMATS.get(name, name) if isinstance(name, str) else name, "rate": rate}}


def _item(item: Mapping[str, Any]) -> dict[str, Any]:
    if "content" not in item:
        return dict(item)
    content = [{**part, "type": _CONTENT.get(part["type"], part["type"])} for part in item["content"]]
    return {**item, "content": content}


def _response(response: Mapping[str, Any]) -> dict[str, Any]:
    made, sound = dict(response), response["audio"]["output"]
    del made["audio"]
    return {
        **made,
        "output": [_item(item) for item in response["output"]],
        "modalities": _modalities(made.pop("output_modalities")),
        "voice": sound["voice"],
        "output_audio_format": _FORMAT_NAMES[sound["format"]["type"]],
    }


def _session(session: Mapping[str, Any]) -> dict[str, Any]:
    heard, said = session["audio"]["input"], session["audio"]["output"]
    return {
        "id": session["id"],
        "object": "realtime.session",
        "model": session["model"],
        "expires_at": session["expires_at"],
        "modalities": _modalities(session["output_modalities"]),
        "instructions": session["instructions"],
        "voice": said["voice"],
        "input_audio_format": _FORMAT_NAMES[heard["format"]["type"]],
        "output_audio_format": _FORMAT_NAMES[said["format"]["type"]],
        "input_audio_transcription": heard["transcription"],
        "turn_detection": heard["turn_detection"],
        "tools": session["tools"],
        "tool_choice": session["tool_choice"],
        "temperature": session["temperature"],
        "max_response_output_tokens": session["max_output_tokens"],
        "omniport": session["omniport"],
    }


def _modalities(given: list[str]) -> list[str]:
    return ["text", "audio"] if "audio" in given else ["text"]
