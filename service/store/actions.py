"""What users ask of a job that exists: cancel, pause, resume, retry. Each is harmless when asked again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.orm import Session

from service.errors import ConflictError
from service.lifecycle import JOB, PAUSABLE, RETRIED, SWEEP, JobState
from service.schemas import Job
from service.store.database import Database
from service.store.jobs import job_row, owner_name
from service.store.journal import move
from service.store.views import job_view
from service.tables import JobRow

PAUSE, STOP = "pause", "stop"  # what a driver is asked: the latter where it has done nothing yet


class Actions:
    """The action shelf of the store; `owner` as in `Jobs`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def cancel(self, job_id: str, *, owner: str | None = None) -> Job:
        """Ask for the end of a job: at once while it waits, otherwise once its driver has let go.

        Raises ConflictError when it has already succeeded or failed.
        """
        with self._held(job_id, owner) as (session, row, _):
            end(session, row)
            return _view(session, row)

    def pause(self, job_id: str, *, owner: str | None = None) -> Job:
        """Have a job give its devices back and keep what it has learnt; at once while it waits.

        Raises ConflictError when it has ended, or is about to, and for a sweep.
        """
        with self._held(job_id, owner, kind=None) as (session, row, state):
            if row.kind == SWEEP:
                message = f"{job_id} is a sweep, which cannot be paused."
                remedy = "Cancel it and retry it later, or pause its jobs one by one."
                raise ConflictError(message, code="sweep_no_pause", remedy=remedy)
            row.requeue = False
            if state is JobState.QUEUED:
                move(session, row, JobState.PAUSED, message="paused before it started")
            elif state in PAUSABLE:
                begin_pause(session, row, "pause was asked for")
            elif state not in (JobState.PAUSING, JobState.PAUSED):
                raise ConflictError(f"Job {job_id} is {state}; it cannot be paused.", code="job_not_pausable")
            return _view(session, row)

    def resume(self, job_id: str, *, owner: str | None = None) -> Job:
        """Put a paused job into the queue again. Raises ConflictError unless it is paused, or waits or runs already,
        and for a run outside."""
        with self._held(job_id, owner) as (session, row, state):
            _check_ours(row)
            if state is JobState.PAUSED:
                requeue(session, row, "resumed")
            elif state is JobState.PAUSING:
                row.requeue = True
            elif state is not JobState.QUEUED and state not in PAUSABLE:
                raise ConflictError(f"Job {job_id} is {state}; there is nothing to resume.", code="job_not_paused")
            return _view(session, row)

    def retry(self, job_id: str, *, owner: str | None = None) -> Job:
        """Give a job that failed or was cancelled another attempt, under the same id, from its newest checkpoint.

        Raises ConflictError when it has succeeded, or has not ended, and for a run outside.
        """
        with self._held(job_id, owner) as (session, row, state):
            _check_ours(row)
            if state not in RETRIED:
                message = f"Job {job_id} is {state}; only what failed or was cancelled can be retried."
                raise ConflictError(message, code="job_not_retryable")
            begin_anew(session, row)
            return _view(session, row)

    @contextmanager
    def _held(
        self, job_id: str, owner: str | None, kind: str | None = JOB
    ) -> Iterator[tuple[Session, JobRow, JobState]]:
        """A transaction in which the job is nobody else's to change. Raises NotFoundError."""
        with self._database.write() as session:
            row = job_row(session, job_id, owner, lock=True, kind=kind)
            yield session, row, JobState(row.state)


def end(session: Session, row: JobRow) -> None:
    """Have a job or sweep end: at once where it has no attempt. Raises ConflictError where it has ended otherwise."""
    state = JobState(row.state)
    if state in (JobState.SUCCEEDED, JobState.FAILED):
        message = f"{row.kind.capitalize()} {row.id} has already {state}; it cannot be cancelled."
        raise ConflictError(message, code=f"{row.kind}_is_final")
    row.requeue = False
    if state in (JobState.QUEUED, JobState.PAUSED):
        move(session, row, JobState.CANCELLED, message=f"cancelled while it was {state}")
    elif state not in (JobState.CANCELLING, JobState.CANCELLED):
        move(session, row, JobState.CANCELLING, message="cancel was asked for")


def _check_ours(row: JobRow) -> None:
    """Raise ConflictError for a run that the service has not started, so that it cannot start it again."""
    if row.outside:
        out = (row.whereabouts or {}).get("run_dir") or "DIRECTORY"
        message = f"Job {row.id} runs outside of this service, which cannot start it again."
        how = f"python -m workers.loop … --out {out}, or d2ft submit --ray-address … --out {out}"
        remedy = f"Start it again as before ({how}): it goes on from its newest checkpoint, as another job."
        raise ConflictError(message, code="runs_outside", remedy=remedy)


def begin_anew(session: Session, row: JobRow) -> None:
    """Have a job or sweep that has ended wait for another attempt; what it lost before counts for nothing."""
    row.error, row.finished_at = None, None
    row.faults, row.stuck, row.lost_step = 0, 0, None
    requeue(session, row, "another attempt was asked for")


def begin_pause(session: Session, row: JobRow, message: str, *, requeue: bool = False) -> None:
    """Ask a job's driver to stop where it can go on; one that has not begun to train loses nothing by a plain end."""
    row.want = PAUSE if row.state == JobState.RUNNING or row.outside else STOP  # nobody here can stop what is outside
    row.requeue = requeue
    move(session, row, JobState.PAUSING, message=message)


def requeue(session: Session, row: JobRow, message: str, *, keeps_place: bool = False) -> None:
    """Have a job wait again; its time to wait begins anew. One that had to stop keeps its place among its equals."""
    row.want, row.requeue = None, False
    now = time.time()
    if not keeps_place or row.queued_at is None:
        row.queued_at = now
    timeout_s = queue_timeout_s(row)
    row.queue_deadline = None if timeout_s is None else now + timeout_s
    move(session, row, JobState.QUEUED, message=message)


def queue_timeout_s(row: JobRow) -> float | None:
    """How long it may wait to start; of a sweep that stands in its job."""
    asked: float | None = row.spec.get("job", row.spec).get("queue_timeout_s")
    return asked


def _view(session: Session, row: JobRow) -> Job:
    return job_view(row, owner_name(session, row.owner), None)
