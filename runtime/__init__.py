"""The omniport runtime: text and speech from an exported bundle, with numpy, tokenizers and msgspec only.

Names are loaded on first use, so that ``import omniport.runtime`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dialogue import Dialogue, TurnBegan, TurnCommitted
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
    from .hands_free import HandsFree
    from .manifest import SamplingConfig
    from .session import OmniSession
    from .token2wav import SpeechWindows
    from .turn import Turn
    from .vad import SpeechLimits

__all__ = [
    "AudioChunk",
    "BackendError",
    "BundleError",
    "CheckFailed",
    "CheckpointError",
    "Dialogue",
    "Done",
    "Event",
    "ExportError",
    "HandsFree",
    "MediaError",
    "OmniSession",
    "OmniportError",
    "PromptError",
    "PromptTooLong",
    "SamplingConfig",
    "SpeechLimits",
    "SpeechWindows",
    "Stats",
    "TextDelta",
    "Turn",
    "TurnBegan",
    "TurnCommitted",
    "TurnEnded",
    "TurnsDropped",
    "UnknownVoice",
    "UsageError",
    "UserError",
]

_HOME = {
    "Dialogue": "dialogue",
    "HandsFree": "hands_free",
    "OmniSession": "session",
    "SamplingConfig": "manifest",
    "SpeechLimits": "vad",
    "SpeechWindows": "token2wav",
    "Turn": "turn",
    "TurnBegan": "dialogue",
    "TurnCommitted": "dialogue",
} | dict.fromkeys(("AudioChunk", "Done", "Event", "Stats", "TextDelta", "TurnsDropped"), "events")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME.get(name, 'errors')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
