"""What the operator decides: address, keys, names and limits of the server."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from omniport.runtime.errors import UsageError

Dialect = Literal["openai", "beta", "dashscope"]
Transcribe = Literal["after", "off"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one client may take.

    Attributes:
        body, part: bytes of a request, and of one medium in it.
        image_pixels: of a picture. audio_seconds, video_seconds: of a clip.
        decode_seconds, decode_memory: for reading one medium, and bytes that it takes meanwhile.
        decoded, media_seconds: bytes that the media of one request may have once they are read, and for reading them.
        head_seconds, upload_seconds: for a request's head to arrive, and for all of it.
        unread_seconds: for a client to take what was sent of a stream.
        queue: replies that wait for their turn. requests, connections: that are open at once.
        drain_seconds: for replies under way to end when the server stops.
    """

    body: int = 32 << 20
    part: int = 24 << 20
    image_pixels: int = 16_000_000
    audio_seconds: float = 300.0
    video_seconds: float = 384.0
    decode_seconds: float = 20.0
    decode_memory: int = 1 << 30
    decoded: int = 512 << 20
    media_seconds: float = 60.0
    upload_seconds: float = 60.0
    head_seconds: float = 10.0
    unread_seconds: float = 30.0
    queue: int = 4
    requests: int = 64
    connections: int = 512
    drain_seconds: float = 30.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to serve.

    Attributes:
        host, port: where to listen; port 0 takes a free one.
        keys: of which a client must send one; without any, everybody who reaches the server may use it.
        no_auth: listen beyond this machine without keys.
        origins: of web pages elsewhere that may call, such as ``https://example.org``.
        model: name that clients ask for; None is the bundle's own. any_model: answer whatever name they ask for.
        voices: further names of voices -> voices of the bundle.
        active: replies at once. sessions: conversations whose KV caches are kept.
        resume_seconds: that a Realtime session whose client was lost is kept for when it comes back; 0: it is not.
        url_hosts: from which media are fetched by https; none else.
        certificate, certificate_key: files in PEM form; with them the server speaks https.
        dialect: DashScope's streams of wav sound have no header. It and ``beta`` speak the earlier form of the Realtime
            protocol from the beginning, without being asked.
        wyoming: host and port for Wyoming's clients, who have no keys.
        transcribe: what was said to Realtime sessions that ask for it, after the reply; or not at all.
        otlp: URL of an OpenTelemetry collector that gets a span of each reply; nothing is sent without it.

    Raises:
        UsageError: no key, and an address that others reach.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()
    no_auth: bool = False
    origins: tuple[str, ...] = ()
    model: str | None = None
    any_model: bool = False
    voices: Mapping[str, str] = field(default_factory=dict)
    active: int = 1
    sessions: int = 4
    resume_seconds: float = 30.0
    url_hosts: tuple[str, ...] = ()
    dialect: Dialect = "openai"
    transcribe: Transcribe = "after"
    otlp: str | None = None
    wyoming: tuple[str, int] | None = None
    certificate: Path | None = None
    certificate_key: Path | None = None
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if not (self.keys or self.no_auth or is_loopback(self.host)):
            raise UsageError(
                f"{self.host} can be reached from other machines, and no key is set: give --api-key-file FILE or set "
                "OMNIPORT_API_KEY, listen on 127.0.0.1, or add --no-auth to let everybody in"
            )
        if self.wyoming is not None and not (self.no_auth or is_loopback(self.wyoming[0])):
            raise UsageError(
                f"{self.wyoming[0]} can be reached from other machines, and Wyoming has no keys: give --wyoming PORT "
                "for 127.0.0.1, or add --no-auth to let everybody in"
            )
        if any(not key.isascii() or not key.isprintable() or " " in key for key in self.keys):
            raise UsageError("a key holds characters that no header can: use letters, digits, '-' and '_'")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
