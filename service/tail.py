"""Following the event file of an attempt: whole lines from a byte offset on, a torn last line waits."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from service.store import RunEvent
from workers.events import read_events

BATCH = 200  # lines of one transaction: it holds up other writers
_TYPE = re.compile(r"[\w.-]{1,40}", re.ASCII)  # it stands on a line of its own in a stream
LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class Batch:
    """Lines read, and the offset after them."""

    events: list[RunEvent]
    offset: int


def read_batch(path: Path, offset: int) -> Batch:
    """The next lines, at most `BATCH`. A line that is not an event is passed over: it must not stop the rest.

    `seq` of each is the place of its end in the file: two writers may count alike, but no two lines end at one byte.
    """
    events: list[RunEvent] = []
    for end, event in islice(read_events(path, offset), BATCH):
        offset = end
        events += readable([{**event, "seq": end}])
    return Batch(events, offset)


def readable(events: Iterable[RunEvent]) -> list[RunEvent]:
    """Those that are events, as JSON and the store can carry them on."""
    return [_writable(event) for event in events if _is_event(event)]


def _is_event(event: RunEvent) -> bool:
    seq, type, data = event.get("seq"), event.get("type"), event.get("data")
    numbered = isinstance(seq, int) and not isinstance(seq, bool) and 0 < seq < 2**62
    named = isinstance(type, str) and _TYPE.fullmatch(type) is not None
    said = isinstance(event.get("message", ""), str) and event.get("level", "info") in LEVELS
    at = event.get("at")
    timed = at is None or (isinstance(at, int | float) and not isinstance(at, bool) and 0 <= at < 2**40)
    return numbered and named and said and timed and (data is None or isinstance(data, dict))


def _writable(value: Any) -> Any:
    """The value as JSON and the store can carry it on: no NaN or infinity, no half of a surrogate pair, no NUL.

    A file name may hold the one, what a program printed the other.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_writable(item) for item in value]
    if isinstance(value, dict):
        return {_writable(key): _writable(item) for key, item in value.items()}
    return value
