"""The body of POST /v1/chat/completions: what is read, what is taken at its default only, what is refused."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from omniport.runtime import SamplingConfig
from omniport.runtime.bundle.manifest import Manifest
from omniport.runtime.speech.ode_methods import SolverChoice

from ..service import Service
from .answering import convert
from .api_errors import ApiError, invalid, unsupported

Positive = Annotated[int, Meta(ge=1)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
Share = Annotated[float, Meta(gt=0, le=1)]
Penalty = Annotated[float, Meta(gt=0, le=100)]

#: read by ``chat_messages``
_ROLES = ("system", "developer", "user", "assistant", "tool")
_Message = Annotated[
    dict[str, Any],
    Meta(extra_json_schema={"required": ["role"], "properties": {"role": {"enum": _ROLES}}}),
]
#: fields that only have their defaults, which change nothing
_AT_DEFAULT: Mapping[str, Any] = {
    "n": 1,
    "logprobs": False,
    "top_logprobs": 0,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "store": False,
    "parallel_tool_calls": True,
}
#: fields that say something to OpenAI's servers, and nothing about the reply
_OF_NO_EFFECT = frozenset(
    {
        "metadata",
        "user",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "reasoning_effort",
        "verbosity",
    }
)


class VoiceId(msgspec.Struct, frozen=True):
    """A voice, as OpenAI's newer clients name it."""

    id: str


class AudioOptions(msgspec.Struct, frozen=True):
    """How to speak."""

    voice: str | VoiceId | None = None
    format: Literal["wav", "pcm16", "flac", "mp3", "opus", "aac"] = "wav"


class StreamOptions(msgspec.Struct, frozen=True):
    """What a stream has besides."""

    include_usage: bool = False


class TalkerOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sampling of the speech; ours."""

    temperature: Temperature | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    top_p: Share | None = None
    repetition_penalty: Penalty | None = None
    max_tokens: Positive | None = None


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is read of the body; the fields after ``tool_choice`` are not OpenAI's."""

    messages: Annotated[list[_Message], Meta(extra_json_schema={"minItems": 1})]
    model: str | None = None
    modalities: tuple[Literal["text", "audio"], ...] = ("text",)
    audio: AudioOptions | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_completion_tokens: Positive | None = None
    max_tokens: Positive | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    seed: int | None = None
    stop: str | list[str] = []
    tools: list[dict[str, Any]] = []
    tool_choice: Annotated[str | dict[str, Any], Meta(extra_json_schema={"enum": ["auto", "none"]})] = "auto"
    top_k: Annotated[int, Meta(ge=0)] | None = None
    repetition_penalty: Penalty | None = None
    mm_processor_kwargs: dict[str, Any] = {}
    use_audio_in_video: bool | None = None
    talker: TalkerOptions = TalkerOptions()
    solver: SolverChoice = "auto"
    window: Literal["stream", "whole"] = "stream"

    @property
    def speak(self) -> bool:
        """Whether the reply is spoken."""
        return "audio" in self.modalities

    @property
    def hear_videos(self) -> bool:
        """Whether videos are heard, too."""
        given = self.mm_processor_kwargs.get("use_audio_in_video", False)
        return given is True if self.use_audio_in_video is None else self.use_audio_in_video


def parse(body: Mapping[str, Any]) -> ChatRequest:
    """The body, checked.

    Raises:
        ApiError: 400: a value that cannot be, or a parameter that there is not.
    """
    body = {name: value for name, value in body.items() if value is not None and name not in _OF_NO_EFFECT}
    known = set(ChatRequest.__struct_fields__)
    for name, value in list(body.items()):
        if name in _AT_DEFAULT and value == _AT_DEFAULT[name]:
            del body[name]
        elif name in _AT_DEFAULT:
            raise unsupported(name, f"{name} is {value!r:.100}; only {_AT_DEFAULT[name]!r} is supported")
        elif name == "response_format":
            _require_text(body.pop(name))
        elif name not in known:
            raise unsupported(name, f"there is no parameter {name!r:.100}")
    asked = convert(body, ChatRequest)
    if not asked.messages:
        raise invalid("there are no messages; at least one was expected", "messages")
    if asked.speak and asked.audio is None:
        raise invalid('modalities has "audio", so audio = {"voice", "format"} is required', "audio")
    if asked.tool_choice not in ("auto", "none"):
        raise unsupported("tool_choice", 'tool_choice is "auto" or "none"; a call cannot be forced')
    return asked


def beyond_the_record() -> dict[str, Any]:
    """JSON Schema of the fields that ``parse`` takes out."""
    fixed = {name: {"const": value} for name, value in _AT_DEFAULT.items()}
    text = {"type": "object", "required": ["type"], "properties": {"type": {"const": "text"}}}
    return {**fixed, **{name: {} for name in sorted(_OF_NO_EFFECT)}, "response_format": text}


def _require_text(format: object) -> None:
    if not isinstance(format, dict) or format.get("type") != "text":
        raise unsupported("response_format", 'response_format is {"type": "text"} only')


def reply_options(asked: ChatRequest, service: Service) -> dict[str, Any]:
    """Keyword arguments of ``OmniSession.turn``."""
    manifest = service.session.manifest
    options: dict[str, Any] = {
        "speak": asked.speak,
        "thinker": _sampling(
            manifest.thinker_sampling,
            max_new_tokens=asked.max_completion_tokens or asked.max_tokens,
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k,
            repetition_penalty=asked.repetition_penalty,
        ),
        "seed": seed_of(asked.seed),
        "stop": asked.stop,
    }
    if asked.speak:
        options |= {
            "voice": voice_of(service, asked.audio.voice if asked.audio is not None else None, "audio.voice"),
            "talker": talker_sampling(manifest, asked.talker),
            "solver": asked.solver,
            "window": asked.window,
        }
    return options


def talker_sampling(manifest: Manifest, asked: TalkerOptions) -> SamplingConfig | None:
    """The talker's; None for a bundle that cannot speak."""
    if manifest.talker_sampling is None:
        return None
    changes = msgspec.structs.asdict(asked)
    return _sampling(manifest.talker_sampling, max_new_tokens=changes.pop("max_tokens"), **changes)


def voice_of(service: Service, asked: str | VoiceId | None, param: str) -> str | None:
    """The bundle's voice for what a request asks for by ``param``; None is its default.

    Raises:
        ApiError: 400: there is no such voice.
    """
    voice = service.voice(asked.id if isinstance(asked, VoiceId) else asked)
    if voice is not None and voice not in service.voice_names and service.voice_names:
        known = ", ".join(sorted(service.voice_names))
        raise ApiError(400, "voice_not_found", f"there is no voice {voice!r:.100}; known voices: {known}", param=param)
    return voice


def seed_of(asked: int | None) -> int:
    """The runtime's seed; OpenAI's may be negative, or left to chance."""
    return secrets.randbits(32) if asked is None else asked & ((1 << 64) - 1)


def _sampling(base: SamplingConfig, **changes: Any) -> SamplingConfig:
    return msgspec.structs.replace(base, **{name: value for name, value in changes.items() if value is not None})
