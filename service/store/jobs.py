"""Jobs as users see them: made, listed, read.

`owner` of a method narrows it to one user's jobs; None means everybody's, for administrators and the service itself.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from sqlalchemy import Select, Table, bindparam, func, insert, select, tuple_
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from ulid import ULID

from service.errors import InvalidRequestError, Issue, NotFoundError, TooManyError
from service.lifecycle import HOLDING, JobState
from service.schemas import Job, Page
from service.store.database import Database, mark_changed
from service.store.journal import event_values
from service.store.views import Standing, job_view
from service.tables import EventRow, JobRow, LabelRow, UserRow
from workers.contract import JobSpec

IDEMPOTENCY_S = 24 * 3600.0
QUEUED_DATA = {"from": JobState.VALIDATING, "to": JobState.QUEUED}
QUEUED_WORDS = f"{JobState.VALIDATING} → {JobState.QUEUED}"
# Tables, not classes: the unit of work costs more than the statements, and every request pays it.
_JOBS, _EVENTS, _LABELS = (cast(Table, row.__table__) for row in (JobRow, EventRow, LabelRow))
_WAITING = select(func.count()).where(JobRow.state == JobState.QUEUED, JobRow.owner == bindparam("owner"))
_ADMITTED = select(UserRow.name, UserRow.max_priority, UserRow.max_queued, _WAITING.scalar_subquery()).where(
    UserRow.id == bindparam("owner")
)
Standings = Callable[[], Mapping[str, Standing]]  # where the jobs that wait stand


@dataclass(frozen=True)
class JobQuery:
    """Which jobs to list, and from where on. `after` is the id of the last job of the page before.

    `search` is looked for in id, name, model, dataset and metadata, whatever the case; `metadata` has to match exactly.
    """

    after: str | None = None
    limit: int = 20
    order: str = "desc"
    status: tuple[str, ...] = ()
    model: str | None = None
    search: str | None = None
    owner: str | None = None
    created_after: float | None = None
    created_before: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


class Jobs:
    """The job shelf of the store."""

    def __init__(self, database: Database, max_queued: int) -> None:
        self._database = database
        self._max_queued = max_queued

    def create(
        self, spec: JobSpec, *, owner: str, idempotency_key: str | None = None, trace: str | None = None
    ) -> tuple[Job, bool]:
        """Put a job into the queue; (job, False) when this key made it before.

        Raises InvalidRequestError when the key made one of another body or the priority is more than the user may
        have, TooManyError when the user has too many jobs waiting.
        """
        with self._database.write() as session:
            return self._create(session, spec, owner, idempotency_key, trace)

    async def create_together(
        self, spec: JobSpec, *, owner: str, idempotency_key: str | None = None, trace: str | None = None
    ) -> tuple[Job, bool]:
        """The same, in one transaction with others that come at the same time: they wait for the disk once."""
        return await self._database.together(lambda session: self._create(session, spec, owner, idempotency_key, trace))

    def replay(self, spec: JobSpec, *, owner: str, idempotency_key: str) -> Job | None:
        """The answer that this key got before, if any. Raises InvalidRequestError on another body."""
        with self._database.read() as session:
            row = _keyed(session, owner, idempotency_key)
            return None if row is None or _is_stale(row) else _replayed(session, row, spec)

    def get(self, job_id: str, *, owner: str | None = None, standings: Standings = dict) -> Job:
        """One job; `standings` is asked only where it waits."""
        with self._database.read() as session:
            row = job_row(session, job_id, owner)
            name = owner_name(session, row.owner)
        return job_view(row, name, _standing(row, standings))

    def list(self, query: JobQuery, standings: Standings = dict) -> Page[Job]:
        """A page of jobs; `standings` is asked only where any of them waits."""
        with self._database.read() as session:
            rows = session.execute(_selection(session, query)).all()
        jobs = [job_view(row, name, _standing(row, standings)) for row, name in rows[: query.limit]]
        return page(jobs, [job.id for job in jobs], more=len(rows) > query.limit)

    def plans_in_use(self) -> dict[str, dict[str, Any]]:
        """The plans of the jobs that hold the cluster, by job."""
        with self._database.read() as session:
            wanted = select(JobRow.id, JobRow.plan).where(JobRow.state.in_(HOLDING), JobRow.plan.is_not(None))
            return {row.id: row.plan for row in session.execute(wanted)}

    def of_owner(self, owner: str, job_ids: set[str]) -> set[str]:
        """Which of the jobs are this user's."""
        with self._database.read() as session:
            wanted = select(JobRow.id).where(JobRow.owner == owner, JobRow.id.in_(job_ids))
            return set(session.scalars(wanted))

    def _create(
        self, session: Session, spec: JobSpec, owner: str, key: str | None, trace: str | None
    ) -> tuple[Job, bool]:
        row = _row(spec, owner, key, trace)
        try:
            with session.connection().begin_nested():
                return self._insert(session, row, spec), True
        except IntegrityError:
            # The key was used before, perhaps a moment ago by another process: what it made is there.
            if key is None:
                raise
        known = _free_key(session, owner, key, spec)
        return (self._insert(session, row, spec), True) if known is None else (known, False)

    def _insert(self, session: Session, row: dict[str, Any], spec: JobSpec) -> Job:
        """Write the job and the beginning of its history as plain statements: the way that every request takes."""
        job_id, at = row["id"], row["created_at"]
        events = [
            event_values(job_id, 1, "job.created", "the request passed its checks", at=at),
            event_values(job_id, 2, "job.status", QUEUED_WORDS, data=QUEUED_DATA, at=at),
        ]
        labels = [{"job_id": job_id, "key": key, "value": value} for key, value in spec.metadata.items()]
        name = _admitted(session, row["owner"], spec, self._max_queued)
        session.execute(insert(_JOBS), row)
        session.execute(insert(_EVENTS), events)
        if labels:
            session.execute(insert(_LABELS), labels)
        mark_changed(session, job_id)
        return job_view(JobRow(**row), name, None)


def _free_key(session: Session, owner: str, key: str, spec: JobSpec) -> Job | None:
    """What the key made, or None where that is so long ago that the key is free for another."""
    known = _keyed(session, owner, key)
    if known is None:
        return None
    if not _is_stale(known):
        return _replayed(session, known, spec)
    known.idempotency_key = None
    session.flush()
    return None


def job_row(session: Session, job_id: str, owner: str | None = None, *, lock: bool = False) -> JobRow:
    """The row of a job. Raises NotFoundError for another user's, too: whether it exists is not theirs to know."""
    row = session.get(JobRow, job_id, with_for_update=lock or None)
    if row is None or owner not in (None, row.owner):
        raise NotFoundError(f"There is no job {job_id[:60]}.", code="job_not_found", param="id")
    return row


def page(data: list[Any], ids: list[str], *, more: bool) -> Page[Any]:
    """A page of a list, with its cursors."""
    return Page(data=data, has_more=more, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None)


def owner_name(session: Session, user_id: str) -> str | None:
    """The name of the user who owns something; None of one who is not known."""
    user = session.get(UserRow, user_id)
    return user.name if user else None


def _row(spec: JobSpec, owner: str, key: str | None, trace: str | None) -> dict[str, Any]:
    """The columns of a new job."""
    now, job_id, told = time.time(), f"ftjob_{ULID()}", spec.model_dump(mode="json")
    said = (job_id, spec.name, spec.model, spec.dataset, *spec.metadata.values())
    return {
        "id": job_id,
        "owner": owner,
        "idempotency_key": key,
        "fingerprint": _fingerprint(told),
        "spec": told,
        "model": spec.model,
        "search": "\n".join(part.lower() for part in said if part),
        "trace": trace,
        "state": JobState.QUEUED,
        "priority": spec.priority,
        "queued_at": now,
        "queue_deadline": None if spec.queue_timeout_s is None else now + spec.queue_timeout_s,
        "requeue": False,
        "attempt": 0,
        "last_seq": 2,
        "created_at": now,
    }


def _standing(row: JobRow, standings: Standings) -> Standing | None:
    return standings().get(row.id) if row.state == JobState.QUEUED else None


def _keyed(session: Session, owner: str, key: str) -> JobRow | None:
    return session.scalar(select(JobRow).where(JobRow.owner == owner, JobRow.idempotency_key == key))


def _is_stale(row: JobRow) -> bool:
    """Whether the key of this job may be used anew."""
    return time.time() - row.created_at > IDEMPOTENCY_S


def _replayed(session: Session, row: JobRow, spec: JobSpec) -> Job:
    """The first answer again: the job as it was when it was made, whatever became of it."""
    if row.fingerprint != _fingerprint(spec.model_dump(mode="json")):
        message = "This Idempotency-Key was used with another body; take a new key for a new job."
        raise InvalidRequestError([Issue("", message, "idempotency_key_reused")])
    fresh = JobRow(
        id=row.id, owner=row.owner, spec=row.spec, state=JobState.QUEUED, attempt=0, priority=row.spec["priority"],
        created_at=row.created_at,
    )  # fmt: skip
    return job_view(fresh, owner_name(session, row.owner), None)


def _admitted(session: Session, owner: str, spec: JobSpec, default: int) -> str:
    """The name of the user, who may have one more job like this. Raises InvalidRequestError, TooManyError."""
    name, max_priority, max_queued, waiting = session.execute(_ADMITTED, {"owner": owner}).one()
    if spec.priority > max_priority:
        message = f"Your jobs may have a priority of at most {max_priority}; lower it, or ask an administrator."
        raise InvalidRequestError([Issue("priority", message, "priority_too_high")])
    if waiting >= (default if max_queued is None else max_queued):
        message = f"You have {waiting} jobs waiting, as many as you may."
        remedy = "Wait for some to start or cancel some, or ask an administrator for more (max_queued)."
        raise TooManyError(message, code="queue_full", remedy=remedy)
    return str(name)


def _fingerprint(told: dict[str, Any]) -> str:
    """What tells one spec, as JSON has it, from another."""
    canonical = json.dumps(told, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _selection(session: Session, query: JobQuery) -> Select[JobRow, str]:
    """One row more than the page, to see whether there is more. Rows move under load: hence a cursor, no offset."""
    wanted = select(JobRow, UserRow.name).outerjoin(UserRow, UserRow.id == JobRow.owner)
    if query.owner is not None:
        wanted = wanted.where(JobRow.owner == query.owner)
    if query.status:
        wanted = wanted.where(JobRow.state.in_(query.status))
    if query.model is not None:
        wanted = wanted.where(JobRow.model == query.model)
    if query.search:
        wanted = wanted.where(JobRow.search.contains(query.search.lower(), autoescape=True))
    if query.created_after is not None:
        wanted = wanted.where(JobRow.created_at > query.created_after)
    if query.created_before is not None:
        wanted = wanted.where(JobRow.created_at < query.created_before)
    for key, value in query.metadata.items():
        labelled = select(LabelRow.job_id).where(LabelRow.key == key, LabelRow.value == value)
        wanted = wanted.where(JobRow.id.in_(labelled))
    if query.after:
        start = job_row(session, query.after, query.owner)
        place, mark = tuple_(JobRow.created_at, JobRow.id), tuple_(start.created_at, start.id)
        wanted = wanted.where(place > mark if query.order == "asc" else place < mark)
    by = (JobRow.created_at, JobRow.id)
    return wanted.order_by(*(by if query.order == "asc" else [column.desc() for column in by])).limit(query.limit + 1)
