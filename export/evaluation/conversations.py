"""Conversations for validation: built-in ones, drawn and synthesised, or those of the user's file.

Each medium has two forms: the source that omniport reads (a file or an array), and its decoded content, which the
reference's processors read. For built-in conversations the content is known, so decoding is checked too; for the
user's files omniport's own decoders supply it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray
from omniport.runtime.bundle.manifest import Manifest
from omniport.runtime.bundle.parts import decoders, encoder_of
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import OmniportError, UsageError
from omniport.runtime.events import Event
from omniport.runtime.media.audio import load_audio
from omniport.runtime.media.image import load_image
from omniport.runtime.media.log_mel import audio_tokens
from omniport.runtime.media.source import is_url, require
from omniport.runtime.media.video import load_video
from omniport.runtime.prompt.builder import build_prompt
from omniport.runtime.prompt.chat_template import BESIDE
from omniport.runtime.prompt.messages import vision_limits
from omniport.runtime.prompt.tokenizer import TextCodec
from omniport.runtime.session import OmniSession
from omniport.runtime.speech.windows import SpeechWindows
from omniport.runtime.system.files import read_text

from ..checkpoint.frontends import SPEECH_PROMPT
from ..models.signals import RATE, picture, voice

_FPS = 2.0


@dataclass(frozen=True, eq=False)
class Film:
    """A decoded video: frames uint8 [F, H, W, 3], seconds of a temporal patch, sound float32 [n] at 16 kHz or None."""

    frames: NDArray[np.uint8]
    second_per_grid: float
    sound: NDArray[np.float32] | None


@dataclass(frozen=True, eq=False)
class Medium:
    """One medium of a conversation.

    Attributes:
        source: what omniport is given.
        decoded: float32 [n] at 16 kHz, uint8 [H, W, 3], or a `Film`.
        heard: video only: its sound is part of the prompt.
        bounds: of pixels and frames, as the part states them.
    """

    kind: str
    source: Any
    decoded: Any
    heard: bool = False
    bounds: Mapping[str, Any] = field(default_factory=dict)


Part = str | Medium


@dataclass(frozen=True, eq=False)
class Conversation:
    """Turns of (role, parts). ``where`` names the user's file and line, empty for built-in conversations."""

    name: str
    turns: tuple[tuple[str, tuple[Part, ...]], ...]
    where: str = ""

    @property
    def media(self) -> list[Medium]:
        """In order of appearance."""
        return [part for _, parts in self.turns for part in parts if isinstance(part, Medium)]

    @property
    def heard(self) -> bool:
        """Whether the sound of a video is part of the prompt."""
        return any(medium.heard for medium in self.media)

    @property
    def unsupported(self) -> str:
        """Why the reference cannot process this conversation; empty if it can."""
        if len({medium.heard for medium in self.media if medium.kind == "video"}) > 1:
            return (
                "the reference has one use_audio_in_video switch for a whole prompt; this conversation has videos with "
                "and without sound"
            )
        if any(vision_limits(medium.bounds, self.where).sets_size for medium in self.media):
            return "transformers' processors bound no single picture or video; leave its bounds out to compare"
        return ""

    def messages(self) -> list[dict[str, Any]]:
        """As omniport takes them."""
        return [{"role": role, "content": [_ours(part) for part in parts]} for role, parts in self.turns]

    def decoded(self, speaks: bool = True) -> list[dict[str, Any]]:
        """As the reference takes them: media decoded, a model that ``speaks`` is given the speech prompt.

        It is put in where no system message is; for other models the chat template may put in its own.
        """
        given = self.turns[0][0] == "system" or not speaks
        turns = self.turns if given else (("system", (SPEECH_PROMPT,)), *self.turns)
        return [{"role": role, "content": [_theirs(part) for part in parts]} for role, parts in turns]


def _ours(part: Part) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": part.kind, part.kind: part.source, **part.bounds} | ({"use_audio": True} if part.heard else {})


def _theirs(part: Part) -> dict[str, Any]:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": part.kind, part.kind: part.decoded}


def standard_conversations(folder: Path, names: Sequence[str] | None = None) -> list[Conversation]:
    """One conversation for each modality, and two that mix them; clips are written to ``folder``.

    Args:
        names: those to make (all if None): text, turns, audio, image, video, video with sound, audio and image, mixed.
    """

    def one(*parts: Part) -> tuple[tuple[str, tuple[Part, ...]], ...]:
        return (("user", parts),)

    makers: dict[str, Callable[[], tuple[tuple[str, tuple[Part, ...]], ...]]] = {
        "text": lambda: one("What can you tell me about the sea?"),
        "turns": lambda: (
            ("user", ("Hello!",)),
            ("assistant", ("Hello. How are you?",)),
            ("user", ("Bien, \u0924\u0941\u092e? \u4f60\u597d \U0001f469\u200d\U0001f467",)),
        ),
        "audio": lambda: one(_sound(4.33), "What do you hear?"),
        "image": lambda: one(_still(97, 201), "What is this?"),
        "video": lambda: one(film(folder, 2.5), "What happens?"),
        "video with sound": lambda: one(film(folder, 3.0, heard=2.9), "What happens?"),
        "audio and image": lambda: one(_sound(1.37), _still(140, 84), "What is said about this?"),
        "mixed": lambda: one(
            "First ", _sound(1.3, 1.0), _still(90, 180), film(folder, 2.0, heard=2.0), _sound(0.6, 2.0), "Describe all."
        ),
    }
    return [Conversation(name, makers[name]()) for name in (makers if names is None else names)]


def film(folder: Path, seconds: float, heard: float | None = None, size: tuple[int, int] = (84, 112)) -> Medium:
    """A disc that moves, at 10 frames a second in lossless codecs, with ``heard`` seconds of sound if given."""
    av = require("av")
    fps, (height, width) = 10, size
    frames = [picture(height, width, i / (seconds * fps)) for i in range(round(seconds * fps))]
    samples = None if heard is None else np.round(voice(heard) * 32767).astype(np.int16)
    path = folder / f"film-{seconds}-{heard}-{height}x{width}.mkv"
    with av.open(str(path), "w") as out:
        track: Any = out.add_stream("ffv1", rate=fps)
        track.height, track.width, track.pix_fmt = height, width, "bgr0"
        sound: Any = None if samples is None else out.add_stream("pcm_s16le", rate=RATE, layout="mono")
        for frame in frames:
            out.mux(track.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(track.encode())
        if samples is not None:
            block = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
            block.sample_rate, block.pts, block.time_base = RATE, 0, Fraction(1, RATE)
            out.mux(sound.encode(block))
            out.mux(sound.encode())
    inside = None if samples is None else samples.astype(np.float32) / np.float32(32768)
    count = max(4, int(seconds * _FPS) // 2 * 2)  # as Qwen's tool chooses frames
    shown = np.stack([frames[round(k)] for k in np.linspace(0, len(frames) - 1, count)])
    return Medium("video", path, Film(shown, 2 / _FPS, inside), inside is not None, {"fps": _FPS, "max_frames": 768})


def _sound(seconds: float, skip: float = 0.0) -> Medium:
    """Voice-like sound without its first ``skip`` seconds, so that two clips of a prompt differ."""
    samples = voice(skip + seconds)[round(skip * RATE) :]
    return Medium("audio", (samples, RATE), samples)


def _still(height: int, width: int) -> Medium:
    pixels = picture(height, width)
    return Medium("image", pixels, pixels)


def session_conversations(
    session: OmniSession, data: str | os.PathLike[str] | None, folder: Path, names: Sequence[str] | None = None
) -> list[Conversation]:
    """Those of the user's file, or, without one, the built-in ones that a session's bundle has encoders for.

    Args:
        folder, names: as in `standard_conversations`.

    Raises:
        UsageError: ``data`` is not usable (names the line).
    """
    if data is not None:
        return read_conversations(Path(data), session.manifest, session.text_codec)
    graphs = session.manifest.graphs
    return [
        conversation
        for conversation in standard_conversations(folder, names)
        if all(encoder_of(medium.kind).name in graphs for medium in conversation.media)
        and (not conversation.heard or encoder_of("audio").name in graphs)
    ]


def require_writer(bundle: Bundle) -> None:
    """Raises:
    UsageError: the bundle lacks the graph that writes, so that it cannot answer.
    """
    if (writer := decoders()[0].name) not in bundle.manifest.graphs:
        raise UsageError(f"{bundle.root} has no {writer}, so that it cannot answer: export it without --graphs")


def short_reply(
    session: OmniSession, conversation: Conversation, max_new_tokens: int, max_codes: int, threads: bool = True
) -> Iterator[Event]:
    """The events of a reply of the likeliest tokens, cut short, and spoken if the bundle speaks."""
    manifest = session.manifest
    thinker = replace(manifest.thinker_sampling, temperature=0.0, max_new_tokens=max_new_tokens)
    talker = manifest.talker_sampling
    if talker is not None:
        talker = replace(talker, max_new_tokens=max_codes)
    messages, window = conversation.messages(), SpeechWindows()  # the same windows however slow the machine is
    yield from session.reply(
        messages, speak=manifest.speaks, thinker=thinker, talker=talker, window=window, threads=threads
    )


def read_conversations(path: Path, manifest: Manifest, codec: TextCodec) -> list[Conversation]:
    """The user's conversations: one JSON object a line, with ``messages`` as ``OmniSession.reply`` takes them.

    Media are paths, relative ones from the file's folder. Every prompt is laid out once, so that bad input is found
    before anything is computed.

    Raises:
        UsageError: names the file and the line, and says what is wrong there.
    """
    conversations = []
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        try:
            # the reply that a file for calibration may hold is not needed here
            messages = parse_entry(line, path.parent, optional=("reply",))["messages"]
            build_prompt(messages, manifest, codec)
            conversations.append(_conversation(messages, manifest, f"{path.name}:{number}", where))
        except (ValueError, OmniportError) as error:
            raise UsageError(f"{where}: {error}") from error
    if not conversations:
        raise UsageError(f'{path} holds no conversation; at least one line with "messages" was expected')
    return conversations


def read_lines(path: Path) -> list[tuple[int, str]]:
    """(number, line) of every line of a file that holds anything.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        # a string in JSON may hold what str.splitlines() takes for the end of a line
        lines = read_text(path).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read {path}: {error}. A UTF-8 file with one JSON object a line was expected"
        ) from error
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def parse_entry(line: str, folder: Path, optional: Sequence[str] = ()) -> dict[str, Any]:
    """The object of one line: ``messages``, their media's paths made absolute, and what else it may hold.

    Raises:
        ValueError: it is something else.
    """
    try:
        entry = json.loads(line)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(entry, dict) or not {"messages"} <= set(entry) <= {"messages", *optional}:
        found = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        more = f", and {', '.join(optional)} if wanted," if optional else ""
        raise ValueError(f'found {found}; one object with the key "messages"{more} was expected')
    for message in entry["messages"] if isinstance(entry["messages"], list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else []:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in ("audio", "image", "video") and isinstance(part.get(kind), str):
                part[kind] = part[kind] if is_url(part[kind]) else str(folder / part[kind])
    return entry


def _conversation(messages: Sequence[Mapping[str, Any]], manifest: Manifest, name: str, where: str) -> Conversation:
    """Messages that ``build_prompt`` has accepted, with their media decoded."""

    def decode(part: Mapping[str, Any]) -> Part:
        kind = str(part["type"])
        value = part[kind]
        bounds = {key: part[key] for key in part if key not in ("type", kind, "use_audio") and part[key] is not None}
        if kind == "text":
            return str(value)
        if kind == "audio":
            return Medium(kind, value, load_audio(value, manifest.audio.sampling_rate))
        if kind == "image":
            return Medium(kind, value, load_image(value), bounds=bounds)
        limits = vision_limits(bounds, where)
        clip = load_video(value, manifest.vision, with_audio=bool(part.get("use_audio", False)), limits=limits)
        frames = 0 if clip.audio is None else -(-len(clip.audio) // manifest.audio.hop_length)
        heard = audio_tokens(frames) > 0
        sound: NDArray[np.float32] | None = None if clip.audio is None or not heard else clip.audio.astype(np.float32)
        return Medium(kind, value, Film(clip.frames, clip.second_per_grid, sound), heard, bounds)

    turns = []
    for message in messages:
        content = message["content"]
        parts = (content,) if isinstance(content, str) else tuple(decode(part) for part in content)
        turns.append((str(message["role"]), parts))
    if turns[0][0] == "developer" and manifest.chat.system_prompt:
        turns[0] = ("system", (manifest.chat.system_prompt + BESIDE, *turns[0][1]))
    named = ((role.replace("developer", "system"), parts) for role, parts in turns)  # the reference knows no other
    return Conversation(name, tuple(named), where)
