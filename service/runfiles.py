"""What the service itself writes and reads of a run: its context, and what its driver printed."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from service.home import write_private
from workers import control
from workers.contract import RunContext
from workers.sweeps.contract import SweepContext

LOG_TAIL_CHARS = 1500
KEPT_LOG_CHARS = 4_000_000
CONTEXT_FILE = "context.json"


def write_context(run_dir: Path, context: RunContext | SweepContext) -> Path:
    """Leave the context for the driver, private since it holds the run's token; where it is."""
    path = run_dir / CONTEXT_FILE
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_private(path, context.model_dump_json(indent=2))
    return path


def ask_end(run_dir: Path, *, cancelled: bool) -> None:
    """Have the driver end at once when it is stopped: it would write a checkpoint first.

    Where that cannot be left, it is stopped all the same.
    """
    with suppress(OSError):
        control.ask(run_dir, control.CANCEL if cancelled else control.END)


def keep_log(path: Path, text: str) -> None:
    """Keep the end of what was printed."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_private(path, text[-KEPT_LOG_CHARS:])


def read_tail(path: Path) -> str:
    """The end of a log; "" where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_TAIL_CHARS))
            return file.read(LOG_TAIL_CHARS).decode(errors="replace")
    except OSError:
        return ""
