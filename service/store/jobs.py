"""Jobs as users see them: made, listed, read.

`owner` of a method narrows it to one user's jobs; None means everybody's, for administrators and the service itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Select, func, select, tuple_
from sqlalchemy.orm import Session

from service.errors import NotFoundError
from service.lifecycle import HOLDING, JOB, SWEEP, SWEEP_PREFIX, JobState
from service.schemas import Job, Page
from service.store.admission import Placed, Submit, replay, submit_all
from service.store.database import Database
from service.store.together import Together
from service.store.views import Standing, job_view
from service.tables import JobRow, LabelRow, UserRow
from workers.contract import JobSpec

# what a list may be sorted by
SORTS = {
    "created": JobRow.created_at,
    "finished": func.coalesce(JobRow.finished_at, 0.0),
    "model": JobRow.model,
    "priority": JobRow.priority,
    "status": JobRow.state,
}
Made = tuple[Job, bool]  # a job, and whether this request made it
Standings = Callable[[], Mapping[str, Standing]]  # where the jobs that wait stand


@dataclass(frozen=True)
class JobQuery:
    """Which jobs to list, and from where on. `after` is the id of the last job of the page before.

    `search` is looked for in id, name, model, dataset and metadata, whatever the case; `metadata` has to match exactly;
    `sweep` is the id of the sweep whose trials they are. `sort` is one of SORTS; what is alike goes by age.
    """

    after: str | None = None
    limit: int = 20
    order: str = "desc"
    sort: str = "created"
    status: tuple[str, ...] = ()
    model: str | None = None
    search: str | None = None
    owner: str | None = None
    created_after: float | None = None
    created_before: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    sweep: str | None = None


class Jobs:
    """The job shelf of the store."""

    def __init__(self, database: Database, max_queued: int) -> None:
        self._database = database
        self._max_queued = max_queued
        self._submits: Together[Submit, Made] = Together(database, self._submit_all)

    def create(
        self, spec: JobSpec, *, owner: str, idempotency_key: str | None = None, trace: str | None = None
    ) -> Made:
        """Put a job into the queue; (job, False) when this key made it before.

        Raises InvalidRequestError when the key made one of another body or the priority is more than the user may
        have, TooManyError when the user has too many jobs waiting.
        """
        asked = [Submit(spec, owner, idempotency_key, trace)]
        (outcome,) = self._database.write_again(lambda session: self._submit_all(session, asked))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def create_together(
        self, spec: JobSpec, *, owner: str, idempotency_key: str | None = None, trace: str | None = None
    ) -> Made:
        """The same, in one transaction with others that come at the same time: they wait for the disk once."""
        return await self._submits(Submit(spec, owner, idempotency_key, trace))

    def replay(self, spec: JobSpec, *, owner: str, idempotency_key: str) -> Job | None:
        """The answer that this key got before, if any. Raises InvalidRequestError on another body."""
        with self._database.read() as session:
            found = replay(session, Submit(spec, owner, idempotency_key))
        return None if found is None else _shown(found)[0]

    def get(self, job_id: str, *, owner: str | None = None, standings: Standings = dict) -> Job:
        """One job; `standings` is asked only where it waits."""
        with self._database.read() as session:
            row = job_row(session, job_id, owner, kind=JOB)
            name = owner_name(session, row.owner)
        return job_view(row, name, _standing(row, standings))

    def list(self, query: JobQuery, standings: Standings = dict) -> Page[Job]:
        """A page of jobs; `standings` is asked only where any of them waits."""
        with self._database.read() as session:
            rows = session.execute(selection(session, query, JOB)).all()
        jobs = [job_view(row, name, _standing(row, standings)) for row, name in rows[: query.limit]]
        return page(jobs, [job.id for job in jobs], more=len(rows) > query.limit)

    def plans_in_use(self) -> dict[str, dict[str, Any]]:
        """The plans of the jobs that hold the cluster, by job."""
        with self._database.read() as session:
            wanted = select(JobRow.id, JobRow.plan).where(JobRow.state.in_(HOLDING), JobRow.plan.is_not(None))
            wanted = wanted.where(JobRow.kind == JOB, JobRow.outside.is_(False))
            return {row.id: row.plan for row in session.execute(wanted)}

    def of_owner(self, owner: str, job_ids: set[str]) -> set[str]:
        """Which of the jobs are this user's."""
        with self._database.read() as session:
            wanted = select(JobRow.id).where(JobRow.owner == owner, JobRow.id.in_(job_ids))
            return set(session.scalars(wanted))

    def close(self) -> None:
        self._submits.close()

    def _submit_all(self, session: Session, asked: Sequence[Submit]) -> Sequence[Made | Exception]:
        placed = submit_all(session, asked, self._max_queued)
        return [each if isinstance(each, Exception) else _shown(each) for each in placed]


def job_row(
    session: Session, job_id: str, owner: str | None = None, *, lock: bool = False, kind: str | None = None
) -> JobRow:
    """The row of a job or sweep, or of one `kind` alone.

    Raises NotFoundError for another user's, too: whether it exists is not theirs to know.
    """
    row = session.get(JobRow, job_id, with_for_update=lock or None)
    if row is None or owner not in (None, row.owner) or kind not in (None, row.kind):
        what = kind or (SWEEP if job_id.startswith(SWEEP_PREFIX) else JOB)
        raise NotFoundError(f"There is no {what} {job_id[:60]}.", code=f"{what}_not_found", param="id")
    return row


def page(data: list[Any], ids: list[str], *, more: bool) -> Page[Any]:
    """A page of a list, with its cursors."""
    return Page(data=data, has_more=more, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None)


def owner_name(session: Session, user_id: str) -> str | None:
    """The name of the user who owns something; None of one who is not known."""
    user = session.get(UserRow, user_id)
    return user.name if user else None


def _standing(row: JobRow, standings: Standings) -> Standing | None:
    return standings().get(row.id) if row.state == JobState.QUEUED else None


def _shown(placed: Placed) -> Made:
    return job_view(placed.row, placed.owner, None), placed.fresh


def selection(session: Session, query: JobQuery, kind: str) -> Select[JobRow, str]:
    """Of one kind, one row more than the page, to see whether there is more.

    Rows move under load: hence a cursor, no offset.
    """
    wanted = select(JobRow, UserRow.name).outerjoin(UserRow, UserRow.id == JobRow.owner).where(JobRow.kind == kind)
    if query.sweep is not None:
        wanted = wanted.where(JobRow.parent_id == query.sweep)
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
    by = (SORTS[query.sort], JobRow.created_at, JobRow.id)
    if query.after:
        # Checked to be theirs; its place is asked of the database, which alone knows it exactly.
        start = job_row(session, query.after, query.owner, kind=kind)
        mark = session.execute(select(*by).where(JobRow.id == start.id)).one()
        place = tuple_(*by)
        wanted = wanted.where(place > tuple_(*mark) if query.order == "asc" else place < tuple_(*mark))
    return wanted.order_by(*(by if query.order == "asc" else [column.desc() for column in by])).limit(query.limit + 1)
