"""Spans by OpenTelemetry, sent over OTLP/HTTP from a thread of their own.

Requests only put spans into a bounded buffer. An endpoint that is away costs them nothing: what it does not take within
`EXPORT_S` is given up, what does not fit the buffer is dropped.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span as OtelSpan
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.telemetry import Attributes, Span, Tracing, active

EXPORT_S = 3.0
CLOSE_S = 1.5
_TIMEOUTS = ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT")


class OtlpTracing(Tracing):
    """Makes spans and sends them to the endpoint of the environment."""

    is_on = True

    def __init__(self) -> None:
        told = any(os.environ.get(name) for name in _TIMEOUTS)
        resource = Resource.create({"service.name": "d2ft"}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(timeout=None if told else EXPORT_S)))
        self._tracer = self._provider.get_tracer("d2ft")

    @contextmanager
    def span(self, name: str, parent: str | None, attributes: Attributes, *, serves: bool = False) -> Iterator[Span]:
        kind = SpanKind.SERVER if serves else SpanKind.INTERNAL
        span = self._tracer.start_span(name, _context(parent), kind, attributes)
        before = active.set(_traceparent(span))
        try:
            yield _Open(span)
        except Exception as error:
            span.set_status(StatusCode.ERROR, type(error).__name__)
            raise
        finally:
            active.reset(before)
            span.end()

    def record(
        self, name: str, parent: str | None, attributes: Attributes, *, began: float, ended: float, failed: bool = False
    ) -> None:
        span = self._tracer.start_span(name, _context(parent), attributes=attributes, start_time=_ns(began))
        if failed:
            span.set_status(StatusCode.ERROR)
        span.end(_ns(ended))

    def close(self) -> None:
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_S)


class _Open(Span):
    def __init__(self, span: OtelSpan) -> None:
        self._span = span

    def describe(self, name: str, attributes: Attributes, *, failed: bool = False) -> None:
        self._span.update_name(name)
        self._span.set_attributes(attributes)
        if failed:
            self._span.set_status(StatusCode.ERROR)


def _context(parent: str | None) -> Context:
    """The context that a `traceparent` names; an empty one where it names none, or is malformed."""
    return TraceContextTextMapPropagator().extract({"traceparent": parent} if parent else {}, Context())


def _traceparent(span: OtelSpan) -> str:
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
