"""Following the event file of an attempt: whole lines from a byte offset on, a torn last line waits."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from service.store import RunEvent
from workers.events import read_events

BATCH = 500
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Lines read, and the offset after them."""

    events: list[RunEvent]
    offset: int

    @property
    def is_full(self) -> bool:
        return len(self.events) == BATCH


def read_batch(path: Path, offset: int) -> Batch:
    """The next lines, at most `BATCH`. A whole line that is not an event is passed over: it must not stop the rest."""
    events: list[RunEvent] = []
    try:
        for end, event in islice(read_events(path, offset), BATCH):
            offset = end
            if _is_event(event):
                events.append(event)
    except (json.JSONDecodeError, UnicodeDecodeError):
        log.warning("%s has a line at byte %d that is no event", path, offset)
        offset = _after_line(path, offset)
    return Batch(events, offset)


def _is_event(event: Any) -> bool:
    return isinstance(event, dict) and isinstance(event.get("seq"), int) and isinstance(event.get("type"), str)


def _after_line(path: Path, offset: int) -> int:
    with path.open("rb") as file:
        file.seek(offset)
        return offset + len(file.readline())
