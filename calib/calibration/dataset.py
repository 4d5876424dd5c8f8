"""Read calibration data: JSON lines of chat messages, each with an optional reply to force."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from omniport.export.evaluation.conversations import parse_entry, read_lines
from omniport.runtime.bundle.listed_files import sha256_of
from omniport.runtime.bundle.manifest import Manifest
from omniport.runtime.errors import OmniportError, UsageError
from omniport.runtime.generation.thinker import require_room
from omniport.runtime.prompt.builder import Prompt, build_prompt
from omniport.runtime.prompt.tokenizer import TextCodec

_MEDIA = ("audio", "image", "video")


@dataclass(frozen=True, eq=False)
class Sample:
    """One conversation.

    Attributes:
        where: file and line, for messages.
        reply: token ids that the thinker is made to say; none if the sample has no reply.
        digest: sha256 (hex) of messages, reply and media, wherever these lie. What is drawn for a sample depends on it
            and not on the sample's place, so that ranges do not depend on the order of the samples.
    """

    where: str
    messages: Sequence[Mapping[str, Any]]
    reply: tuple[int, ...]
    digest: str

    def prompt(self, manifest: Manifest, codec: TextCodec) -> Prompt:
        """The prompt with its media, as the runtime lays it out: read anew on every call, for it may be large."""
        return build_prompt(self.messages, manifest, codec)


def read_samples(path: Path, manifest: Manifest, codec: TextCodec, limit: int | None = None) -> list[Sample]:
    """The first ``limit`` samples of a file (all if None).

    A line is an object with ``messages``, as ``OmniSession.reply`` takes them, and ``reply``, a text, if wanted. Media
    are paths, relative ones from the file's folder. Every prompt is laid out once: bad input is found before anything
    is computed.

    Raises:
        UsageError: names the file and the line, and says what is wrong there.
    """
    samples = []
    for number, line in read_lines(path)[:limit]:
        where = f"{path}:{number}"
        try:
            entry = parse_entry(line, path.parent, ("reply",))
            prompt = build_prompt(entry["messages"], manifest, codec)
            reply = _reply(entry, codec)
            # what the talker prefills beside the prompt, and the reply
            require_room(len(prompt.token_ids), manifest.kv.max_context, 2 + len(reply))
        except (ValueError, OmniportError) as error:
            raise UsageError(f"{where}: {error}") from error
        samples.append(Sample(where, entry["messages"], reply, _digest(entry)))
    if not samples:
        raise UsageError(f'{path} holds no sample; at least one line with "messages" was expected')
    return samples


def _digest(entry: Mapping[str, Any]) -> str:
    messages = [{**message, "content": _contents(message["content"])} for message in entry["messages"]]
    return hashlib.sha256(msgspec.json.encode([messages, entry.get("reply")], order="sorted")).hexdigest()


def _contents(content: Any) -> Any:
    """Content with the sha256 of each medium's file in place of its path."""
    if isinstance(content, str):
        return content
    return [
        {key: sha256_of(Path(value)) if key in _MEDIA else value for key, value in part.items()} for part in content
    ]


def _reply(entry: Mapping[str, Any], codec: TextCodec) -> tuple[int, ...]:
    text = entry.get("reply", "")
    if not isinstance(text, str) or ("reply" in entry and not text):
        raise ValueError(f'"reply" is {text!r}; a text that is not empty was expected, or no "reply" at all')
    return tuple(codec.encode(text))
