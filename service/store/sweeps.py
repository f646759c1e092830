"""Sweeps: made, listed, read and ended by users; given their trials by their drivers.

A sweep and each of its trials are rows of one table, so a trial is a job like any other: it has its owner's place in
the queue, attempts, checkpoints, and can be cancelled alone. The row of a sweep is locked before those of its trials.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.errors import ConflictError, InvalidRequestError, Issue, NotFoundError
from service.lifecycle import FINAL, JOB, PHASES, RETRIED, SWEEP, JobState
from service.schemas import Page, Sweep, Trial
from service.store.actions import begin_anew, end
from service.store.admission import Place, Placed, Submit, replay, submit_all
from service.store.attempts import Attempt, own
from service.store.database import Database
from service.store.jobs import JobQuery, job_row, owner_name, page, selection
from service.store.views import sweep_view, trial_view
from service.tables import JobRow
from workers.contract import JobSpec
from workers.sweeps.contract import SweepSpec

CANCELLED_WITH = "sweep_cancelled"
# What trials have in common: a sweep's driver asks for no other files, and no other place in the queue.
COMMON = ("model", "model_args", "weights", "img_size", "dataset", "images_per_class", "export", "priority")
Made = tuple[Sweep, bool]
Counted = dict[str, dict[str, int]]  # sweep → state → number of its trials


class Sweeps:
    """The sweep shelf of the store; `owner` as in `Jobs`."""

    def __init__(self, database: Database, max_queued: int) -> None:
        self._database = database
        self._max_queued = max_queued

    def create(
        self, spec: SweepSpec, *, owner: str, idempotency_key: str | None = None, trace: str | None = None
    ) -> Made:
        """Put a sweep into the queue; (sweep, False) when this key made it before. Raises as `Jobs.create` does."""
        asked = Submit(spec, owner, idempotency_key, trace)
        return _shown(self._database.write_again(lambda session: _submitted(session, asked, self._max_queued)))

    def replay(self, spec: SweepSpec, *, owner: str, idempotency_key: str) -> Sweep | None:
        """The answer that this key got before, if any. Raises InvalidRequestError on another body."""
        with self._database.read() as session:
            found = replay(session, Submit(spec, owner, idempotency_key))
        return None if found is None else _shown(found)[0]

    def get(self, sweep_id: str, *, owner: str | None = None) -> Sweep:
        """One sweep with its trials, points and fronts."""
        with self._database.read() as session:
            return _whole(session, job_row(session, sweep_id, owner, kind=SWEEP))

    def list(self, query: JobQuery) -> Page[Sweep]:
        """A page of sweeps, without their trials."""
        with self._database.read() as session:
            rows = session.execute(selection(session, query, SWEEP)).all()
            counted = _counted(session, [row.id for row, _ in rows])
        sweeps = [sweep_view(row, name, counted.get(row.id, {})) for row, name in rows[: query.limit]]
        return page(sweeps, [sweep.id for sweep in sweeps], more=len(rows) > query.limit)

    def cancel(self, sweep_id: str, *, owner: str | None = None) -> Sweep:
        """End a sweep and those of its trials that are not over. Raises ConflictError when it has ended otherwise."""
        with self._database.write() as session:
            row = job_row(session, sweep_id, owner, lock=True, kind=SWEEP)
            end(session, row)
            for trial in _trials(session, row, lock=True):
                if trial.state not in FINAL and trial.state != JobState.CANCELLING:
                    trial.error = {"code": CANCELLED_WITH, "fault": "user", "message": "its sweep was cancelled"}
                    end(session, trial)
            return _whole(session, row)

    def retry(self, sweep_id: str, *, owner: str | None = None) -> Sweep:
        """Give a sweep that failed or was cancelled another attempt; trials that ended with it go on, too.

        Raises ConflictError when it has succeeded, or not all of it has ended.
        """
        with self._database.write() as session:
            row = job_row(session, sweep_id, owner, lock=True, kind=SWEEP)
            if row.state not in RETRIED:
                message = f"Sweep {sweep_id} is {row.state}; only what failed or was cancelled can be retried."
                raise ConflictError(message, code="sweep_not_retryable")
            ended = [trial for trial in _trials(session, row, lock=True) if _ended_with_it(trial)]
            if any(trial.state == JobState.CANCELLING for trial in ended):
                message = f"Trials of {sweep_id} are still being cancelled."
                raise ConflictError(message, code="sweep_not_retryable", remedy="Retry it once they have let go.")
            begin_anew(session, row)
            for trial in ended:
                begin_anew(session, trial)
            return _whole(session, row)

    def add_trial(self, attempt: Attempt, place: Place, spec: JobSpec) -> Trial:
        """The trial of that key, made unless it is there, whatever has become of it.

        Raises ConflictError when the sweep is ending, InvalidRequestError for a job that is none of its, TooManyError
        when the owner has too many waiting, LostAttemptError.
        """
        return self._database.write_again(lambda session: self._add_trial(session, attempt, place, spec))

    def trials(self, sweep_id: str) -> Sequence[Trial]:
        """All trials of a sweep, oldest first."""
        with self._database.read() as session:
            return [trial_view(row) for row in _trials(session, job_row(session, sweep_id, kind=SWEEP))]

    def cancel_trial(self, attempt: Attempt, key: str) -> Trial:
        """End a trial; harmless when it is over. Raises NotFoundError, LostAttemptError."""
        with self._database.write() as session:
            own(session, attempt)
            row = _trial(session, attempt.job_id, key, lock=True)
            if row is None:
                message = f"This sweep has no trial '{key[:80]}'."
                raise NotFoundError(message, code="trial_not_found", param="key")
            if row.state not in FINAL:
                end(session, row)
            return trial_view(row)

    def _add_trial(self, session: Session, attempt: Attempt, place: Place, spec: JobSpec) -> Trial:
        _, sweep = own(session, attempt)
        row = _trial(session, sweep.id, place.key)
        if row is None:
            if sweep.state not in PHASES:
                raise ConflictError(f"The sweep is {sweep.state}: it gets no new trials.", code="sweep_is_ending")
            spec = _checked(sweep, spec)
            row = _submitted(session, Submit(spec, sweep.owner, None, sweep.trace, place), self._max_queued).row
        return trial_view(row)


def _submitted(session: Session, asked: Submit, max_queued: int) -> Placed:
    (outcome,) = submit_all(session, [asked], max_queued)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _checked(sweep: JobRow, spec: JobSpec) -> JobSpec:
    """The job as it is made: it waits for other trials of the sweep as long as it takes."""
    base, told = JobSpec.model_validate(sweep.spec["job"]), spec.model_dump()
    if wrong := [name for name in COMMON if told[name] != base.model_dump()[name]]:
        message = f"A trial has the {wrong[0]} of its sweep's job."
        raise InvalidRequestError([Issue(f"spec.{wrong[0]}", message, "not_a_trial")])
    return spec.model_copy(update={"queue_timeout_s": None})


def _whole(session: Session, row: JobRow) -> Sweep:
    """The sweep with all that is left away in lists."""
    trials = _trials(session, row)
    counted: dict[str, int] = {}
    for trial in trials:
        counted[trial.state] = counted.get(trial.state, 0) + 1
    result = session.scalar(select(JobRow.ledger).where(JobRow.id == row.id))
    name = owner_name(session, row.owner)
    return sweep_view(row, name, counted, [trial_view(trial) for trial in trials], result)


def _trials(session: Session, sweep: JobRow, *, lock: bool = False) -> Sequence[JobRow]:
    wanted = select(JobRow).where(JobRow.parent_id == sweep.id, JobRow.kind == JOB)
    wanted = wanted.order_by(JobRow.created_at, JobRow.id)
    return session.scalars(wanted.with_for_update() if lock else wanted).all()


def _trial(session: Session, sweep_id: str, key: str, *, lock: bool = False) -> JobRow | None:
    wanted = select(JobRow).where(JobRow.parent_id == sweep_id, JobRow.trial_key == key)
    return session.scalar(wanted.with_for_update() if lock else wanted)


def _counted(session: Session, sweep_ids: Iterable[str]) -> Counted:
    found: Counted = {}
    wanted = select(JobRow.parent_id, JobRow.state, func.count()).where(JobRow.parent_id.in_(sweep_ids))
    for sweep_id, state, count in session.execute(wanted.group_by(JobRow.parent_id, JobRow.state)):
        found.setdefault(str(sweep_id), {})[state] = count
    return found


def _ended_with_it(trial: JobRow) -> bool:
    error: dict[str, Any] = trial.error or {}
    return error.get("code") == CANCELLED_WITH and trial.state in (JobState.CANCELLED, JobState.CANCELLING)


def _shown(placed: Placed) -> Made:
    return sweep_view(placed.row, placed.owner, {}), placed.fresh
