"""What the server can do, in Wyoming's words."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from wyoming.info import (
    AsrModel,
    AsrProgram,
    Attribution,
    HandleModel,
    HandleProgram,
    Info,
    TtsProgram,
    TtsVoice,
)

from ..service import Service

#: those that the thinker was taught, and those that the talker was: Home Assistant picks by language
_WRITTEN = ["ar", "de", "en", "es", "fr", "it", "ja", "ko", "pt", "ru", "th", "vi", "zh"]
_SPOKEN = ["en", "zh"]


def described(service: Service) -> Info:
    """Of what the bundle has: hearing, answering, speaking."""
    manifest = service.session.manifest
    source = manifest.source.name
    program: dict[str, Any] = {
        "name": "omniport",
        "attribution": Attribution("omniport", ""),
        "installed": True,
        "description": f"{service.model}, served by omniport",
        "version": version("omniport"),
    }
    model: dict[str, Any] = {
        **program,
        "name": service.model,
        "attribution": Attribution(source, f"https://huggingface.co/{source}"),
        "description": service.model,
        "version": service.fingerprint,
    }
    info = Info(
        handle=[
            HandleProgram(**program, models=[HandleModel(**model, languages=_WRITTEN)], supports_handled_streaming=True)
        ]
    )
    if "audio_encoder" in manifest.graphs:
        models = [AsrModel(**model, languages=_WRITTEN)]
        info.asr = [AsrProgram(**program, models=models, supports_transcript_streaming=True)]
    if manifest.dit is not None:
        voices = [
            TtsVoice(**{**model, "name": name, "description": name}, languages=_SPOKEN) for name in service.voice_names
        ]
        info.tts = [TtsProgram(**program, voices=voices, supports_synthesize_streaming=True)]
    return info
