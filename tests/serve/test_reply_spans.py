"""Spans of replies, as a collector of OpenTelemetry's gets them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from omniport.runtime.errors import UsageError
from omniport.serve.settings import Settings
from support.bundles import make_bundle
from support.served import Served

pytest.importorskip("opentelemetry.sdk", reason="the otel extra is not installed")
from omniport.serve.reply_spans import ReplySpans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter


class Collector:
    """A collector on loopback: the spans that it was sent, and their bodies."""

    def __init__(self) -> None:
        self.bodies: queue.Queue[bytes] = queue.Queue()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                import gzip

                body = self.rfile.read(int(self.headers["content-length"]))
                packed = self.headers.get("content-encoding") == "gzip"
                collector.bodies.put(gzip.decompress(body) if packed else body)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def spans(self) -> list[Any]:
        request = ExportTraceServiceRequest.FromString(self.bodies.get(timeout=60))
        return [span for found in request.resource_spans for scope in found.scope_spans for span in scope.spans]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


def attributes(span: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}


def test_a_spoken_reply_is_one_span_with_its_moments_and_without_its_words(
    tmp_path: Path, collector: Collector
) -> None:
    with Served(make_bundle(tmp_path / "bundle"), otlp=collector.url).start() as served:
        answer = served.client().chat.completions.create(
            model=served.service.model,
            messages=[{"role": "user", "content": "a secret question"}],
            modalities=["text", "audio"],
            audio={"voice": "Chelsie", "format": "wav"},
        )
    (span,) = collector.spans()  # sent at the latest when the server ends
    told = attributes(span)
    assert span.name == f"chat {served.service.model}"
    assert told["gen_ai.usage.input_tokens"] == answer.usage.prompt_tokens > 0
    assert told["gen_ai.usage.output_tokens"] > 0
    assert told["omniport.codec_tokens"] > 0
    assert told["omniport.stage.dit_seconds"] > 0
    moments = {event.name: event.time_unix_nano for event in span.events}
    assert span.start_time_unix_nano < moments["first_token"] <= moments["first_audio"] <= span.end_time_unix_nano
    said = answer.choices[0].message.audio.transcript
    assert said
    assert said.encode() not in span.SerializeToString()
    assert b"secret" not in span.SerializeToString()


def test_nothing_is_sent_unless_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReplySpans, "to", lambda *_: pytest.fail("spans were made"))
    with Served(make_bundle(tmp_path / "bundle")):
        pass


def test_a_collector_that_is_not_there_changes_nothing_for_clients(tmp_path: Path) -> None:
    with Served(make_bundle(tmp_path / "bundle"), otlp="http://127.0.0.1:9/v1/traces").start() as served:
        answer = served.client().chat.completions.create(
            model=served.service.model, messages=[{"role": "user", "content": "Hello"}]
        )
        assert answer.choices[0].message.content


@pytest.mark.parametrize("url", ["collector", "ftp://collector/v1", "http://", "http://[", "4318"])
def test_what_is_no_url_is_refused_by_name(url: str) -> None:
    with pytest.raises(UsageError, match=r"--otlp .*such as http://127\.0\.0\.1:4318/v1/traces"):
        ReplySpans.to(url, "model")


def test_a_reply_that_was_cut_says_so() -> None:
    from omniport.runtime import Done, Stats

    kept = InMemorySpanExporter()
    spans = ReplySpans("model", BatchSpanProcessor(kept))
    spans.reply(Done("said", (1,), (), Stats(total_time=2.0, queued=0.5), "cancelled"))
    spans.close()
    (span,) = kept.get_finished_spans()
    assert span.attributes["gen_ai.response.finish_reasons"] == ("cancelled",)
    assert span.end_time - span.start_time == 2_000_000_000
    assert [(event.name, event.timestamp - span.start_time) for event in span.events] == [("turn", 500_000_000)]


def test_settings_send_nothing_by_themselves() -> None:
    assert Settings().otlp is None
