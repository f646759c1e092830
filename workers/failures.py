"""What ended a worker, left in the run's directory where the driver looks for the root cause. No torch, no Ray."""

from __future__ import annotations

import json
import time
import traceback
from pathlib import Path
from typing import Any

from scheduler.errors import D2ftError, from_dict
from workers.disk import leave

FAILURES_DIR = "failures"
_ECHO_CODES = ("peer_lost", "transport_timeout")


def record(run_dir: Path, rank: int, error: Exception, known: D2ftError) -> None:
    """Leave a worker's error, as what it is known, where `root_cause` finds it."""
    trace = "".join(traceback.format_exception(error))
    told = {"at": time.time(), "rank": rank, "type": type(error).__name__, "error": known.to_dict(), "trace": trace}
    _leave(run_dir, f"rank{rank}.json", told)


def record_stall(run_dir: Path, rank: int, known: D2ftError, stacks: str) -> None:
    """Leave, for a worker that cannot say so itself, that it stalled, before it is killed.

    It is the cause of all that is recorded later, whatever the clocks of the machines say; not of a failure that is
    there already. The file is not the worker's own, which may still write one when it is about to die.
    """
    first = not any(not _is_echo(earlier) for earlier in _records(run_dir))
    told = {"at": time.time(), "rank": rank, "type": type(known).__name__, "error": known.to_dict(), "trace": stacks}
    _leave(run_dir, f"rank{rank}-stalled.json", {**told, "first": first})


def root_cause(run_dir: Path) -> D2ftError | None:
    """The first failure that a worker recorded, but one that says only that a peer is gone comes last."""
    records = _records(run_dir)
    if not records:
        return None
    return from_dict(min(records, key=_urgency)["error"])


def _records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((run_dir / FAILURES_DIR).glob("rank*.json"))]


def _leave(run_dir: Path, name: str, told: dict[str, Any]) -> None:
    path = run_dir / FAILURES_DIR / name
    path.parent.mkdir(parents=True, exist_ok=True)
    leave(path, json.dumps(told))


def _urgency(record: dict[str, Any]) -> tuple[bool, bool, float]:
    return _is_echo(record), not record.get("first", False), record["at"]


def _is_echo(record: dict[str, Any]) -> bool:
    """Whether the failure is only what a worker sees when another one is gone."""
    return record["type"] in ("RuntimeError", "DistBackendError") or record["error"]["code"] in _ECHO_CODES
