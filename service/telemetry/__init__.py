"""Traces, where OpenTelemetry's own variables name an endpoint; nothing otherwise, and its SDK is not loaded.

    POST /v1/jobs ─ span ─► traceparent in the job's row ─► attempt submit, attempt: children of that span

The context of a job's POST is kept in its row, so that its attempts belong to the same trace after a restart, too.
Attributes are ids, names of routes and numbers: nothing that a user wrote, and no secret.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
HEADERS = ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS")
Attributes = Mapping[str, str | int]
log = logging.getLogger(__name__)
active: ContextVar[str | None] = ContextVar("traceparent", default=None)


def current_trace() -> str | None:
    """The `traceparent` of the span that is open here, or None."""
    return active.get()


class Span:
    """A span that is open; this one is not recorded."""

    def describe(self, name: str, attributes: Attributes, *, failed: bool = False) -> None:
        """Say what the span turned out to be."""


class Tracing:
    """What makes spans; this one makes none."""

    is_on = False

    def span(
        self, name: str, parent: str | None, attributes: Attributes, *, serves: bool = False
    ) -> AbstractContextManager[Span]:
        """A span around a block, as a child of a `traceparent`. `serves`: it answers somebody's request."""
        return _NOTHING

    def record(
        self, name: str, parent: str | None, attributes: Attributes, *, began: float, ended: float, failed: bool = False
    ) -> None:
        """A span that is over already; times are Unix seconds."""

    def close(self) -> None:
        """Send what is left, within `otlp.CLOSE_S`."""


_NOTHING = nullcontext(Span())


def start_tracing() -> Tracing:
    """Tracing as the environment wants it. Without the packages for it, it is off, and the log says what to install."""
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return Tracing()
    try:
        from service.telemetry.otlp import OtlpTracing
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        log.warning("%s is set, but OpenTelemetry is not installed: pip install 'd2ft[otel]'", ENDPOINTS[1])
        return Tracing()
    return OtlpTracing()


def header_secrets() -> list[str]:
    """What the headers for the endpoint carry, which may be keys."""
    pairs = (pair for name in HEADERS for pair in os.environ.get(name, "").split(","))
    return [value.strip() for _, _, value in (pair.partition("=") for pair in pairs) if value.strip()]
