"""Runs that the service has not ordered: jobs while they tell of themselves, given up when they fall silent.

Such a job begins with its one attempt under way. It never waits, holds nothing of the cluster here, and nobody here
starts or stops what runs: its own words decide it (`absorb`), or its silence.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from service.errors import NotFoundError, TooManyError
from service.lifecycle import HOLDING, JobState
from service.schemas import RunPlace
from service.store.admission import Submit, fingerprint_of, is_stale, key_reused, keyed, values_of
from service.store.attempts import SUBMITTED, Attempt, attempt_view, close_if_over, next_attempt, own
from service.store.database import Database
from service.store.jobs import job_row
from service.store.journal import append, move
from service.tables import AttemptRow, JobRow, LabelRow, UserRow
from workers.contract import JobSpec

SILENT = "run_silent"
Begun = tuple[Attempt, bool]  # and whether this request made it


@dataclass(frozen=True)
class _Asked:
    """One request to list a run."""

    spec: JobSpec
    where: RunPlace
    owner: str
    key: str | None
    trace: str | None

    @property
    def fingerprint(self) -> str:
        return fingerprint_of({"run": self.spec.model_dump(mode="json"), "where": self.where.model_dump(mode="json")})


class Outside:
    """The shelf of runs outside. `max_queued`: as many of one user's may go on at once, where nothing is set."""

    def __init__(self, database: Database, max_queued: int) -> None:
        self._database = database
        self._max_queued = max_queued

    def begin(
        self,
        spec: JobSpec,
        where: RunPlace,
        *,
        owner: str,
        idempotency_key: str | None = None,
        trace: str | None = None,
    ) -> Begun:
        """Make a job that is under way, with the token of its attempt; the same again for a key that made it before.

        Raises InvalidRequestError when the key was used with another body, TooManyError when the user has too many.
        """
        asked = _Asked(spec, where, owner, idempotency_key, trace)
        return self._database.write_again(lambda session: self._begin(session, asked))

    def hear(self, attempt: Attempt) -> None:
        """The run is there, though it has nothing to tell. Raises LostAttemptError."""
        with self._database.write() as session:
            own(session, attempt)[0].heard_at = time.time()

    def end_silent(self, before: float) -> list[str]:
        """Decide the jobs whose runs were last heard before that time (Unix seconds); their ids."""
        with self._database.read() as session:
            silent = [(row.job_id, row.n) for row in session.scalars(_silent(before))]
        if not silent:
            return []
        with self._database.write() as session:
            return [job_id for job_id, n in silent if _give_up(session, job_id, n, before)]

    def check_here(self, job_id: str, what: str, *, owner: str | None) -> None:
        """Raise NotFoundError for `what` of a run outside, whose files are never looked for on this machine."""
        with self._database.read() as session:
            row = job_row(session, job_id, owner)
        if row.outside:
            there = (row.whereabouts or {}).get("run_dir")
            lies = f"where it wrote them: {there}" if there else "where it wrote them"
            message = f"Job {job_id} runs outside of this service. Its {what} lie {lies}, as its own machines see it."
            raise NotFoundError(message, code="lies_outside", param="job_id")

    def _begin(self, session: Session, asked: _Asked) -> Begun:
        submit = Submit(asked.spec, asked.owner, asked.key, asked.trace)
        known = keyed(session, [submit]).get((asked.owner, asked.key))
        if known is not None and is_stale(known):
            known.idempotency_key = None
            session.flush()
        elif known is not None:
            return _again(session, known, asked), False
        self._admit(session, asked.owner)
        values = {**values_of(submit), "fingerprint": asked.fingerprint, "last_seq": 0, "state": JobState.VALIDATING}
        values |= {"priority": 0, "queued_at": None, "queue_deadline": None}
        job = JobRow(**values, outside=True, whereabouts=asked.where.model_dump(exclude_none=True))
        session.add(job)
        session.flush()
        session.add_all(LabelRow(job_id=job.id, key=key, value=value) for key, value in asked.spec.metadata.items())
        append(session, job, "job.created", "a run that was not ordered here")
        row = next_attempt(session, job, SUBMITTED)
        move(session, job, JobState.STARTING, message="it has been started elsewhere")
        session.flush()
        return attempt_view(row, job), True

    def _admit(self, session: Session, owner: str) -> None:
        """Raise TooManyError where the user has as many under way as jobs may wait."""
        user = session.get(UserRow, owner)
        most = self._max_queued if user is None or user.max_queued is None else user.max_queued
        going = select(func.count()).where(JobRow.owner == owner, JobRow.outside.is_(True), JobRow.state.in_(HOLDING))
        if (count := session.scalar(going) or 0) >= most:
            message = f"You have {count} runs outside of this service under way, as many as you may."
            remedy = "Wait for some to end, or ask an administrator for more (max_queued)."
            raise TooManyError(message, code="too_many_runs", remedy=remedy)


def _silent(before: float) -> Select[AttemptRow]:
    heard = func.coalesce(AttemptRow.heard_at, AttemptRow.created_at)
    wanted = select(AttemptRow).join(JobRow).where(JobRow.outside.is_(True))
    return wanted.where(AttemptRow.state == SUBMITTED, heard < before)


def _give_up(session: Session, job_id: str, n: int, before: float) -> bool:
    """Decide a job, unless its run has spoken since. The rows are locked in the order of all who write both."""
    job = session.get_one(JobRow, job_id, with_for_update=True)
    row = session.get_one(AttemptRow, (job_id, n), with_for_update=True)
    heard = row.heard_at or row.created_at
    if row.state != SUBMITTED or heard >= before:
        return False
    said = f"Nothing was heard of the run for {time.time() - heard:.0f} s."
    if job.state == JobState.CANCELLING:
        move(session, job, JobState.CANCELLED, message=f"cancelled; {said[0].lower()}{said[1:]}")
    else:
        remedy = "Look where it runs: it may have died, or go on and not reach this service. Start it again there."
        error = {"code": SILENT, "fault": "system", "message": f"{said} {remedy}", "param": None}
        move(session, job, JobState.FAILED, error=error)
    close_if_over(session, row, job)
    return True


def _again(session: Session, job: JobRow, asked: _Asked) -> Attempt:
    """The first answer again; its token opens nothing if the run has ended."""
    row = session.get(AttemptRow, (job.id, 1))
    if job.fingerprint != asked.fingerprint or row is None:
        raise key_reused("another run")
    return attempt_view(row, job)
