"""What is counted for Prometheus: requests, replies and their stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from omniport.runtime import Done, Stats
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

if TYPE_CHECKING:
    from .reply_spans import ReplySpans

_FIRST_AUDIO = (0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 8)
_RATES = (0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 4, 8)
_PARTS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1)
_LAGS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
#: of a new reply in the averages that predict the next
_WEIGHT = 0.2


class Measurements:
    """Measurements of one service.

    Args:
        spans: which are told of each reply, too.

    Attributes:
        first_audio, rate: of late, the seconds to the first sound and the real-time factor; None before the first.
    """

    def __init__(self, spans: ReplySpans | None = None) -> None:
        self._spans = spans
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"omniport_{name}", help, labels, registry=registry)

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"omniport_{name}", help, buckets=buckets, registry=registry)

        self.sessions = Gauge("omniport_sessions", "Realtime sessions by state", ["state"], registry=registry)
        self.kv_tokens = Gauge(
            "omniport_kv_tokens",
            "Tokens in the KV caches of sessions: chats and Realtime",
            ["session"],
            registry=registry,
        )
        self.temperature = Gauge(
            "omniport_temperature_celsius", "Of the machine's thermal zones", ["zone"], registry=registry
        )
        self.throttled = Gauge("omniport_throttled", "1 while the machine slows down for heat", registry=registry)
        self.replies_active = Gauge("omniport_replies_active", "Replies that are made now", registry=registry)
        self.replies_waiting = Gauge("omniport_replies_waiting", "Replies that wait for their place", registry=registry)
        self._requests = counter("requests", "Requests that have ended", "route", "status")
        self._queue = histogram("queue_seconds", "Seconds that a reply waited for its place", _FIRST_AUDIO)
        self._first_audio = histogram("first_audio_seconds", "Seconds to the first sound of a reply", _FIRST_AUDIO)
        self._first_token = histogram("first_token_seconds", "Seconds to the first token of a reply", _FIRST_AUDIO)
        self._rate = histogram("real_time_factor", "Seconds of work for a second of speech", _RATES)
        self._underrun = counter("underrun_seconds", "Seconds that a loudspeaker would have run dry")
        self._interruptions = counter("interruptions", "Replies that were cut off", "reason")
        self._heard = histogram("heard_ratio", "Part of a reply's speech that was heard, of Realtime replies", _PARTS)
        self._lag = histogram("input_lag_seconds", "Seconds that sound waited before it was looked at", _LAGS)
        self._endpoint = histogram("vad_endpoint_seconds", "Seconds from a turn's last word to its end", _FIRST_AUDIO)
        self._dropped = counter("turns_dropped", "Turns that conversations had no room for any more")
        self._prefilled = counter("prefill_tokens", "Prompt tokens that were run", "when")
        self._reused = counter("reused_tokens", "Prompt tokens that were in the KV cache")
        self._text = counter("text_tokens", "Text tokens of replies")
        self._codes = counter("codec_tokens", "Codec tokens of replies")
        self._stages = counter("stage_seconds", "Seconds of work by stage", "stage")
        self.first_audio: float | None = None
        self.rate: float | None = None

    def request(self, route: str, status: int) -> None:
        """A request has ended."""
        self._requests.labels(route, str(status)).inc()

    def waited(self, seconds: float) -> None:
        """A reply got its place."""
        self._queue.observe(seconds)

    def interrupted(self, reason: str) -> None:
        """A reply was cut off."""
        self._interruptions.labels(reason).inc()

    def heard(self, part: float) -> None:
        """A reply has been played, or will not be."""
        self._heard.observe(part)

    def lagged(self, seconds: float) -> None:
        """A piece of sound was looked at."""
        self._lag.observe(seconds)

    def speech_ended(self, seconds: float) -> None:
        """A turn ended by silence."""
        self._endpoint.observe(seconds)

    def dropped(self, turns: int) -> None:
        """A conversation has forgotten its oldest turns."""
        self._dropped.inc(turns)

    def reply(self, done: Done) -> None:
        """A reply has ended."""
        stats = done.stats
        if stats.time_to_first_token is not None:
            self._first_token.observe(stats.time_to_first_token)
        if stats.time_to_first_audio is not None:
            self._first_audio.observe(stats.time_to_first_audio)
            self.first_audio = _average(self.first_audio, stats.time_to_first_audio)
        if stats.real_time_factor is not None:
            self._rate.observe(stats.real_time_factor)
            self.rate = _average(self.rate, stats.real_time_factor)
        self._underrun.inc(stats.underrun_seconds)
        self._count_tokens(stats)
        for stage, seconds in stats.busy.items():
            self._stages.labels(stage).inc(seconds)
        if self._spans is not None:
            self._spans.reply(done)

    def close(self) -> None:
        """Hand on what waits to be."""
        if self._spans is not None:
            self._spans.close()

    def _count_tokens(self, stats: Stats) -> None:
        self._prefilled.labels("late").inc(stats.late_tokens)
        self._prefilled.labels("live").inc(max(0, stats.prefilled_tokens - stats.late_tokens))
        self._reused.inc(stats.reused_tokens)
        self._text.inc(stats.text_tokens)
        self._codes.inc(stats.codec_tokens)

    def page(self) -> bytes:
        """All of it in Prometheus' text format."""
        page: bytes = generate_latest(self._registry)
        return page


def _average(before: float | None, value: float) -> float:
    return value if before is None else before + _WEIGHT * (value - before)
