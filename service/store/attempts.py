"""Attempts as the supervisor sees them: claimed, followed, ended, settled.

Every write names the attempt's token: when the row has another, or the attempt has ended, the writer has lost its job
and stands down.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.errors import LostAttemptError
from service.lifecycle import JobState
from service.store.absorb import RunEvent, absorb_event
from service.store.database import Database
from service.store.journal import explain, move
from service.tables import AttemptRow, EventRow, JobRow
from workers.contract import JobSpec

CREATED, SUBMITTED, ENDED, SETTLED = "created", "submitted", "ended", "settled"


@dataclass(frozen=True)
class Attempt:
    """One attempt as it was when read."""

    job_id: str
    n: int
    token: str
    submission_id: str
    state: str
    events_offset: int
    job_state: JobState
    status_reason: str | None
    spec: JobSpec
    ended_at: float | None


class Attempts:
    """The attempt shelf of the store."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def claim(self, max_running: int) -> Attempt | None:
        """Take the oldest queued job and open its next attempt, unless that many are open already."""
        with self._database.write() as session:
            job = session.scalar(_queued().limit(1))
            if job is None or _num_open(session) >= max_running:
                return None
            job.attempt += 1
            job.started_at = job.started_at or time.time()
            row = AttemptRow(
                job_id=job.id,
                n=job.attempt,
                token=secrets.token_hex(16),
                submission_id=f"job-{job.id}-a{job.attempt}",
                state=CREATED,
                events_offset=0,
                created_at=time.time(),
            )
            session.add(row)
            move(session, job, JobState.PLANNING, message=f"attempt {job.attempt} begins")
            return _attempt(row, job)

    def open(self) -> list[Attempt]:
        """The attempts that are not settled, oldest first."""
        with self._database.read() as session:
            wanted = select(AttemptRow, JobRow).join(JobRow).where(AttemptRow.state != SETTLED)
            rows = session.execute(wanted.order_by(AttemptRow.created_at)).all()
            return [_attempt(row, job) for row, job in rows]

    def mark_submitted(self, attempt: Attempt) -> None:
        """Ray has taken the attempt."""
        with self._database.write() as session:
            row, job = _own(session, attempt)
            row.state = SUBMITTED
            if job.state == JobState.PLANNING:
                move(session, job, JobState.STARTING, message="the cluster has taken the attempt")

    def absorb(self, attempt: Attempt, events: Sequence[RunEvent], offset: int) -> Attempt:
        """Take over lines of the run's file, each at most once, and remember how far it was read.

        A line that the table of moves does not allow is kept as history and moves nothing.
        """
        with self._database.write() as session:
            row, job = _own(session, attempt)
            known = _known(session, attempt, events)
            for event in events:
                if event["seq"] not in known and not JobState(job.state).is_final:
                    absorb_event(session, job, event)
            row.events_offset = offset
            _close_if_final(row, job)
            return _attempt(row, job)

    def finish(
        self, attempt: Attempt, state: JobState, *, error: dict[str, Any] | None = None, message: str | None = None
    ) -> None:
        """Decide the job."""
        with self._database.write() as session:
            row, job = _own(session, attempt)
            move(session, job, state, error=error, message=message)
            _close_if_final(row, job)

    def settle(self, attempt: Attempt) -> None:
        """Ray has let go of the attempt: its devices are free."""
        with self._database.write() as session:
            row = session.get(AttemptRow, (attempt.job_id, attempt.n))
            if row is not None and row.token == attempt.token and row.state == ENDED:
                row.state = SETTLED

    def explain_queue(self, reason: str | None) -> None:
        """Say on every queued job why nothing starts; None takes it back."""
        with self._database.write() as session:
            for job in session.scalars(_queued()):
                explain(session, job, reason)

    def explain(self, attempt: Attempt, reason: str | None) -> None:
        """Say why the attempt waits."""
        with self._database.write() as session:
            _, job = _own(session, attempt)
            explain(session, job, reason)

    def may_claim(self, max_running: int) -> bool:
        """Whether a job waits and there is room for it."""
        with self._database.read() as session:
            return _num_open(session) < max_running and session.scalar(_queued().limit(1)) is not None

    def is_open(self, submission_id: str) -> bool:
        """Whether Ray's job of this id is one that we still follow."""
        with self._database.read() as session:
            state = session.scalar(select(AttemptRow.state).where(AttemptRow.submission_id == submission_id))
            return state is not None and state != SETTLED


def _queued() -> Any:
    return select(JobRow).where(JobRow.state == JobState.QUEUED).order_by(JobRow.created_at, JobRow.id)


def _num_open(session: Session) -> int:
    return session.scalar(select(func.count()).select_from(AttemptRow).where(AttemptRow.state != SETTLED)) or 0


def _own(session: Session, attempt: Attempt) -> tuple[AttemptRow, JobRow]:
    """The rows behind an attempt that still owns its job. Raises LostAttemptError."""
    row = session.get(AttemptRow, (attempt.job_id, attempt.n))
    job = session.get(JobRow, attempt.job_id)
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


def _close_if_final(row: AttemptRow, job: JobRow) -> None:
    if JobState(job.state).is_final:
        row.state = ENDED
        row.ended_at = time.time()


def _attempt(row: AttemptRow, job: JobRow) -> Attempt:
    return Attempt(
        job_id=row.job_id,
        n=row.n,
        token=row.token,
        submission_id=row.submission_id,
        state=row.state,
        events_offset=row.events_offset,
        job_state=JobState(job.state),
        status_reason=job.status_reason,
        spec=JobSpec.model_validate(job.spec),
        ended_at=row.ended_at,
    )
