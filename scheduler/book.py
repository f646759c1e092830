"""The device book: what is known of every device that has ever worked, kept across jobs in one JSON file.

The scheduler writes it, whole, beside the old one and then over it, so that a reader always finds a complete file; the
API reads it with `read_book`. A file that cannot be read is set aside as `devices.json.bad`, and a new book is begun:
it holds nothing that devices will not measure again.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from scheduler.devices import DeviceRecord, record_of
from scheduler.domain import DeviceProfile, ModelShape, StepShape
from scheduler.errors import UserError

FILE = "devices.json"
FORMAT = 1
MAX_RECORDS = 1000  # the longest unseen are dropped
MAX_HISTORY = 64  # points of a device's history: the newest
HISTORY_S = 60.0  # between two of them at least, the newest apart


class Book:
    """Records by device id, in memory and, where there is a `path`, on disk."""

    def __init__(self, path: Path | str | None = None) -> None:
        self._path = None if path is None else Path(path)
        self._lock = threading.Lock()
        self._records = {} if self._path is None else _open(self._path)

    def hear(self, profiles: Sequence[DeviceProfile], shape: ModelShape, step: StepShape) -> None:
        """Take in what the workers of a job measured, in rank order; the newest measurement of a device stays."""
        ids = book_ids([profile.device_id for profile in profiles])
        with self._lock:
            for profile, name in zip(profiles, ids, strict=True):
                known = self._records.get(name)
                if known is None or known.measured_at <= profile.measured_at:
                    found = record_of(replace(profile, device_id=name), shape, step, ids)
                    links = {**(known.links if known else {}), **found.links}
                    self._records[name] = replace(found, links=links, history=_longer(known, found))
            while len(self._records) > MAX_RECORDS:
                del self._records[min(self._records.values(), key=lambda record: record.measured_at).id]
            if self._path is not None:
                # A full disk must not cost a job its plan; the next window writes again.
                with contextlib.suppress(OSError):
                    _write(self._path, self._records.values())

    def records(self) -> list[DeviceRecord]:
        """All devices, by id."""
        with self._lock:
            return [record for _, record in sorted(self._records.items())]


def book_ids(device_ids: Sequence[str]) -> list[str]:
    """Names of a job's devices, in rank order; workers that share one are told apart by a number."""
    return [
        name if (before := device_ids[:rank].count(name)) == 0 else f"{name}#{before + 1}"
        for rank, name in enumerate(device_ids)
    ]


def _longer(known: DeviceRecord | None, found: DeviceRecord) -> tuple[tuple[float, int], ...]:
    """The history with the newest measurement; the one before it goes where it lies close to its own."""
    before = [point for point in (known.history if known else ()) if point[0] < found.measured_at]
    if len(before) > 1 and before[-1][0] - before[-2][0] < HISTORY_S:
        before.pop()
    return (*before, (found.measured_at, found.training_flops_per_s))[-MAX_HISTORY:]


def read_book(path: Path | str) -> list[DeviceRecord]:
    """The records in a book's file; none where there is no file or it cannot be read. Changes nothing."""
    try:
        return list(_parse(Path(path).read_text()).values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, UserError):
        return []


def _open(path: Path) -> dict[str, DeviceRecord]:
    try:
        return _parse(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, UserError):
        _set_aside(path)
        return {}


def _parse(text: str) -> dict[str, DeviceRecord]:
    data = json.loads(text)
    if data["format"] != FORMAT:
        raise ValueError(f"format {data['format']}")
    records = [DeviceRecord.from_dict(record) for record in data["devices"]]
    return {record.id: record for record in records}


def _set_aside(path: Path) -> None:
    try:
        path.replace(path.with_name(path.name + ".bad"))
    except OSError:
        return  # it will be written over


def _write(path: Path, records: Iterable[DeviceRecord]) -> None:
    """Write the file so that whatever dies, and whenever, it is the old one or the new one."""
    text = json.dumps({"format": FORMAT, "devices": [record.to_dict() for record in records]}, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with open(draft, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
