"""The omniport runtime: text and speech from an exported bundle, with numpy, tokenizers and msgspec only.

Names are loaded on first use, so that ``import omniport.runtime`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bundle.manifest import SamplingConfig
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
    from .live.dialogue import Dialogue, TurnBegan, TurnCommitted
    from .live.hands_free import HandsFree
    from .live.vad import SpeechLimits
    from .session import OmniSession
    from .speech.windows import SpeechWindows
    from .turn import Turn

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
    "Dialogue": "live.dialogue",
    "HandsFree": "live.hands_free",
    "OmniSession": "session",
    "SamplingConfig": "bundle.manifest",
    "SpeechLimits": "live.vad",
    "SpeechWindows": "speech.windows",
    "Turn": "turn",
    "TurnBegan": "live.dialogue",
    "TurnCommitted": "live.dialogue",
} | dict.fromkeys(("AudioChunk", "Done", "Event", "Stats", "TextDelta", "TurnsDropped"), "events")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME.get(name, 'errors')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
