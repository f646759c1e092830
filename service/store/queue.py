"""The queue: which job starts next, what holds the others up, and what they may expect. `service.queueing` decides.

Sweeps stand in a line of their own: one that runs holds no devices, and never the place of a job, so the trials that it
waits for can always start. These are jobs of its owner, who has no more of the cluster by a sweep than without one.
Runs outside hold nothing here either.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

from sqlalchemy import Select, func, or_, select
from sqlalchemy.orm import Session

from service.lifecycle import HOLDING, JOB, SWEEP, JobState
from service.queueing import (
    DEFAULT_JOB_S,
    Load,
    Running,
    Waiting,
    decayed,
    expected_waits,
    start_order,
    to_preempt,
)
from service.store.actions import begin_pause, queue_timeout_s
from service.store.attempts import CREATED, SETTLED, Attempt, attempt_view, next_attempt
from service.store.database import Database
from service.store.journal import explain, move
from service.store.views import Standing, eta_seconds
from service.tables import AttemptRow, JobRow, UserRow

Fits = Callable[[int], str | None]  # workers → why the cluster is too small for them, or None
NUM_RECENT = 20  # ended jobs from whose length that of others is guessed


class Queue:
    """The queue shelf of the store. `default_running`: jobs of one user that run at once, where nothing is set."""

    def __init__(self, database: Database, default_running: int | None) -> None:
        self._database = database
        self._default_running = default_running

    def claim(self, max_running: int, fits: Fits = lambda workers: None) -> Attempt | None:
        """Take the job whose turn it is and open its next attempt, unless that many are open already.

        A job that the cluster is too small for is told so and passed over.
        """
        with self._database.write() as session:
            return self._claim(session, JOB, max_running, fits)

    def claim_sweep(self, max_sweeps: int) -> Attempt | None:
        """The same for sweeps, of which so many may be open."""
        with self._database.write() as session:
            return self._claim(session, SWEEP, max_sweeps, lambda workers: None)

    def may_claim(self, max_running: int) -> bool:
        """Whether a job waits and there is room for it."""
        return self._has_room(JOB, max_running)

    def may_claim_sweep(self, max_sweeps: int) -> bool:
        return self._has_room(SWEEP, max_sweeps)

    def explain(self, reason: str | None) -> None:
        """Say on every queued job why nothing starts; None takes it back."""
        same = JobRow.status_reason.is_(None) if reason is None else JobRow.status_reason == reason
        other = JobRow.status_reason.is_not(None) if reason is None else or_(JobRow.status_reason.is_(None), ~same)
        with self._database.read() as session:
            if session.scalar(_queued().where(other).limit(1)) is None:
                return
        with self._database.write() as session:
            for job in session.scalars(_queued().where(other)):
                explain(session, job, reason)

    def expire(self) -> int:
        """Fail the jobs that have waited longer than they would; how many there were."""
        late = _queued().where(JobRow.queue_deadline < time.time())
        with self._database.read() as session:
            if session.scalar(late.limit(1)) is None:
                return 0
        with self._database.write() as session:
            jobs = session.scalars(late.with_for_update()).all()
            for job in jobs:
                why = f" What it waited for: {job.status_reason}" if job.status_reason else ""
                message = f"The {job.kind} had not started after {queue_timeout_s(job):g} s.{why}"
                error = {"code": "queue_timeout", "fault": "capacity", "message": message, "param": "queue_timeout_s"}
                move(session, job, JobState.FAILED, error=error)
            return len(jobs)

    def preempt(self, max_running: int, at_least_s: float, fits: Fits = lambda workers: None) -> str | None:
        """Ask the running job that is to make room for the first that waits to pause; its id, or None."""
        with self._database.read() as session:
            highest = session.scalar(
                select(func.max(JobRow.priority)).where(JobRow.state == JobState.QUEUED, JobRow.kind == JOB)
            )
            running = _running(session)
            if highest is None or len(running) < max_running or all(job.priority >= highest for job in running):
                return None
        with self._database.write() as session:
            loads = self._loads(session, JOB)
            order = (job for job in start_order(_waiting(session, JOB), loads) if fits(job.workers) is None)
            first = next((job for job in order if not loads.get(job.owner, Load()).is_full), None)
            running = _running(session)
            if any(job.requeue for job in session.scalars(select(JobRow).where(JobRow.state == JobState.PAUSING))):
                return None  # one is making room already
            chosen = to_preempt(first, running, slots=max_running, now=time.time(), at_least_s=at_least_s)
            if chosen is None or first is None:
                return None
            job = session.get_one(JobRow, chosen, with_for_update=True)
            begin_pause(session, job, f"makes room for {first.job_id}, which has a higher priority", requeue=True)
            return chosen

    def standing(self, max_running: int) -> Mapping[str, Standing]:
        """Every queued job's place, and when it may be expected to start."""
        with self._database.read() as session:
            order = start_order(_waiting(session, JOB), self._loads(session, JOB))
            waits = expected_waits(
                len(order), _running(session), slots=max_running, typical_s=_typical_seconds(session)
            )
        now = time.time()
        return {
            job.job_id: Standing(place, now + wait)
            for place, (job, wait) in enumerate(zip(order, waits, strict=True), 1)
        }

    def _has_room(self, kind: str, most: int) -> bool:
        with self._database.read() as session:
            waits = session.scalar(_queued().where(JobRow.kind == kind).limit(1))
            return waits is not None and len(_open(session, kind)) < most

    def _claim(self, session: Session, kind: str, most: int, fits: Fits) -> Attempt | None:
        held = _open(session, kind)
        if len(held) >= most:
            return None
        loads = self._loads(session, kind)
        for waiting in start_order(_waiting(session, kind), loads):
            if waiting.job_id in held:
                continue  # its last attempt has not let go yet
            job = session.get(JobRow, waiting.job_id, with_for_update=True)
            if job is None or job.state != JobState.QUEUED or loads.get(job.owner, Load()).is_full:
                continue
            why = fits(waiting.workers)
            explain(session, job, why)
            if why is None:
                return _open_attempt(session, job)
        return None

    def _loads(self, session: Session, kind: str) -> dict[str, Load]:
        """What every user has of the cluster; of sweeps, as many of a user as there may be at all."""
        holding = select(JobRow.owner, func.count()).where(JobRow.state.in_(HOLDING), JobRow.kind == kind)
        holding = holding.where(JobRow.outside.is_(False)).group_by(JobRow.owner)
        running = {owner: count for owner, count in session.execute(holding)}  # noqa: C416 - rows are no pairs to a type checker
        now = time.time()
        return {
            user.id: Load(
                share=user.share,
                running=running.get(user.id, 0),
                max_running=self._most_of(user) if kind == JOB else None,
                usage_s=decayed(user.usage_s, now - user.usage_at),
            )
            for user in session.scalars(select(UserRow))
        }

    def _most_of(self, user: UserRow) -> int | None:
        return self._default_running if user.max_running is None else user.max_running


def _queued() -> Select[JobRow]:
    return select(JobRow).where(JobRow.state == JobState.QUEUED)


def _waiting(session: Session, kind: str) -> list[Waiting]:
    workers = func.coalesce(JobRow.spec["workers"].as_integer(), 0)  # a sweep has none of its own
    wanted = select(JobRow.id, JobRow.owner, JobRow.priority, JobRow.queued_at, workers)
    wanted = wanted.where(JobRow.state == JobState.QUEUED, JobRow.kind == kind)
    return [Waiting(*row) for row in session.execute(wanted)]


def _running(session: Session) -> list[Running]:
    wanted = select(JobRow, AttemptRow.created_at).join(AttemptRow)
    wanted = wanted.where(AttemptRow.state != SETTLED, JobRow.kind == JOB, JobRow.outside.is_(False))
    return [
        Running(job.id, job.priority, since, job.state == JobState.RUNNING, eta_seconds(job.live or {}))
        for job, since in session.execute(wanted)
    ]


def _typical_seconds(session: Session) -> float:
    wanted = select(JobRow.finished_at - JobRow.started_at)
    wanted = wanted.where(JobRow.state == JobState.SUCCEEDED, JobRow.kind == JOB, JobRow.outside.is_(False))
    found = session.scalars(wanted.order_by(JobRow.created_at.desc()).limit(NUM_RECENT))
    seconds = [each for each in found if each is not None]
    return statistics.median(seconds) if seconds else DEFAULT_JOB_S


def _open(session: Session, kind: str) -> set[str]:
    """What has an attempt that has not let go."""
    wanted = select(AttemptRow.job_id).join(JobRow).where(AttemptRow.state != SETTLED, JobRow.kind == kind)
    return set(session.scalars(wanted.where(JobRow.outside.is_(False))))


def _open_attempt(session: Session, job: JobRow) -> Attempt:
    row = next_attempt(session, job, CREATED)
    move(session, job, JobState.PLANNING, message=f"attempt {job.attempt} begins")
    session.flush()
    return attempt_view(row, job)
