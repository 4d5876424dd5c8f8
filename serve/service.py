"""What the endpoints share: the bundle's session, admission, names, measurements, and whether all is ready."""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal

from omniport.runtime import OmniSession, SamplingConfig
from omniport.runtime.bundle.reader import MANIFEST_FILE
from omniport.runtime.errors import UsageError

from .admission import Admission
from .measurements import Measurements
from .media.decoders import Decoders
from .open_sessions import OpenSessions
from .replicas.session_store import SessionStore
from .session_pool import SessionPool
from .settings import Settings
from .spoken_replies import SpokenReplies

if TYPE_CHECKING:
    from .reply_spans import ReplySpans

_LOG = logging.getLogger(__name__)

State = Literal["loading", "ready", "draining"]
#: OpenAI's voices, which its clients ask for unasked
_OPENAI_VOICES = frozenset(
    ("alloy", "ash", "ballad", "cedar", "coral", "echo", "fable", "marin", "nova", "onyx", "sage", "shimmer", "verse")
)
#: threads that wait for the next event of a reply, and that read media
_WAITING, _READING = 16, 2


class Service:
    """A bundle that is served.

    Args:
        session: open; replies that are apart from any chat are made by it.
        settings: see there.
        store: where Realtime sessions are saved, for other replicas to go on with them.

    Attributes:
        id: that nothing else has.
        state: requests are answered when it is ``ready``.
        model: the name that clients ask for. fingerprint: of the bundle. created: seconds since 1970.
        sessions: those of chats. spoken: what replies with sound have said.
        realtime: sessions of WebSockets.
        waiting, reading: threads that wait for replies, and that read media. decoders: what reads files.
        failure: what ended the warming up.

    Raises:
        UsageError: a name stands for a voice that the bundle does not have.
    """

    def __init__(self, session: OmniSession, settings: Settings, store: SessionStore | None = None) -> None:
        self.session, self.settings = session, settings
        self.id, self.store = secrets.token_hex(8), store if settings.resume_seconds else None
        self.state: State = "loading"
        self.failure: Exception | None = None
        self.admission = Admission(settings.active, settings.limits.queue)
        self.spoken = SpokenReplies()
        self.realtime = OpenSessions(settings.sessions, settings.resume_seconds)
        self.sessions = SessionPool(session, max(settings.sessions, settings.active))
        self.waiting = ThreadPoolExecutor(_WAITING, "omniport-serve")
        self.reading = ThreadPoolExecutor(_READING, "omniport-media")
        self.decoders = Decoders(settings.limits)
        description = session.bundle.root / MANIFEST_FILE
        self.model = settings.model or session.manifest.source.name.rpartition("/")[2]
        self.measurements = Measurements(self._spans())
        self.created = int(description.stat().st_mtime)
        self.fingerprint = hashlib.sha256(description.read_bytes()).hexdigest()[:16]
        self.voice_names = [voice.name for voice in session.manifest.voices]
        for name, voice in settings.voices.items():
            if voice not in self.voice_names:
                known = ", ".join(self.voice_names) or "none"
                raise UsageError(f"{name!r} shall be the voice {voice!r}, but the bundle's voices are: {known}")

    def _spans(self) -> ReplySpans | None:
        if self.settings.otlp is None:
            return None
        from .reply_spans import ReplySpans  # an extra of its own

        return ReplySpans.to(self.settings.otlp, self.model)

    def voice(self, name: str | None) -> str | None:
        """The bundle's voice for what a client asks for; a name that nobody knows is given on, to be refused."""
        if name is None or name in self.voice_names:
            return name
        return self.settings.voices.get(name, None if name.lower() in _OPENAI_VOICES else name)

    def start(self, failed: Callable[[], None]) -> None:
        """Load the graphs and make a first reply, in a thread of its own; ``failed`` is called if that is not possible.

        A graph's first run takes longer than the others, which no client shall wait for.
        """

        def warm_up() -> None:
            try:
                self.decoders.warm()
                self.session.load()
                self._first_reply()
            except Exception as error:  # noqa: BLE001  raised again by who started
                if self.state == "loading":  # else the session was closed meanwhile
                    self.failure = error
                    failed()
                return
            if self.state == "loading":
                self.state = "ready"
                _LOG.info("ready: %s on %s", self.model, self.session.backend.name)

        threading.Thread(target=warm_up, name="omniport-warm-up", daemon=True).start()

    def drain(self) -> None:
        """Take no more requests; those under way go on."""
        self.state = "draining"

    def close(self) -> None:
        """End what is under way."""
        self.drain()
        self.sessions.close()
        self.realtime.close()
        self.session.close()
        self.decoders.close()
        self.waiting.shutdown(wait=False, cancel_futures=True)
        self.reading.shutdown(wait=False, cancel_futures=True)
        self.measurements.close()

    def _first_reply(self) -> None:
        speaks = self.session.manifest.dit is not None
        few = SamplingConfig(max_new_tokens=2)
        codes = SamplingConfig(max_new_tokens=8) if speaks else None
        messages = [{"role": "user", "content": "Hello"}]
        for _ in self.session.reply(messages, speak=speaks, thinker=few, talker=codes):
            pass
