"""What ended a worker, left in the run's directory where the driver looks for the root cause. No torch, no Ray."""

from __future__ import annotations

import json
import time
import traceback
from pathlib import Path
from typing import Any

from scheduler.errors import D2ftError, from_dict

FAILURES_DIR = "failures"
_ECHO_CODES = ("peer_lost", "transport_timeout")


def record(run_dir: Path, rank: int, error: Exception, known: D2ftError) -> None:
    """Leave a worker's error, as what it is known, where `root_cause` finds it."""
    path = run_dir / FAILURES_DIR / f"rank{rank}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    trace = "".join(traceback.format_exception(error))
    told = {"at": time.time(), "rank": rank, "type": type(error).__name__, "error": known.to_dict(), "trace": trace}
    path.write_text(json.dumps(told))


def root_cause(run_dir: Path) -> D2ftError | None:
    """The first failure that a worker recorded, but one that says only that a peer is gone comes last."""
    records = [json.loads(path.read_text()) for path in (run_dir / FAILURES_DIR).glob("rank*.json")]
    if not records:
        return None
    return from_dict(min(records, key=lambda record: (_is_echo(record), record["at"]))["error"])


def _is_echo(record: dict[str, Any]) -> bool:
    """Whether the failure is only what a worker sees when another one is gone."""
    return record["type"] in ("RuntimeError", "DistBackendError") or record["error"]["code"] in _ECHO_CODES
