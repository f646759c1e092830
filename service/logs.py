"""The log of the API process: one JSON object a line, with what is known of the request, the job and the trace.

    {"time": "2026-01-31T12:00:00.123Z", "level": "INFO", "logger": "service.watch", "message": "GET /v1/jobs 200",
     "request_id": "req_…", "user": "user_…", "method": "GET", "route": "/v1/jobs", "status": 200, "duration_ms": 1.9}

What users write gets into messages. It cannot begin a line of its own, since JSON escapes the end of a line, nor
reach a terminal that shows the log: control characters and those that turn text around are replaced. Secrets are taken
out last, from every text of a line, tracebacks included: those that are known, and all that looks like one of ours.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from service.telemetry import current_trace

REDACTED = "[redacted]"
MIN_SECRET = 8  # a shorter "secret" would be taken out of every other word
MAX_NAME = 80
# They tell every request with its URL, or with its headers.
CHATTY = ("httpx2", "httpcore2", "urllib3", "asyncio")

# C0 but tab and newline, C1, marks of direction, line separators, halves of surrogate pairs
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# One after the other, since what one leaves of a URL may hold what the next is after.
_SECRETS = (
    re.compile(r"(?:d2ft|run)_[\w-]{24,}"),
    re.compile(r"whsec_[\w+/=-]{16,}"),
    re.compile(r"(?P<kept>bearer\s+)[\w.~+/=-]{8,}", re.IGNORECASE),
    re.compile(r"(?P<kept>authorization[\"']?\s*[:=,]\s*b?[\"']?)[^\"'\s,;)]+(?:\s+[^\"'\s,;)]+)?", re.IGNORECASE),
    re.compile(r"(?P<kept>://[^/\s:@]*:)[^/\s@]+(?=@)"),
    re.compile(r"(?P<kept>https?://[^\s\"'<>?#]+\?)[^\s\"'<>]+"),
)
_MARKS = ("d2ft_", "run_", "whsec_", "bearer", "authorization", "://")  # without one of these, none of those matches

_serving: ContextVar[MutableMapping[str, Any] | None] = ContextVar("serving", default=None)
_about: ContextVar[Mapping[str, Any] | None] = ContextVar("about", default=None)


def configure(level: str, secrets: Iterable[str | None], stream: TextIO | None = None) -> None:
    """Write the whole process's log as lines of JSON, to stderr unless told otherwise."""
    root, threshold = logging.getLogger(), logging.getLevelNamesMapping()[level.upper()]
    root.handlers[:] = [handler(secrets, stream)]
    root.setLevel(threshold)
    for name in CHATTY:
        logging.getLogger(name).setLevel(max(threshold, logging.WARNING))
    logging.captureWarnings(True)


def handler(secrets: Iterable[str | None], stream: TextIO | None = None) -> logging.Handler:
    made = logging.StreamHandler(stream)
    made.setFormatter(JsonLines(Redactor(secrets)))
    return made


@contextmanager
def about(**fields: Any) -> Iterator[None]:
    """Say on every line that is logged in the block what it is about: `job_id`, `attempt`."""
    before = _about.set({**(_about.get() or {}), **fields})
    try:
        yield
    finally:
        _about.reset(before)


@contextmanager
def serving(scope: MutableMapping[str, Any]) -> Iterator[None]:
    """Say on every line that is logged in the block which request it belongs to."""
    before = _serving.set(scope)
    try:
        yield
    finally:
        _serving.reset(before)


class Redactor:
    """Takes secrets out of a text."""

    def __init__(self, known: Iterable[str | None]) -> None:
        words = sorted({word for word in known if word and len(word) >= MIN_SECRET}, key=len, reverse=True)
        self._patterns = (*(re.compile(re.escape(word)) for word in words), *_SECRETS)
        self._marks = (*_MARKS, *(word.lower() for word in words))

    def __call__(self, text: str) -> str:
        lower = text.lower()
        for mark in self._marks:  # most texts have none, and to see that is far cheaper than the pattern
            if mark in lower:
                return self._search(text)
        return text

    def _search(self, text: str) -> str:
        for pattern in self._patterns:
            text = pattern.sub(_mask, text)
        return text


class JsonLines(JsonFormatter):
    """A record as one line of JSON."""

    def __init__(self, redact: Redactor) -> None:
        reserved = (*RESERVED_ATTRS, "color_message")
        super().__init__(json_ensure_ascii=False, reserved_attrs=reserved, rename_fields={"exc_info": "exception"})
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        try:
            return super().format(record)
        except Exception as error:  # wrong arguments: logging itself would print them as they are
            message = f"a record of {record.name} cannot be written: {type(error).__name__}"
            return json.dumps({"time": _time(record), "level": "ERROR", "logger": __name__, "message": message})

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        log_data.update(time=_time(record), level=record.levelname, logger=record.name, message=record.message)
        log_data.update(_context())
        super().add_fields(log_data, record, message_dict)

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        return {name: self._safe(value) for name, value in log_data.items()}

    def _safe(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float):
            return value
        return _UNSAFE.sub("\N{REPLACEMENT CHARACTER}", self._redact(str(value)))


def _mask(found: re.Match[str]) -> str:
    return f"{found.groupdict().get('kept', '')}{REDACTED}"


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _context() -> dict[str, Any]:
    """What is known of where a line is logged. Read from the request itself: who sends it is learnt on the way."""
    fields = dict(_about.get() or {})
    if (scope := _serving.get()) is not None:
        state, names = scope.get("state") or {}, scope.get("path_params") or {}
        fields["request_id"] = state.get("request_id")
        if (caller := state.get("caller")) is not None:
            fields["user"] = caller.user_id
        if (attempt := state.get("attempt")) is not None:
            fields.update(job_id=attempt.job_id, attempt=attempt.n)
        if "job_id" in names:
            fields["job_id"] = str(names["job_id"])[:MAX_NAME]
    if (trace := current_trace()) is not None:
        _, fields["trace_id"], fields["span_id"], _ = trace.split("-")
    return fields
