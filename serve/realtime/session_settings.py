"""A session's settings: as clients write them, as they are read back, as the runtime takes them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from ..http.api_errors import ApiError, invalid, unsupported
from ..service import Service
from .wire.client_events import convert
from .wire.wire_sound import WireFormat

Modality = Literal["text", "audio"]
#: silence that ends a turn, ms, for each eagerness: there is no model that hears whether a sentence is complete
_EAGERNESS = {"high": 300.0, "medium": 600.0, "auto": 600.0, "low": 1200.0}
Milliseconds = Annotated[float, Meta(ge=0, le=10_000)]
IdleMilliseconds = Annotated[float, Meta(ge=1_000, le=30_000)]
_SERVER_VAD = ("threshold", "prefix_padding_ms", "silence_duration_ms", "idle_timeout_ms")


class TurnDetection(Struct, frozen=True, kw_only=True):
    """When a turn begins and ends by itself."""

    type: Literal["server_vad", "semantic_vad"] = "server_vad"
    threshold: Annotated[float, Meta(ge=0, le=1)] = 0.5
    prefix_padding_ms: Milliseconds = 300
    silence_duration_ms: Milliseconds = 500
    idle_timeout_ms: IdleMilliseconds | None = None
    eagerness: Literal["low", "medium", "high", "auto"] = "auto"
    create_response: bool = True
    interrupt_response: bool = True

    @property
    def silence_ms(self) -> float:
        """That ends a turn."""
        return self.silence_duration_ms if self.type == "server_vad" else _EAGERNESS[self.eagerness]

    def described(self) -> dict[str, Any]:
        """As OpenAI writes it: each type has fields of its own."""
        hidden = ("eagerness",) if self.type == "server_vad" else _SERVER_VAD
        return {name: value for name, value in msgspec.structs.asdict(self).items() if name not in hidden}


class _VoiceId(Struct):
    id: str


class _Input(Struct, kw_only=True):
    format: WireFormat | None = None
    transcription: dict[str, Any] | msgspec.UnsetType | None = msgspec.UNSET
    noise_reduction: dict[str, Any] | msgspec.UnsetType | None = msgspec.UNSET
    turn_detection: dict[str, Any] | Literal[False] | msgspec.UnsetType | None = msgspec.UNSET


class _Output(Struct, kw_only=True):
    format: WireFormat | None = None
    voice: str | _VoiceId | None = None


class _Audio(Struct, kw_only=True):
    input: _Input | None = None
    output: _Output | None = None


class _Extensions(Struct, kw_only=True):
    events: bool | None = None


class Asked(Struct, kw_only=True):
    """What a client asks for, of a session or of one response. What it leaves out, or sets to null, stays."""

    output_modalities: list[Modality] | None = None
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | Literal["inf"] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    audio: _Audio | None = None
    omniport: _Extensions | None = None


class SessionSettings(Struct, frozen=True, kw_only=True):
    """All settings. ``voice`` is a name of the bundle's, None without speech; ``extras``: events beyond OpenAI's."""

    speak: bool
    voice: str | None
    instructions: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: str | dict[str, Any] = "auto"
    max_output_tokens: int | Literal["inf"] = "inf"
    temperature: float | None = None
    input_format: WireFormat = WireFormat()
    output_format: WireFormat = WireFormat()
    transcription: dict[str, Any] | None = None
    noise_reduction: dict[str, Any] | None = None
    turn_detection: TurnDetection | None = None
    extras: bool = False

    @property
    def modalities(self) -> list[Modality]:
        """As OpenAI names them: sound comes with its transcript."""
        return ["audio" if self.speak else "text"]

    def updated(self, asked: Asked, service: Service, where: str = "session") -> SessionSettings:
        """With what a client asks for.

        Raises:
            ApiError: a value that cannot be.
        """
        changes: dict[str, Any] = {
            name: getattr(asked, name)
            for name in ("instructions", "tool_choice", "max_output_tokens", "temperature")
            if getattr(asked, name) is not None
        }
        if asked.output_modalities:
            changes["speak"] = "audio" in asked.output_modalities
            if changes["speak"] and not speaks(service):
                raise unsupported(f"{where}.output_modalities", "this model has no speech; ask for text")
        if asked.tools is not None:
            changes["tools"] = tuple(_tool(tool, f"{where}.tools[{i}]") for i, tool in enumerate(asked.tools))
        if asked.omniport is not None and asked.omniport.events is not None:
            changes["extras"] = asked.omniport.events
        audio = asked.audio or _Audio()
        self._output(audio.output or _Output(), changes, service, f"{where}.audio.output")
        self._input(audio.input or _Input(), changes, service, f"{where}.audio.input")
        return msgspec.structs.replace(self, **changes)

    def _output(self, output: _Output, changes: dict[str, Any], service: Service, where: str) -> None:
        if output.format is not None:
            changes["output_format"] = output.format.checked(f"{where}.format")
        if output.voice is not None and speaks(service):
            name = output.voice.id if isinstance(output.voice, _VoiceId) else output.voice
            changes["voice"] = service.session.bundle.find_voice(service.voice(name)).name

    def _input(self, given: _Input, changes: dict[str, Any], service: Service, where: str) -> None:
        if given.format is not None:
            changes["input_format"] = given.format.checked(f"{where}.format")
        if given.transcription is not msgspec.UNSET:
            named = given.transcription is not None and given.transcription.get("model") is not None
            changes["transcription"] = given.transcription if named and service.settings.transcribe == "after" else None
        if given.noise_reduction is not msgspec.UNSET:
            changes["noise_reduction"] = given.noise_reduction
        detection = given.turn_detection
        if detection is not msgspec.UNSET:
            changes["turn_detection"] = self._detection(detection or None, f"{where}.turn_detection")

    def _detection(self, given: Mapping[str, Any] | None, where: str) -> TurnDetection | None:
        if given is None:
            return None
        before = self.turn_detection
        same = before is not None and given.get("type", before.type) == before.type
        base = msgspec.structs.asdict(before) if before is not None and same else {}
        named = {name: value for name, value in given.items() if value is not None or name == "idle_timeout_ms"}
        return convert({**base, **named}, TurnDetection, where)

    def described(self) -> dict[str, Any]:
        """Their part of the session object."""
        detection = self.turn_detection
        return {
            "output_modalities": self.modalities,
            "instructions": self.instructions,
            "tools": list(self.tools),
            "tool_choice": self.tool_choice,
            "max_output_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "tracing": None,
            "truncation": "auto",
            "prompt": None,
            "include": None,
            "audio": {
                "input": {
                    "format": self.input_format.described(),
                    "transcription": self.transcription,
                    "noise_reduction": self.noise_reduction,
                    "turn_detection": None if detection is None else detection.described(),
                },
                "output": {"format": self.output_format.described(), "voice": self.voice, "speed": 1.0},
            },
        }

    def runtime_tools(self) -> list[dict[str, Any]]:
        """The tools that the model may call, as the runtime takes them."""
        if self.tool_choice == "none":
            return []
        return [{"type": "function", "function": {k: v for k, v in t.items() if k != "type"}} for t in self.tools]

    def reply_options(self, service: Service) -> dict[str, Any]:
        """Keyword arguments of ``OmniSession.turn``."""
        sampling = service.session.manifest.thinker_sampling
        if self.max_output_tokens != "inf":
            sampling = msgspec.structs.replace(sampling, max_new_tokens=self.max_output_tokens)
        if self.temperature is not None:
            sampling = msgspec.structs.replace(sampling, temperature=self.temperature)
        spoken = {"voice": self.voice} if self.speak else {}
        return {"speak": self.speak, "thinker": sampling, "seed": secrets.randbits(32), "solver": "auto", **spoken}


def speaks(service: Service) -> bool:
    """Whether the bundle has speech."""
    return service.session.manifest.dit is not None


def initial(service: Service, detection: TurnDetection | None) -> SessionSettings:
    """Those of a session that begins."""
    spoken = speaks(service)
    voice = service.session.bundle.find_voice(None).name if spoken else None
    return SessionSettings(speak=spoken, voice=voice, turn_detection=detection)


def _tool(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type", "function") != "function":
        raise unsupported(f"{where}.type", f"{where} is no function; only functions are supported")
    if not isinstance(tool.get("name"), str):
        raise invalid(f"{where}.name is no string", f"{where}.name")
    kept = {name: tool[name] for name in ("name", "description", "parameters") if tool.get(name) is not None}
    return {"type": "function", **kept}


def cannot_update_voice() -> ApiError:
    """A voice stays once it was heard."""
    return ApiError(400, "cannot_update_voice", "the voice cannot change once sound was sent", param="session.audio")
