"""The two moves that all writing is made of: append an event, move a job. Both inside the caller's transaction."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session
from ulid import ULID

from service.lifecycle import JobState, check_move
from service.store.database import mark_changed
from service.tables import DeliveryRow, EventRow, JobRow, WebhookRow

_ANNOUNCED = frozenset({JobState.RUNNING, JobState.PAUSED, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})


def append(
    session: Session,
    job: JobRow,
    type: str,
    message: str = "",
    *,
    level: str = "info",
    data: dict[str, Any] | None = None,
    run_seq: int | None = None,
    at: float | None = None,
) -> None:
    """Add one line to the job's history."""
    job.last_seq += 1
    values = event_values(job.id, job.last_seq, type, message, level=level, data=data, at=at)
    session.add(EventRow(**{**values, "attempt": job.attempt, "run_seq": run_seq}))
    mark_changed(session, job.id)


def event_values(
    job_id: str,
    seq: int,
    type: str,
    message: str = "",
    *,
    level: str = "info",
    data: dict[str, Any] | None = None,
    at: float | None = None,
) -> dict[str, Any]:
    """The columns of one line of history that no attempt has said."""
    return {
        "job_id": job_id,
        "seq": seq,
        "attempt": 0,
        "run_seq": None,
        "type": type,
        "level": level,
        "message": message,
        "data": data or {},
        "created_at": time.time() if at is None else at,
    }


def move(
    session: Session,
    job: JobRow,
    state: JobState,
    *,
    message: str | None = None,
    error: dict[str, Any] | None = None,
    run_seq: int | None = None,
    at: float | None = None,
) -> None:
    """Move the job and say so in its history. Raises IllegalTransitionError."""
    old = JobState(job.state)
    check_move(old, state)
    job.state = state
    job.status_reason = None
    if state.is_final:
        job.finished_at = at or time.time()
    if error is not None:
        job.error = error
    if state in _ANNOUNCED:
        _announce(session, job, f"{job.kind}.{state}")
    data = {"from": old, "to": state, **({"error": error} if error else {})}
    level = "error" if state is JobState.FAILED else "info"
    text = message or (error or {}).get("message") or f"{old} → {state}"
    append(session, job, "job.status", text, level=level, data=data, run_seq=run_seq, at=at)


def explain(session: Session, job: JobRow, reason: str | None) -> None:
    """Say why the job waits where it is; says it once, not at every look."""
    if job.status_reason == reason:
        return
    job.status_reason = reason
    if reason:
        append(session, job, "job.status", reason, level="warning", data={"from": job.state, "to": job.state})
    mark_changed(session, job.id)


def _announce(session: Session, job: JobRow, type: str) -> None:
    """Put a message for each webhook that wants it into the outbox, in the transaction that makes it true."""
    wanted = select(WebhookRow).where(WebhookRow.owner == job.owner, WebhookRow.disabled_at.is_(None))
    wanted = wanted.with_for_update(read=True, key_share=True)  # not to be deleted before the message refers to it
    now = time.time()
    for webhook in session.scalars(wanted):
        if type not in webhook.types:
            continue
        id = f"evt_{ULID()}"
        body = {"id": id, "object": "event", "created_at": int(now), "type": type, "data": {"id": job.id}}
        session.add(
            DeliveryRow(id=id, webhook_id=webhook.id, body=body, state="pending", tries=0, next_at=now, created_at=now)
        )
