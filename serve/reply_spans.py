"""A span of OpenTelemetry for each reply: its begin and end, its first token and sound, and the work of its stages.

Names of attributes follow OpenTelemetry's conventions for generative models (``gen_ai.*``); what they have no word for
is under ``omniport``. Nothing of what people or the model said is in a span.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from urllib.parse import urlsplit

from omniport.runtime import Done
from omniport.runtime.errors import UsageError
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind

_SECOND = 1_000_000_000
#: for what is not sent yet when the server ends
_FLUSH_MILLISECONDS = 3000


class ReplySpans:
    """Makes spans, and hands them to a processor of OpenTelemetry's SDK.

    Args:
        model: the name that clients ask for.
    """

    def __init__(self, model: str, processor: SpanProcessor) -> None:
        self._model = model
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "omniport", "service.version": version("omniport")})
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("omniport.serve")

    @classmethod
    def to(cls, url: str, model: str) -> ReplySpans:
        """Spans that are sent in batches to a collector, by OTLP over HTTP, from a thread of their own.

        Args:
            url: whole, such as ``http://127.0.0.1:4318/v1/traces``.

        Raises:
            UsageError: no URL of http or https.
        """
        try:
            parts = urlsplit(url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname)
        except ValueError:
            good = False
        if not good:
            raise UsageError(f"--otlp {url}: a collector's URL was expected, such as http://127.0.0.1:4318/v1/traces")
        return cls(model, BatchSpanProcessor(OTLPSpanExporter(url, timeout=_FLUSH_MILLISECONDS / 1000)))

    def reply(self, done: Done) -> None:
        """A reply has ended just now."""
        stats = done.stats
        end = time.time_ns()
        begin = end - round(stats.total_time * _SECOND)
        name = f"chat {self._model}"
        span = self._tracer.start_span(name, kind=SpanKind.SERVER, start_time=begin)
        span.set_attributes(
            {
                "gen_ai.operation.name": "chat",
                "gen_ai.request.model": self._model,
                "gen_ai.response.finish_reasons": [done.finish_reason],
                "gen_ai.usage.input_tokens": stats.prompt_tokens,
                "gen_ai.usage.output_tokens": stats.text_tokens,
                "omniport.backend": stats.backend,
                "omniport.reused_tokens": stats.reused_tokens,
                "omniport.codec_tokens": stats.codec_tokens,
                "omniport.audio_seconds": stats.audio_seconds,
                "omniport.underrun_seconds": stats.underrun_seconds,
                **{f"omniport.stage.{stage}_seconds": seconds for stage, seconds in stats.busy.items()},
            }
        )
        moments = {
            "turn": stats.queued or None,  # its place in the queue came up
            "first_token": stats.time_to_first_token,
            "first_audio": stats.time_to_first_audio,
        }
        for event, seconds in moments.items():
            if seconds is not None:
                span.add_event(event, timestamp=begin + round(seconds * _SECOND))
        span.end(end)

    def close(self) -> None:
        """Send what is left, for a few seconds at most."""
        self._provider.force_flush(_FLUSH_MILLISECONDS)
        self._provider.shutdown()
