"""The omniport runtime: text and speech from an exported bundle, with numpy, tokenizers and msgspec only.

Names are loaded on first use, so that ``import omniport.runtime`` costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .system.lazy_names import lazy_names

if TYPE_CHECKING:
    from .bundle.manifest import SamplingConfig
    from .errors import (
        BackendError,
        BundleError,
        Busy,
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
    from .events import (
        AudioChunk,
        Done,
        Event,
        Stats,
        TextDelta,
        TokenCounts,
        ToolCall,
        ToolCallDelta,
        TurnsDropped,
        Usage,
    )
    from .items import ConversationItem, ConversationItems
    from .live.dialogue import Dialogue, TurnBegan, TurnCommitted
    from .live.echo import EchoCanceller
    from .live.hands_free import HandsFree
    from .live.vad import SpeechLimits
    from .session import OmniSession
    from .speech.windows import SpeechWindows
    from .turn import Turn

__all__ = [
    "AudioChunk",
    "BackendError",
    "BundleError",
    "Busy",
    "CheckFailed",
    "CheckpointError",
    "ConversationItem",
    "ConversationItems",
    "Dialogue",
    "Done",
    "EchoCanceller",
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
    "TokenCounts",
    "ToolCall",
    "ToolCallDelta",
    "Turn",
    "TurnBegan",
    "TurnCommitted",
    "TurnEnded",
    "TurnsDropped",
    "UnknownVoice",
    "Usage",
    "UsageError",
    "UserError",
]

_MODULES = {
    ".bundle.manifest": ("SamplingConfig",),
    ".errors": (
        "BackendError",
        "BundleError",
        "Busy",
        "CheckFailed",
        "CheckpointError",
        "ExportError",
        "MediaError",
        "OmniportError",
        "PromptError",
        "PromptTooLong",
        "TurnEnded",
        "UnknownVoice",
        "UsageError",
        "UserError",
    ),
    ".events": (
        "AudioChunk",
        "Done",
        "Event",
        "Stats",
        "TextDelta",
        "TokenCounts",
        "ToolCall",
        "ToolCallDelta",
        "TurnsDropped",
        "Usage",
    ),
    ".items": ("ConversationItem", "ConversationItems"),
    ".live.dialogue": ("Dialogue", "TurnBegan", "TurnCommitted"),
    ".live.echo": ("EchoCanceller",),
    ".live.hands_free": ("HandsFree",),
    ".live.vad": ("SpeechLimits",),
    ".session": ("OmniSession",),
    ".speech.windows": ("SpeechWindows",),
    ".turn": ("Turn",),
}

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
