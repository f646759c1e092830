"""Jobs as users see them: made, listed, read, cancelled."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, func, select, tuple_
from sqlalchemy.orm import Session, undefer
from ulid import ULID

from service.errors import ConflictError, InvalidRequestError, Issue, NotFoundError
from service.lifecycle import FINAL, JobState
from service.schemas import Artifact, Event, Job, MetricsPage, Page
from service.store.database import Database
from service.store.journal import append, move
from service.store.views import artifact_view, event_view, job_view
from service.tables import ArtifactRow, AttemptRow, EventRow, JobRow, MetricRow
from workers.contract import JobSpec

_WAITING = frozenset({JobState.QUEUED, JobState.PAUSED})
_HOLDING = frozenset(JobState) - FINAL - _WAITING - {JobState.VALIDATING}


@dataclass(frozen=True)
class JobQuery:
    """Which jobs to list, and from where on. `after` is the id of the last job of the page before."""

    after: str | None = None
    limit: int = 20
    order: str = "desc"
    status: str | None = None


@dataclass(frozen=True)
class StoredArtifact:
    """Where a downloadable file of an attempt lies."""

    name: str
    path: str
    sha256: str | None


class Jobs:
    """The job shelf of the store."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, spec: JobSpec, *, owner: str, idempotency_key: str | None = None) -> tuple[Job, bool]:
        """Put a job into the queue; (job, False) when this key made it before.

        Raises InvalidRequestError when it made one of another body.
        """
        with self._database.write() as session:
            known = _replayed(session, spec, owner, idempotency_key)
            if known is not None:
                return job_view(known), False
            row = JobRow(
                id=f"ftjob_{ULID()}",
                owner=owner,
                idempotency_key=idempotency_key,
                fingerprint=_fingerprint(spec),
                spec=spec.model_dump(mode="json"),
                state=JobState.VALIDATING,
                attempt=0,
                last_seq=0,
                created_at=time.time(),
            )
            session.add(row)
            session.flush()
            append(session, row, "job.created", "the request passed its checks")
            move(session, row, JobState.QUEUED)
            return job_view(row), True

    def replay(self, spec: JobSpec, *, owner: str, idempotency_key: str | None) -> Job | None:
        """The job that this key made before, if any. Raises InvalidRequestError on another body."""
        with self._database.read() as session:
            row = _replayed(session, spec, owner, idempotency_key)
            return None if row is None else job_view(row)

    def get(self, job_id: str) -> Job:
        with self._database.read() as session:
            return job_view(_job(session, job_id))

    def list(self, query: JobQuery) -> Page[Job]:
        with self._database.read() as session:
            rows = list(session.scalars(_selection(session, query)))
        jobs = [job_view(row) for row in rows[: query.limit]]
        return _page(jobs, [job.id for job in jobs], more=len(rows) > query.limit)

    def cancel(self, job_id: str) -> Job:
        """Ask for the end of a job: at once while it waits, otherwise once its driver has let go.

        Asking again is harmless. Raises ConflictError when it has already succeeded or failed.
        """
        with self._database.write() as session:
            row = _job(session, job_id)
            state = JobState(row.state)
            if state in (JobState.SUCCEEDED, JobState.FAILED):
                raise ConflictError(f"Job {job_id} has already {state}; it cannot be cancelled.", code="job_is_final")
            if state in _WAITING:
                move(session, row, JobState.CANCELLED, message="cancelled before it started")
            elif state not in (JobState.CANCELLING, JobState.CANCELLED):
                move(session, row, JobState.CANCELLING, message="cancel was asked for")
            return job_view(row)

    def events(self, job_id: str, *, after: int = 0, limit: int = 100) -> Page[Event]:
        """History from `after` on, oldest first."""
        with self._database.read() as session:
            _job(session, job_id)
            wanted = select(EventRow).where(EventRow.job_id == job_id, EventRow.seq > after)
            rows = list(session.scalars(wanted.order_by(EventRow.seq).limit(limit + 1)))
        events = [event_view(row) for row in rows[:limit]]
        return _page(events, [str(event.seq) for event in events], more=len(rows) > limit)

    def metrics(self, job_id: str, *, max_points: int) -> MetricsPage:
        """The steps, thinned evenly; the newest is always among them."""
        with self._database.read() as session:
            _job(session, job_id)
            total = session.scalar(select(func.count()).where(MetricRow.job_id == job_id)) or 0
            stride = max(1, -(-total // max_points))
            ranked = (
                select(MetricRow.values, func.row_number().over(order_by=MetricRow.step.desc()).label("rank"))
                .where(MetricRow.job_id == job_id)
                .subquery()
            )
            kept = select(ranked.c["values"]).where((ranked.c.rank - 1) % stride == 0).order_by(ranked.c.rank.desc())
            return MetricsPage(data=list(session.scalars(kept)), total=total)

    def plan(self, job_id: str) -> dict[str, Any]:
        return self._document(job_id, "plan", "It appears once the workers have measured themselves.")

    def ledger(self, job_id: str) -> dict[str, Any]:
        return self._document(job_id, "ledger", "It appears when the job ends.")

    def artifacts(self, job_id: str) -> Sequence[Artifact]:
        with self._database.read() as session:
            _job(session, job_id)
            wanted = select(ArtifactRow).where(ArtifactRow.job_id == job_id).order_by(ArtifactRow.name)
            return [artifact_view(row) for row in session.scalars(wanted)]

    def artifact(self, job_id: str, name: str) -> StoredArtifact:
        with self._database.read() as session:
            _job(session, job_id)
            row = session.get(ArtifactRow, (job_id, name))
            if row is None:
                raise NotFoundError(
                    f"Job {job_id} has no artifact of that name.", code="artifact_not_found", param="name"
                )
            return StoredArtifact(row.name, row.path, row.sha256)

    def submission_id(self, job_id: str, attempt: int | None) -> tuple[int, str]:
        """(number, Ray's id) of an attempt, by default the newest. Raises NotFoundError."""
        with self._database.read() as session:
            number = _job(session, job_id).attempt if attempt is None else attempt
            row = session.get(AttemptRow, (job_id, number))
            if row is None:
                raise NotFoundError(f"Job {job_id} has no attempt {number}.", code="attempt_not_found", param="attempt")
            return number, row.submission_id

    def plans_in_use(self) -> dict[str, dict[str, Any]]:
        """The plans of the jobs that hold the cluster, by job."""
        with self._database.read() as session:
            wanted = select(JobRow.id, JobRow.plan).where(JobRow.state.in_(_HOLDING), JobRow.plan.is_not(None))
            return {row.id: row.plan for row in session.execute(wanted)}

    def count(self, state: JobState) -> int:
        with self._database.read() as session:
            return session.scalar(select(func.count()).where(JobRow.state == state)) or 0

    def _document(self, job_id: str, column: str, when: str) -> dict[str, Any]:
        with self._database.read() as session:
            row = session.get(JobRow, job_id, options=[undefer(getattr(JobRow, column))])
            if row is None:
                raise _no_job(job_id)
            document: dict[str, Any] | None = getattr(row, column)
            if document is None:
                raise NotFoundError(f"Job {job_id} has no {column} yet.", code=f"{column}_not_found", remedy=when)
            return document


def _job(session: Session, job_id: str) -> JobRow:
    row = session.get(JobRow, job_id)
    if row is None:
        raise _no_job(job_id)
    return row


def _no_job(job_id: str) -> NotFoundError:
    return NotFoundError(f"There is no job {job_id[:60]}.", code="job_not_found", param="id")


def _replayed(session: Session, spec: JobSpec, owner: str, key: str | None) -> JobRow | None:
    if key is None:
        return None
    row = session.scalar(select(JobRow).where(JobRow.owner == owner, JobRow.idempotency_key == key))
    if row is not None and row.fingerprint != _fingerprint(spec):
        message = "This Idempotency-Key was used with another body; take a new key for a new job."
        raise InvalidRequestError([Issue("", message, "idempotency_key_reused")])
    return row


def _fingerprint(spec: JobSpec) -> str:
    canonical = json.dumps(spec.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _selection(session: Session, query: JobQuery) -> Select[JobRow]:
    """One row more than the page, to see whether there is more. Rows move under load: hence a cursor, no offset."""
    place = tuple_(JobRow.created_at, JobRow.id)
    wanted = select(JobRow)
    if query.status:
        wanted = wanted.where(JobRow.state == query.status)
    if query.after:
        start = _job(session, query.after)
        mark = tuple_(start.created_at, start.id)
        wanted = wanted.where(place > mark if query.order == "asc" else place < mark)
    by = (JobRow.created_at, JobRow.id)
    return wanted.order_by(*(by if query.order == "asc" else [column.desc() for column in by])).limit(query.limit + 1)


def _page(data: list[Any], ids: list[str], *, more: bool) -> Page[Any]:
    return Page(data=data, has_more=more, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None)
