"""The run's own event file: append-only JSON lines that rank 0 writes and anyone may follow.

Writing never waits for a reader. A line is complete when it ends in a newline; a reader keeps its byte offset and
reads on from there, so an outage of the reader loses nothing.

| type | data |
|---|---|
| phase | {"name": "planning" / "starting" / "running" / "finalizing"} |
| plan.created | the plan as a dict, with "heads": [block][head] of {"owner", "ops", "worth", "time_us": µs of a mean |
|  | step, "reason"}, "devices": what each worker has and what binds it, "gantt": the forecast of the cycle's first |
|  | step (`scheduler.gantt`), null where it is too large |
| plan.changed | the same, and "change": {"migrated", "moved_heads", "migration": {"heads", "bytes", |
|  | "seconds"} or null, "reason", "before" and "after": {"version", "step_us", "heads", "full_heads"}, the last two |
|  | as lists by worker} |
| window | {"window": 0 for the rehearsal, "steps", "step_seconds_median", "forecast_seconds", "error": fraction, |
|  | "busy": each worker's seconds of a step}, at the end of every window |
| timeline | {"step", "window", "step_us", "fields", "workers"}: what every worker did in one step, as a chart of |
|  | `scheduler.gantt`, each worker's times from its own begin of the step; one per window and per minute at most |
| metrics | step, total_steps, epoch, loss, train_accuracy, learning_rate, grad_norm, step_seconds, idle_share, |
|  | compute_fraction, bytes_fraction |
| evaluation | {"when": "before" / "after" / "at step 42", "accuracy", "loss", "num_images"} |
| data.skipped | {"count", "files": first names} |
| data.imbalanced | {"ratio": largest to smallest class, "largest", "smallest", "counts": of the ten smallest and the |
|  | ten largest classes in training} |
| artifact.ready | {"name", "path", "bytes", "sha256"} |
| export.failed | {}: a form of the model that was asked for could not be made, and the message says why |
| ledger | the ledger as a dict |
| checkpoint.saved | {"step", "name": "step-00000042", "path", "bytes" of the folder, "sha256" of its manifest.json, |
|  | "files": how many the manifest names, "accuracy" or null; "seconds" that it took where training went on} |
| checkpoint.failed | {"step", "why"}: none could be written there; training goes on |
| checkpoint.dropped | {"name"}: an older one that made room |
| checkpoint.resumed | {"name", "step"}: training goes on after it; name null and step 0 where none is whole |
| checkpoint.damaged | {"name", "why"}: this one is passed over |
| sweep.trial | {"key", "setting", "baseline", "job_id", "status", "figures": {"accuracy", "gflop", "mb", "seconds", |
|  | "steps"} or null, "error": {code, message} or null}: a trial of a sweep is over; of a sweep's own file, as the |
|  | next two |
| sweep.result | {"points": the table, each {"key", "setting", "baseline", "job_id", "status", "accuracy", "compute", |
|  | "bytes", "seconds", "figures", "error"}, "of": "full" or "largest", what costs are fractions of, "fronts": |
|  | {"compute", "bytes", "seconds"}: keys, "knee": key or null} |
| sweep.undrawn | {}: the picture of the front could not be made, and the message says why |
| outcome | {"status": "succeeded" / "paused" / "failed", "error": {code, fault, message, param} or null}: the last |
|  | line; "cancelled", too, of a run that no service has ordered: a step that was under way may follow |
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EVENTS_FILE = "events.jsonl"


class EventLog:
    """Appends events to `run_dir/events.jsonl`; `seq` goes on where an older file ended."""

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        path = Path(run_dir)
        path.mkdir(parents=True, exist_ok=True)
        self.path = path / EVENTS_FILE
        self._lock = threading.Lock()
        self._seq = sum(1 for _ in read_events(self.path, 0))
        self._file = self.path.open("a", encoding="utf-8")
        if _is_torn(self.path):
            self._file.write("\n")  # else the next event would be glued to what a killed writer left

    def emit(self, type: str, message: str = "", *, level: str = "info", **data: Any) -> None:
        """Append one event and flush it to the file system; from any thread."""
        told = {"type": type, "level": level, "message": message, "data": _finite(data)}
        with self._lock:
            self._seq += 1
            event = {"seq": self._seq, "at": time.time(), **told}
            self._file.write(json.dumps(event, separators=(",", ":"), allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_events(path: str | os.PathLike[str], offset: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (offset after the event, event) for every complete line from byte `offset` on; a torn last line waits.

    A complete line that is no JSON object is passed over: a writer was killed in the middle of it.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed by the `with` below
    except FileNotFoundError:
        return
    with file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            event = _parse(line)
            if event is not None:
                yield offset, event


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


def _is_torn(path: Path) -> bool:
    """Whether the file ends in the middle of a line."""
    content = path.read_bytes()
    return bool(content) and not content.endswith(b"\n")


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
