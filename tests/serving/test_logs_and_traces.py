"""Structured logs, and spans where OpenTelemetry is installed."""

from __future__ import annotations

import json
import logging
import sys

import pytest
from starlette.testclient import TestClient

from tests.serving.conftest import sleeping_service, wait_until
from turbotx.serving.app import create_app
from turbotx.serving.logs import JsonFormatter
from turbotx.serving.tracing import TracingError, find_tracer, open_span


def test_a_record_is_one_json_line_with_its_fields():
    record = logging.LogRecord("turbotx.x", logging.INFO, "f.py", 1, "took %d", (3,), None)
    record.fields = {"status": 200, "path": "/embed"}
    line = json.loads(JsonFormatter().format(record))
    assert line["event"] == "took 3" and line["level"] == "info" and line["status"] == 200
    assert line["ts"].endswith("Z")


def test_an_exception_is_logged_with_its_traceback():
    try:
        raise ValueError("broken\nline")
    except ValueError:
        record = logging.LogRecord("t", logging.ERROR, "f.py", 1, "failed", (), sys.exc_info())
    text = JsonFormatter().format(record)
    assert "\n" not in text and "ValueError: broken" in json.loads(text)["error"]


def test_requests_are_logged(caplog):
    with caplog.at_level("INFO", "turbotx"), TestClient(create_app(sleeping_service())) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        client.post("/embed", json={"inputs": []})
    fields = [r.fields for r in caplog.records if r.message == "request"]
    assert fields[0]["path"] == "/embed" and fields[0]["status"] == 422


def test_no_span_without_tracing():
    assert find_tracer(False) is None
    with open_span(None, "/embed", {}) as span:
        span.set_attribute("rows", 1)


def test_wanted_but_missing_tracing_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(TracingError, match="pip install"):
        find_tracer(True)


def test_a_span_per_request_continues_the_clients_trace():
    trace = pytest.importorskip("opentelemetry.trace")
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    simple = pytest.importorskip("opentelemetry.sdk.trace.export").SimpleSpanProcessor
    exporter, provider = export.InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(simple(exporter))
    trace.set_tracer_provider(provider)
    with TestClient(create_app(sleeping_service(otel=True))) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        parent = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
        client.post("/embed", json={"inputs": "w0"}, headers=parent)
    (span,) = exporter.get_finished_spans()
    assert span.name == "/embed" and span.attributes["http.response.status_code"] == 200
    assert f"{span.context.trace_id:032x}" == "ab" * 16
