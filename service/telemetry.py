"""Traces, when OpenTelemetry's endpoint variable is set; nothing otherwise."""

from __future__ import annotations


def current_trace() -> str | None:
    """The `traceparent` of the request that is being served, or None."""
    return None
