"""New jobs: admitted and written, many in one transaction, each with the beginning of its history.

Every submit takes this way, so it has few statements for many jobs, and they name tables, not classes: the unit of work
costs more than the statements.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import Table, bindparam, func, insert, select, update
from sqlalchemy.orm import Session
from ulid import ULID

from service.errors import InvalidRequestError, Issue, TooManyError
from service.lifecycle import JobState
from service.schemas import Job
from service.store.database import mark_changed
from service.store.journal import event_values
from service.store.views import job_view
from service.tables import EventRow, JobRow, LabelRow, UserRow
from workers.contract import JobSpec

IDEMPOTENCY_S = 24 * 3600.0
QUEUED_DATA = {"from": JobState.VALIDATING, "to": JobState.QUEUED}
QUEUED_WORDS = f"{JobState.VALIDATING} → {JobState.QUEUED}"
_JOBS, _EVENTS, _LABELS = (cast(Table, row.__table__) for row in (JobRow, EventRow, LabelRow))
_WAITING = (
    select(func.count())
    .where(JobRow.state == JobState.QUEUED, JobRow.owner == UserRow.id)
    .correlate(UserRow)
    .scalar_subquery()
)
_OWNERS = select(UserRow.id, UserRow.name, UserRow.max_priority, UserRow.max_queued, _WAITING).where(
    UserRow.id.in_(bindparam("owners", expanding=True))
)
_KEYED = select(JobRow).where(
    JobRow.owner.in_(bindparam("owners", expanding=True)), JobRow.idempotency_key.in_(bindparam("keys", expanding=True))
)


@dataclass(frozen=True)
class Submit:
    """One request for a job. `key` makes it safe to send again, `trace` is the request's traceparent."""

    spec: JobSpec
    owner: str
    key: str | None = None
    trace: str | None = None


Made = tuple[Job, bool]  # a job, and whether this request made it


@dataclass
class _Owner:
    """Who submits, and what they may still have."""

    name: str
    max_priority: int
    max_queued: int
    waiting: int

    def admit(self, spec: JobSpec) -> None:
        """Count one job more. Raises InvalidRequestError, TooManyError."""
        if spec.priority > self.max_priority:
            message = (
                f"Your jobs may have a priority of at most {self.max_priority}; lower it, or ask an administrator."
            )
            raise InvalidRequestError([Issue("priority", message, "priority_too_high")])
        if self.waiting >= self.max_queued:
            message = f"You have {self.waiting} jobs waiting, as many as you may."
            remedy = "Wait for some to start or cancel some, or ask an administrator for more (max_queued)."
            raise TooManyError(message, code="queue_full", remedy=remedy)
        self.waiting += 1


def submit_all(session: Session, asked: Sequence[Submit], max_queued: int) -> list[Made | Exception]:
    """Make the jobs, in the order of `asked`; for each what it made, or why nothing was made for it.

    `max_queued` is for users without a limit of their own. A key that was used within 24 hours gives what it made then,
    however many wait; with another body it is refused.
    """
    keyed = _keyed(session, asked)
    stale = [row.id for row in keyed.values() if _is_stale(row)]
    if stale:
        session.execute(update(_JOBS).where(_JOBS.c.id.in_(stale)).values(idempotency_key=None))
    known = {place: row for place, row in keyed.items() if row.id not in stale}
    owners = _owners(session, {submit.owner for submit in asked}, max_queued)
    fresh: list[tuple[dict[str, Any], JobSpec]] = []
    outcomes: list[Made | Exception] = []
    for submit in asked:
        owner, place = owners[submit.owner], (submit.owner, submit.key)
        try:
            if submit.key is not None and place in known:
                outcomes.append((_replayed(known[place], submit.spec, owner.name), False))
                continue
            owner.admit(submit.spec)
        except (InvalidRequestError, TooManyError) as error:
            outcomes.append(error)
            continue
        values = _values(submit)
        row = JobRow(**values)
        fresh.append((values, submit.spec))
        known[place] = row
        outcomes.append((job_view(row, owner.name, None), True))
    _insert(session, fresh)
    return outcomes


def replay(session: Session, submit: Submit) -> Job | None:
    """What the key made before, if anything. Raises InvalidRequestError on another body."""
    row = _keyed(session, [submit]).get((submit.owner, submit.key))
    if row is None or _is_stale(row):
        return None
    user = session.get(UserRow, submit.owner)
    return _replayed(row, submit.spec, user.name if user else None)


def _insert(session: Session, jobs: Sequence[tuple[dict[str, Any], JobSpec]]) -> None:
    """Write the rows of new jobs, of their metadata and of the beginning of their history."""
    if not jobs:
        return
    # In one order in all processes: two that bring the same keys in two orders would wait for each other.
    rows = sorted((row for row, _ in jobs), key=lambda row: (row["owner"], row["idempotency_key"] or "", row["id"]))
    session.execute(insert(_JOBS), rows)
    session.execute(insert(_EVENTS), [event for row in rows for event in _history(row["id"], row["created_at"])])
    labels = [
        {"job_id": row["id"], "key": key, "value": value} for row, spec in jobs for key, value in spec.metadata.items()
    ]
    if labels:
        session.execute(insert(_LABELS), labels)
    for row in rows:
        mark_changed(session, row["id"])


def _history(job_id: str, at: float) -> list[dict[str, Any]]:
    return [
        event_values(job_id, 1, "job.created", "the request passed its checks", at=at),
        event_values(job_id, 2, "job.status", QUEUED_WORDS, data=QUEUED_DATA, at=at),
    ]


def _owners(session: Session, ids: set[str], max_queued: int) -> dict[str, _Owner]:
    rows = session.execute(_OWNERS, {"owners": sorted(ids)})
    return {
        user_id: _Owner(name, priority, max_queued if own is None else own, waiting)
        for user_id, name, priority, own, waiting in rows
    }


def _keyed(session: Session, asked: Sequence[Submit]) -> Mapping[tuple[str, str | None], JobRow]:
    """What the keys of these requests have made, by owner and key."""
    keys = sorted({submit.key for submit in asked if submit.key is not None})
    if not keys:
        return {}
    owners = sorted({submit.owner for submit in asked})
    rows = session.scalars(_KEYED, {"owners": owners, "keys": keys})
    return {(row.owner, row.idempotency_key): row for row in rows}


def _is_stale(row: JobRow) -> bool:
    """Whether the key of this job may be used anew."""
    return time.time() - row.created_at > IDEMPOTENCY_S


def _replayed(row: JobRow, spec: JobSpec, owner: str | None) -> Job:
    """The first answer again: the job as it was when it was made, whatever became of it."""
    if row.fingerprint != _fingerprint(spec.model_dump(mode="json")):
        message = "This Idempotency-Key was used with another body; take a new key for a new job."
        raise InvalidRequestError([Issue("", message, "idempotency_key_reused")])
    fresh = JobRow(
        id=row.id, owner=row.owner, spec=row.spec, state=JobState.QUEUED, attempt=0, priority=row.spec["priority"],
        created_at=row.created_at,
    )  # fmt: skip
    return job_view(fresh, owner, None)


def _values(submit: Submit) -> dict[str, Any]:
    """The columns of a new job."""
    spec = submit.spec
    now, job_id, told = time.time(), f"ftjob_{ULID()}", spec.model_dump(mode="json")
    said = (job_id, spec.name, spec.model, spec.dataset, *spec.metadata.values())
    return {
        "id": job_id,
        "owner": submit.owner,
        "idempotency_key": submit.key,
        "fingerprint": _fingerprint(told),
        "spec": told,
        "model": spec.model,
        "search": "\n".join(part.lower() for part in said if part),
        "trace": submit.trace,
        "state": JobState.QUEUED,
        "priority": spec.priority,
        "queued_at": now,
        "queue_deadline": None if spec.queue_timeout_s is None else now + spec.queue_timeout_s,
        "requeue": False,
        "attempt": 0,
        "last_seq": 2,
        "created_at": now,
    }


def _fingerprint(told: dict[str, Any]) -> str:
    """What tells one spec, as JSON has it, from another."""
    canonical = json.dumps(told, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
