"""The omniport runtime: text and speech from an exported bundle, with numpy, tokenizers and msgspec only.

Names are loaded on first use, so that ``import omniport.runtime`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import (
        BackendError,
        BundleError,
        CheckFailed,
        CheckpointError,
        ExportError,
        MediaError,
        OmniportError,
        PromptError,
        PromptTooLong,
        TurnEnded,
        UnknownVoice,
        UsageError,
        UserError,
    )
    from .events import AudioChunk, Done, Event, Stats, TextDelta, TurnsDropped
    from .manifest import SamplingConfig
    from .session import OmniSession
    from .token2wav import SpeechWindows
    from .turn import Turn

__all__ = [
    "AudioChunk",
    "BackendError",
    "BundleError",
    "CheckFailed",
    "CheckpointError",
    "Done",
    "Event",
    "ExportError",
    "MediaError",
    "OmniSession",
    "OmniportError",
    "PromptError",
    "PromptTooLong",
    "SamplingConfig",
    "SpeechWindows",
    "Stats",
    "TextDelta",
    "Turn",
    "TurnEnded",
    "TurnsDropped",
    "UnknownVoice",
    "UsageError",
    "UserError",
]

_HOME = {
    "OmniSession": "session",
    "SamplingConfig": "manifest",
    "SpeechWindows": "token2wav",
    "Turn": "turn",
} | dict.fromkeys(("AudioChunk", "Done", "Event", "Stats", "TextDelta", "TurnsDropped"), "events")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME.get(name, 'errors')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
