"""Attempts as the supervisor sees them: followed, ended, settled. Opened by `queue.claim` and `outside.begin`.

Every write names the attempt's token: when the row has another, or the attempt has ended, the writer has lost its job
and stands down.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from scheduler import failpoints
from service.errors import LostAttemptError
from service.lifecycle import JOB, JobState
from service.queueing import decayed
from service.store.absorb import RunEvent, absorb_events
from service.store.actions import requeue
from service.store.database import Database
from service.store.journal import explain, move
from service.store.losses import lose
from service.tables import AttemptRow, EventRow, JobRow, UserRow
from workers.contract import JobSpec
from workers.sweeps.contract import SweepSpec

CREATED, SUBMITTED, ENDED, SETTLED = "created", "submitted", "ended", "settled"


@dataclass(frozen=True)
class Attempt:
    """One attempt of a job or, by `kind`, of a sweep, as it was when read; `told` is the spec as JSON."""

    job_id: str
    kind: str
    n: int
    token: str
    submission_id: str
    state: str
    events_offset: int
    job_state: JobState
    status_reason: str | None
    want: str | None
    told: dict[str, Any]
    outside: bool
    trace: str | None
    created_at: float
    ended_at: float | None

    @cached_property
    def spec(self) -> JobSpec:
        return JobSpec.model_validate(self.told)

    @cached_property
    def sweep_spec(self) -> SweepSpec:
        """Of a sweep. It tries out all settings, so it is not read at every look."""
        return SweepSpec.model_validate(self.told)

    @property
    def workers(self) -> int:
        """Those that it holds; a sweep's are its trials'."""
        return self.spec.workers if self.kind == JOB else 0


class Attempts:
    """The attempt shelf of the store. `max_faults`: attempts of one job that may be lost to faults of the system."""

    def __init__(self, database: Database, max_faults: int) -> None:
        self._database = database
        self._max_faults = max_faults

    def open(self) -> list[Attempt]:
        """The attempts on the cluster that are not settled, oldest first."""
        with self._database.read() as session:
            wanted = select(AttemptRow, JobRow).join(JobRow)
            wanted = wanted.where(AttemptRow.state != SETTLED, JobRow.outside.is_(False))
            rows = session.execute(wanted.order_by(AttemptRow.created_at)).all()
            return [attempt_view(row, job) for row, job in rows]

    def by_token(self, token: str) -> Attempt | None:
        """The attempt that may post with this token, or None; one that has ended may not."""
        with self._database.read() as session:
            wanted = select(AttemptRow, JobRow).join(JobRow).where(AttemptRow.token == token)
            found = session.execute(wanted).first()
            if found is None or not hmac.compare_digest(found[0].token, token):
                return None
            row, job = found
            return attempt_view(row, job) if row.state in (CREATED, SUBMITTED) else None

    def mark_submitted(self, attempt: Attempt) -> None:
        """Ray has taken the attempt."""
        with self._database.write() as session:
            row, job = own(session, attempt)
            row.state = SUBMITTED
            if job.state == JobState.PLANNING:
                move(session, job, JobState.STARTING, message="the cluster has taken the attempt")

    def absorb(self, attempt: Attempt, events: Sequence[RunEvent], offset: int) -> Attempt:
        """Take over lines of the run's file, each at most once, and remember how far it was read.

        A line that the table of moves does not allow is kept as history and moves nothing.
        """
        with failpoints.passing("supervisor.absorb"), self._database.write() as session:
            row, job = own(session, attempt)
            known = _known(session, attempt, events)
            fresh = (event for event in events if event["seq"] not in known)
            absorb_events(session, job, fresh, _is_over, self._max_faults)
            row.events_offset = max(offset, row.events_offset)
            row.heard_at = time.time() if job.outside else None
            close_if_over(session, row, job)
            return attempt_view(row, job)

    def finish(
        self, attempt: Attempt, state: JobState, *, error: dict[str, Any] | None = None, message: str | None = None
    ) -> None:
        """Decide the job."""
        with failpoints.passing("supervisor.finish"), self._database.write() as session:
            row, job = own(session, attempt)
            move(session, job, state, error=error, message=message)
            close_if_over(session, row, job)

    def lose(self, attempt: Attempt, error: dict[str, Any]) -> None:
        """End an attempt that a fault took before it said a last word; the job gets another, or fails."""
        with failpoints.passing("supervisor.finish"), self._database.write() as session:
            row, job = own(session, attempt)
            lose(session, job, error, self._max_faults)
            close_if_over(session, row, job)

    def settle(self, attempt: Attempt) -> None:
        """Ray has let go of the attempt: its devices are free, and what it used counts for its user."""
        with failpoints.passing("supervisor.settle"), self._database.write() as session:
            row = session.get(AttemptRow, (attempt.job_id, attempt.n), with_for_update=True)
            if row is None or row.token != attempt.token or row.state != ENDED:
                return
            row.state = SETTLED
            _charge(session, row, attempt.workers)

    def explain(self, attempt: Attempt, reason: str | None) -> None:
        """Say why the attempt waits."""
        with self._database.write() as session:
            _, job = own(session, attempt)
            explain(session, job, reason)

    def is_open(self, submission_id: str) -> bool:
        """Whether Ray's job of this id is one that we still follow."""
        with self._database.read() as session:
            state = session.scalar(select(AttemptRow.state).where(AttemptRow.submission_id == submission_id))
            return state is not None and state != SETTLED


def next_attempt(session: Session, job: JobRow, state: str) -> AttemptRow:
    """A job's next attempt, with a token of its own."""
    job.attempt += 1
    job.started_at = job.started_at or time.time()
    row = AttemptRow(
        job_id=job.id,
        n=job.attempt,
        token=f"run_{secrets.token_urlsafe(24)}",
        submission_id=f"job-{job.id}-a{job.attempt}",
        state=state,
        events_offset=0,
        created_at=time.time(),
    )
    session.add(row)
    return row


def attempt_view(row: AttemptRow, job: JobRow) -> Attempt:
    return Attempt(
        job_id=row.job_id,
        kind=job.kind,
        n=row.n,
        token=row.token,
        submission_id=row.submission_id,
        state=row.state,
        events_offset=row.events_offset,
        job_state=JobState(job.state),
        status_reason=job.status_reason,
        want=job.want,
        told=job.spec,
        outside=job.outside,
        trace=job.trace,
        created_at=row.created_at,
        ended_at=row.ended_at,
    )


def own(session: Session, attempt: Attempt) -> tuple[AttemptRow, JobRow]:
    """The rows behind an attempt that still owns its job. Raises LostAttemptError."""
    job = session.get(JobRow, attempt.job_id, with_for_update=True)
    row = session.get(AttemptRow, (attempt.job_id, attempt.n), with_for_update=True)
    owns = row is not None and row.token == attempt.token and row.state in (CREATED, SUBMITTED)
    if row is None or job is None or not owns or job.attempt != attempt.n:
        raise LostAttemptError(f"attempt {attempt.n} of {attempt.job_id} no longer owns its job", code="lost_attempt")
    return row, job


def _known(session: Session, attempt: Attempt, events: Sequence[RunEvent]) -> set[int]:
    if not events:
        return set()
    wanted = select(EventRow.run_seq).where(
        EventRow.job_id == attempt.job_id,
        EventRow.attempt == attempt.n,
        EventRow.run_seq >= min(event["seq"] for event in events),
    )
    return {seq for seq in session.scalars(wanted) if seq is not None}


def _is_over(job: JobRow) -> bool:
    """Whether the job has no attempt that goes on: it has ended, is paused, or waits for the next."""
    return JobState(job.state).is_final or job.state in (JobState.PAUSED, JobState.QUEUED)


def close_if_over(session: Session, row: AttemptRow, job: JobRow) -> None:
    """End the attempt with its job. One outside holds no devices that could be waited for."""
    if not _is_over(job):
        return
    row.state = SETTLED if job.outside else ENDED
    row.ended_at = time.time()
    job.want = None
    if job.state == JobState.PAUSED and job.requeue:
        requeue(session, job, "waits again, to go on where it was", keeps_place=True)


def _charge(session: Session, row: AttemptRow, workers: int) -> None:
    """Add the device-seconds of an attempt to what its user has used lately."""
    job = session.get(JobRow, row.job_id)
    user = session.get(UserRow, job.owner, with_for_update=True) if job else None
    if user is not None:
        now = time.time()
        user.usage_s = decayed(user.usage_s, now - user.usage_at) + workers * max(0.0, now - row.created_at)
        user.usage_at = now
