"""The control file: what somebody outside wants of a run, left in its directory where rank 0 looks between two steps.

A file needs nobody who listens, and one that comes early is found later. It stays where it is, as an answer to why the
run ended. What may be wanted:

    pause     a checkpoint after this step, and the end
    drain     the same, for a machine that is to be switched off: the job goes on elsewhere, and no failure is counted
    regroup   a checkpoint at the end of this window, and a group of another size
    cancel    nothing more: the driver ends as soon as it is told to, without a checkpoint
    end       the same, for a run that nobody follows any more though its job is not cancelled
"""

from __future__ import annotations

import json
from pathlib import Path

from workers.disk import leave

CONTROL_FILE = "control.json"
PAUSE, DRAIN, REGROUP, CANCEL, END = "pause", "drain", "regroup", "cancel", "end"
PAUSED_FILE = "paused.json"  # what rank 0 leaves for the driver when the group has stopped at a checkpoint


def ask(run_dir: str | Path, want: str) -> None:
    """Leave a wish; a reader finds it whole or not at all."""
    leave(Path(run_dir) / CONTROL_FILE, json.dumps({"want": want}))


def take_back(run_dir: str | Path) -> None:
    """What was wanted has been done, and the run goes on."""
    (Path(run_dir) / CONTROL_FILE).unlink(missing_ok=True)


def asked(run_dir: str | Path) -> str | None:
    """What is wanted; None where nothing is. Without a file this is one look at a directory."""
    path = Path(run_dir) / CONTROL_FILE
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None  # being written, or no file of ours
    return str(found["want"]) if isinstance(found, dict) and "want" in found else None
