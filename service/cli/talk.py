"""Words on the terminal. Job names and messages are others' text: their control characters never reach the terminal."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from service.schemas import Artifact, Event, Job

out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
err = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, stderr=True)

# C0 and C1 but tab and newline, what is invisible or turns the direction, half characters, tags
_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff"
    r"\U000e0000-\U000e007f]"
)
_quiet = False
_ID_WIDTH = 32  # an id that is cut cannot be copied
_WIDE = 200  # no terminal to fit into
_STYLES = {"succeeded": "green", "failed": "red", "cancelled": "yellow", "cancelling": "yellow", "running": "cyan"}


def clean(text: str) -> str:
    """The text with control and direction-changing characters written out as escapes; tabs and newlines stay."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found.group()):02x}", text)


def line(text: str) -> str:
    """`clean`, in one line."""
    return clean(text).replace("\n", " ").replace("\t", " ")


def set_manner(*, quiet: bool, no_color: bool) -> None:
    """How this process talks from now on; NO_COLOR in the environment has its say in any case."""
    global _quiet
    _quiet = quiet
    if no_color:
        out.no_color = err.no_color = True


def is_quiet() -> bool:
    return _quiet


def say(text: str) -> None:
    """Talk, on stderr; nothing where the user wants quiet."""
    if not _quiet:
        complain(text)


def complain(text: str) -> None:
    """What has to be said, on stderr."""
    err.print(clean(text))


def put(text: str) -> None:
    """Data, on stdout."""
    out.print(clean(text))


def put_styled(word: str, style: str, rest: str) -> None:
    """A line of data that begins with a coloured word."""
    out.print(Text(clean(word), style).append(clean(rest), style="default"))


def put_text(text: str) -> None:
    """A piece of a text, as it is but for what would harm the terminal."""
    sys.stdout.write(clean(text))
    sys.stdout.flush()


def put_json(value: Any) -> None:
    """One JSON document in one line, as the API sends it."""
    print(json.dumps(value.model_dump(mode="json") if isinstance(value, BaseModel) else value), flush=True)


def put_json_list(values: Iterable[BaseModel]) -> None:
    """A list as the API sends one."""
    put_json({"object": "list", "data": [value.model_dump(mode="json") for value in values]})


def put_job(job: Job) -> None:
    """A job as label and value, one a line."""
    rows = {
        "id": job.id,
        "name": job.name or "",
        "status": f"{job.status}{f' ({job.status_reason})' if job.status_reason else ''}",
        "model": job.model,
        "dataset": job.dataset,
        "owner": job.owner or "",
        "attempt": str(job.attempt),
        "outside": ", ".join(f"{key} {line(value)}" for key, value in (job.where or {}).items()) or "yes"
        if job.outside
        else "",
        "priority": str(job.priority) if job.priority else "",
        "queue": _queue_text(job),
        "labels": " ".join(f"{key}={line(value)}" for key, value in job.metadata.items()),
        "progress": progress_text(job),
        "compute": percent(job.usage.compute_fraction),
        "bytes": percent(job.usage.bytes_fraction),
        "error": f"{job.error.code} ({job.error.fault}): {job.error.message}" if job.error else "",
    }
    for label, value in rows.items():
        if value:
            out.print(Text(f"{label:10}{clean(value)}"))


def put_jobs(jobs: list[Job]) -> None:
    """Jobs as a table."""
    table = make_table("id", "name", "status", "model", "progress", "age")
    for job in jobs:
        status, name = status_text(job.status), line(job.name or "")
        if job.outside:
            status.append(" (outside)", style="default")
        table.add_row(job.id, name, status, line(job.model), progress_text(job), age(job.created_at))
    put_table(table)


def status_text(status: str) -> Text:
    return Text(line(status), _STYLES.get(status, ""))


def put_event(event: Event) -> None:
    at = time.strftime("%H:%M:%S", time.localtime(event.created_at))
    put(f"{event.seq:>5}  {at}  {event.level:8}{event.type:16}{line(event.message or json.dumps(event.data))}")


def put_rows(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table of anything; None is left empty."""
    table = make_table(*columns)
    for row in rows:
        table.add_row(*("" if cell is None else line(str(cell)) for cell in row))
    put_table(table)


def put_fields(rows: dict[str, Any]) -> None:
    """Label and value, one a line; what is empty is left away."""
    for label, value in rows.items():
        if value not in (None, "", []):
            put(f"{label:12}{line(str(value))}")


def put_artifacts(artifacts: list[Artifact]) -> None:
    table = make_table("name", "bytes", "sha256")
    for artifact in artifacts:
        table.add_row(line(artifact.name), f"{artifact.bytes or 0:,}", (artifact.sha256 or "")[:16])
    put_table(table)


def put_ledger(ledger: dict[str, Any]) -> None:
    """Predicted beside measured; rows and keys that this version does not know are shown as they come."""
    rows = [row for row in ledger.get("rows", []) if isinstance(row, dict)]
    if rows:
        table = make_table("", "predicted", "measured", "all FULL")
        for row in rows:
            figures = [_figure(row, key) for key in ("predicted", "measured", "all_full")]
            table.add_row(line(str(row.get("name", ""))), *figures)
        put_table(table)
    accuracy = ledger.get("accuracy") or {}
    if accuracy:
        put(f"accuracy    {percent(accuracy.get('before'))} before, {percent(accuracy.get('after'))} after")
    phases = ledger.get("phases") or {}
    if phases:
        put(
            "seconds     "
            + ", ".join(f"{name} {seconds:.1f}" for name, seconds in phases.items() if is_number(seconds))
        )
    if told := _memory_text(ledger.get("memory") or {}):
        put(f"memory      {told}")
    for key in ("steps", "checkpoint"):
        if ledger.get(key) is not None:
            put(f"{key:12}{ledger[key]}")


def _memory_text(memory: dict[str, Any]) -> str:
    """The most that each worker's process held, beside the forecast."""
    seen, told = (memory.get(name) or [] for name in ("measured_bytes", "predicted_bytes"))
    forecast = [f" ({each / 1e9:.2f} forecast)" if is_number(each) else "" for each in told] + [""] * len(seen)
    return ", ".join(f"w{w} {each / 1e9:.2f} GB{forecast[w]}" for w, each in enumerate(seen) if is_number(each))


def put_paths(paths: list[Path]) -> None:
    for path in paths:
        put(str(path))


def progress_text(job: Job) -> str:
    total = job.progress.total_steps
    return f"{job.progress.step}/{total} ({job.progress.fraction:.0%})" if total else ""


def percent(value: Any) -> str:
    return f"{value:.1%}" if is_number(value) else ""


def age(since: int) -> str:
    return duration(time.time() - since)


def duration(seconds: float) -> str:
    """In the largest unit of which it has at least one."""
    whole = max(0, int(seconds))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if whole >= size:
            return f"{whole // size} {unit}"
    return f"{whole} s"


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def make_table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True, min_width=_ID_WIDTH if column == "id" else None)
    return table


def put_table(table: Table) -> None:
    if out.is_terminal:
        out.print(table)
    else:
        Console(width=_WIDE, highlight=False, emoji=False).print(table)


def moment(at: float | None) -> str | None:
    return None if at is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _queue_text(job: Job) -> str:
    if job.queue_position is None:
        return ""
    start = (
        "" if job.estimated_start_at is None else f", starts in about {duration(job.estimated_start_at - time.time())}"
    )
    return f"place {job.queue_position}{start}"


def _figure(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not is_number(value):
        return "-"
    unit = str(row.get("unit") or "")
    return f"{value:.1%}" if unit == "fraction" else f"{value:.4g} {line(unit)}".rstrip()
