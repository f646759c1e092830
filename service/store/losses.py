"""An attempt that a fault of the system took: counted, told, and its job put into the queue again, or ended."""

from __future__ import annotations

from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.faults import Losses, may_go_on, verdict, with_one_more
from service.lifecycle import FINAL, SWEEP, JobState
from service.store.actions import requeue
from service.store.journal import append, move
from service.tables import JobRow, MetricRow


def lose(
    session: Session,
    job: JobRow,
    error: dict[str, Any],
    max_faults: int,
    *,
    run_seq: int | None = None,
    at: float | None = None,
) -> None:
    """End the job's attempt by this error, and give the job what follows from it: another one, or its own end.

    A job that is being paused is paused: it was to stop anyway, and that costs it nothing.
    """
    if not may_go_on(error):
        move(session, job, JobState.FAILED, error=error, run_seq=run_seq, at=at)
    elif job.state == JobState.PAUSING:
        _tell(session, job, error, max_faults, JobState.PAUSED, run_seq, at)
        move(session, job, JobState.PAUSED, message="its run was lost; it goes on from its newest checkpoint, if any")
    else:
        _count(session, job, error)
        ending = verdict(_losses(job), error, max_faults)
        _tell(session, job, error, max_faults, JobState.FAILED if ending else JobState.QUEUED, run_seq, at)
        if ending:
            move(session, job, JobState.FAILED, error=ending)
        else:
            go_on_elsewhere(session, job, f"attempt {job.attempt} was lost", "waits for another attempt")


def go_on_elsewhere(session: Session, job: JobRow, why: str, message: str) -> None:
    """Have a job whose attempt ended before its time wait for the next, with the place that its age gives it."""
    if job.state != JobState.RECOVERING:
        move(session, job, JobState.RECOVERING, message=why)
    requeue(session, job, message, keeps_place=True)


def _count(session: Session, job: JobRow, error: dict[str, Any]) -> None:
    after = with_one_more(_losses(job), error, _reached(session, job))
    job.faults, job.stuck, job.lost_step = after.faults, after.stuck, after.step


def _reached(session: Session, job: JobRow) -> int:
    """How far it is: a job's steps, a sweep's trials that are over."""
    if job.kind == SWEEP:
        over = select(func.count()).where(JobRow.parent_id == job.id, JobRow.state.in_(FINAL))
        return session.scalar(over) or 0
    return session.scalar(select(func.max(MetricRow.step)).where(MetricRow.job_id == job.id)) or 0


def _losses(job: JobRow) -> Losses:
    return Losses(job.faults, job.stuck, job.lost_step)


def _tell(
    session: Session,
    job: JobRow,
    error: dict[str, Any],
    max_faults: int,
    follows: JobState,
    run_seq: int | None,
    at: float | None,
) -> None:
    data = {
        "attempt": job.attempt,
        "code": error["code"],
        "message": error["message"],
        "faults": job.faults,
        "max_faults": max_faults,
        "next": follows,
    }
    text = f"attempt {job.attempt} was lost ({error['code']}): {error['message']}"
    append(session, job, "attempt.lost", text, level="warning", data=data, run_seq=run_seq, at=at)
