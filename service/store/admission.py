"""New jobs and sweeps: admitted and written, many in one transaction, each with the beginning of its history.

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
from service.lifecycle import JOB, SWEEP, SWEEP_PREFIX, JobState
from service.store.database import mark_changed
from service.store.journal import event_values
from service.tables import EventRow, JobRow, LabelRow, UserRow
from workers.contract import JobSpec
from workers.sweeps.contract import SweepSpec

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
class Place:
    """Where a job belongs that a sweep asked for: `key` is its name within the sweep."""

    sweep_id: str
    key: str
    setting: dict[str, Any]
    baseline: str | None = None


@dataclass(frozen=True)
class Submit:
    """One request for a job or a sweep. `key` makes it safe to send again, `trace` is the request's traceparent."""

    spec: JobSpec | SweepSpec
    owner: str
    key: str | None = None
    trace: str | None = None
    place: Place | None = None


@dataclass(frozen=True)
class Placed:
    """The row of a job or sweep as it was when it was made, its owner's name, and whether this request made it."""

    row: JobRow
    owner: str | None
    fresh: bool


@dataclass
class _Owner:
    """Who submits, and what they may still have."""

    name: str
    max_priority: int
    max_queued: int
    waiting: int

    def admit(self, spec: JobSpec | SweepSpec) -> None:
        """Count one job more. Raises InvalidRequestError, TooManyError."""
        job = job_of(spec)
        if job.priority > self.max_priority:
            message = (
                f"Your jobs may have a priority of at most {self.max_priority}; lower it, or ask an administrator."
            )
            field = "priority" if job is spec else "job.priority"
            raise InvalidRequestError([Issue(field, message, "priority_too_high")])
        if self.waiting >= self.max_queued:
            message = f"You have {self.waiting} jobs waiting, as many as you may."
            remedy = "Wait for some to start or cancel some, or ask an administrator for more (max_queued)."
            raise TooManyError(message, code="queue_full", remedy=remedy)
        self.waiting += 1


def job_of(spec: JobSpec | SweepSpec) -> JobSpec:
    """The job itself, or what all jobs of a sweep have in common."""
    return spec.job if isinstance(spec, SweepSpec) else spec


def submit_all(session: Session, asked: Sequence[Submit], max_queued: int) -> list[Placed | Exception]:
    """Make the jobs, in the order of `asked`; for each what it made, or why nothing was made for it.

    `max_queued` is for users without a limit of their own. A key that was used within 24 hours gives what it made then,
    however many wait; with another body it is refused.
    """
    used = keyed(session, asked)
    stale = [row.id for row in used.values() if is_stale(row)]
    if stale:
        session.execute(update(_JOBS).where(_JOBS.c.id.in_(stale)).values(idempotency_key=None))
    known = {place: row for place, row in used.items() if row.id not in stale}
    owners = _owners(session, {submit.owner for submit in asked}, max_queued)
    fresh: list[tuple[dict[str, Any], JobSpec | SweepSpec]] = []
    outcomes: list[Placed | Exception] = []
    for submit in asked:
        owner, place = owners[submit.owner], (submit.owner, submit.key)
        try:
            if submit.key is not None and place in known:
                outcomes.append(_replayed(known[place], submit.spec, owner.name))
                continue
            owner.admit(submit.spec)
        except (InvalidRequestError, TooManyError) as error:
            outcomes.append(error)
            continue
        values = values_of(submit)
        row = JobRow(**values)
        fresh.append((values, submit.spec))
        known[place] = row
        outcomes.append(Placed(row, owner.name, True))
    _insert(session, fresh)
    return outcomes


def replay(session: Session, submit: Submit) -> Placed | None:
    """What the key made before, if anything. Raises InvalidRequestError on another body."""
    row = keyed(session, [submit]).get((submit.owner, submit.key))
    if row is None or is_stale(row):
        return None
    user = session.get(UserRow, submit.owner)
    return _replayed(row, submit.spec, user.name if user else None)


def _insert(session: Session, jobs: Sequence[tuple[dict[str, Any], JobSpec | SweepSpec]]) -> None:
    """Write the rows of new jobs, of their metadata and of the beginning of their history."""
    if not jobs:
        return
    # In one order in all processes: two that bring the same keys in two orders would wait for each other.
    rows = sorted((row for row, _ in jobs), key=lambda row: (row["owner"], row["idempotency_key"] or "", row["id"]))
    session.execute(insert(_JOBS), rows)
    session.execute(insert(_EVENTS), [event for row in rows for event in _history(row)])
    labels = [
        {"job_id": row["id"], "key": key, "value": value} for row, spec in jobs for key, value in spec.metadata.items()
    ]
    if labels:
        session.execute(insert(_LABELS), labels)
    for row in rows:
        mark_changed(session, row["id"])


def _history(row: dict[str, Any]) -> list[dict[str, Any]]:
    job_id, at = row["id"], row["created_at"]
    said = "the request passed its checks" if row["parent_id"] is None else f"a trial of {row['parent_id']}"
    return [
        event_values(job_id, 1, "job.created", said, at=at),
        event_values(job_id, 2, "job.status", QUEUED_WORDS, data=QUEUED_DATA, at=at),
    ]


def _owners(session: Session, ids: set[str], max_queued: int) -> dict[str, _Owner]:
    rows = session.execute(_OWNERS, {"owners": sorted(ids)})
    return {
        user_id: _Owner(name, priority, max_queued if own is None else own, waiting)
        for user_id, name, priority, own, waiting in rows
    }


def keyed(session: Session, asked: Sequence[Submit]) -> Mapping[tuple[str, str | None], JobRow]:
    """What the keys of these requests have made, by owner and key."""
    keys = sorted({submit.key for submit in asked if submit.key is not None})
    if not keys:
        return {}
    owners = sorted({submit.owner for submit in asked})
    rows = session.scalars(_KEYED, {"owners": owners, "keys": keys})
    return {(row.owner, row.idempotency_key): row for row in rows}


def key_reused(for_what: str) -> InvalidRequestError:
    """The key of a request made something of another body."""
    message = f"This Idempotency-Key was used with another body; take a new key for {for_what}."
    return InvalidRequestError([Issue("", message, "idempotency_key_reused")])


def is_stale(row: JobRow) -> bool:
    """Whether the key of this job may be used anew."""
    return time.time() - row.created_at > IDEMPOTENCY_S


def _replayed(row: JobRow, spec: JobSpec | SweepSpec, owner: str | None) -> Placed:
    """The first answer again: the job as it was when it was made, whatever became of it."""
    if row.fingerprint != fingerprint_of(spec.model_dump(mode="json")):
        raise key_reused("a new job")
    fresh = JobRow(
        id=row.id, kind=row.kind, owner=row.owner, spec=row.spec, state=JobState.QUEUED, attempt=0,
        priority=job_of(spec).priority, created_at=row.created_at,
    )  # fmt: skip
    return Placed(fresh, owner, False)


def values_of(submit: Submit) -> dict[str, Any]:
    """The columns of a new job or sweep."""
    spec, job, place = submit.spec, job_of(submit.spec), submit.place
    now, told = time.time(), spec.model_dump(mode="json")
    job_id = f"ftjob_{ULID()}" if job is spec else f"{SWEEP_PREFIX}{ULID()}"
    said = (job_id, spec.name, job.model, job.dataset, *spec.metadata.values())
    return {
        "id": job_id,
        "kind": JOB if job is spec else SWEEP,
        "owner": submit.owner,
        "parent_id": place and place.sweep_id,
        "trial_key": place and place.key,
        "setting": place and place.setting,
        "baseline": place and place.baseline,
        "idempotency_key": submit.key,
        "fingerprint": fingerprint_of(told),
        "spec": told,
        "model": job.model,
        "search": "\n".join(part.lower() for part in said if part),
        "trace": submit.trace,
        "state": JobState.QUEUED,
        "priority": job.priority,
        "queued_at": now,
        "queue_deadline": None if job.queue_timeout_s is None else now + job.queue_timeout_s,
        "requeue": False,
        "attempt": 0,
        "last_seq": 2,
        "created_at": now,
    }


def fingerprint_of(told: dict[str, Any]) -> str:
    """What tells one spec, as JSON has it, from another."""
    canonical = json.dumps(told, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
