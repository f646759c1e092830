"""What a job left behind: events, metrics, plan, ledger, artifacts, checkpoints, attempts. `owner` as in `Jobs`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import undefer

from service.errors import NotFoundError
from service.lifecycle import JobState
from service.schemas import Artifact, Checkpoint, Event, MetricsPage, Page
from service.store.database import Database
from service.store.jobs import job_row, page
from service.store.views import artifact_view, checkpoint_view, event_view
from service.tables import ArtifactRow, AttemptRow, CheckpointRow, EventRow, JobRow, MetricRow


@dataclass(frozen=True)
class StoredArtifact:
    """Where a downloadable file of an attempt lies."""

    name: str
    path: str
    sha256: str | None


class Records:
    """The record shelf of the store."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def events(self, job_id: str, *, after: int = 0, limit: int = 100, owner: str | None = None) -> Page[Event]:
        """History from `after` on, oldest first."""
        with self._database.read() as session:
            job_row(session, job_id, owner)
            wanted = select(EventRow).where(EventRow.job_id == job_id, EventRow.seq > after)
            rows = list(session.scalars(wanted.order_by(EventRow.seq).limit(limit + 1)))
        events = [event_view(row) for row in rows[:limit]]
        return page(events, [str(event.seq) for event in events], more=len(rows) > limit)

    def history(
        self,
        job_id: str,
        *,
        types: Sequence[str] = (),
        without: Sequence[str] = (),
        levels: Sequence[str] = (),
        before: int | None = None,
        oldest: bool = False,
        limit: int = 100,
        owner: str | None = None,
    ) -> list[Event]:
        """The newest events before `before`, newest first, or the `oldest` in their order.

        Of these types and levels, all where none are named.
        """
        wanted = select(EventRow).where(EventRow.job_id == job_id)
        if types:
            wanted = wanted.where(EventRow.type.in_(types))
        if without:
            wanted = wanted.where(EventRow.type.not_in(without))
        if levels:
            wanted = wanted.where(EventRow.level.in_(levels))
        if before is not None:
            wanted = wanted.where(EventRow.seq < before)
        with self._database.read() as session:
            job_row(session, job_id, owner)
            by = EventRow.seq if oldest else EventRow.seq.desc()
            return [event_view(row) for row in session.scalars(wanted.order_by(by).limit(limit))]

    def types(self, job_id: str, *, owner: str | None = None) -> list[str]:
        """The types of event that its history has."""
        with self._database.read() as session:
            job_row(session, job_id, owner)
            found = session.scalars(select(EventRow.type).where(EventRow.job_id == job_id).distinct())
            return sorted(found)

    def tail(self, job_id: str, after: int, limit: int) -> tuple[list[Event], bool]:
        """(what came after `after`, whether that is all of a job that has ended), in one look."""
        with self._database.read() as session:
            job = job_row(session, job_id)
            final, last = JobState(job.state).is_final, job.last_seq
            wanted = select(EventRow).where(EventRow.job_id == job_id, EventRow.seq > after)
            rows = list(session.scalars(wanted.order_by(EventRow.seq).limit(limit)))
        end = rows[-1].seq if rows else after
        return [event_view(row) for row in rows], final and end >= last

    def end(self, job_id: str, *, owner: str | None = None) -> tuple[int, bool]:
        """(`seq` of the newest event, whether the job has ended)."""
        with self._database.read() as session:
            job = job_row(session, job_id, owner)
            return job.last_seq, JobState(job.state).is_final

    def stand(self, job_id: str) -> tuple[JobState, int]:
        """(state, number of its newest attempt)."""
        with self._database.read() as session:
            job = job_row(session, job_id)
            return JobState(job.state), job.attempt

    def metrics(self, job_id: str, *, max_points: int, owner: str | None = None) -> MetricsPage:
        """The steps, thinned evenly; the newest is always among them."""
        with self._database.read() as session:
            job_row(session, job_id, owner)
            total = session.scalar(select(func.count()).where(MetricRow.job_id == job_id)) or 0
            stride = max(1, -(-total // max_points))
            ranked = (
                select(MetricRow.values, func.row_number().over(order_by=MetricRow.step.desc()).label("rank"))
                .where(MetricRow.job_id == job_id)
                .subquery()
            )
            kept = select(ranked.c["values"]).where((ranked.c.rank - 1) % stride == 0).order_by(ranked.c.rank.desc())
            return MetricsPage(data=list(session.scalars(kept)), total=total)

    def plan(self, job_id: str, *, owner: str | None = None) -> dict[str, Any]:
        return self._document(job_id, owner, "plan", "It appears once the workers have measured themselves.")

    def timeline(self, job_id: str, *, owner: str | None = None) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """(a step as the newest plan forecasts it, one as it was measured last); each may not be there."""
        plan = self.plan(job_id, owner=owner)
        with self._database.read() as session:
            measured = session.scalar(select(JobRow.timeline).where(JobRow.id == job_id))
        forecast = plan.get("gantt")
        return forecast if isinstance(forecast, dict) else None, measured

    def ledger(self, job_id: str, *, owner: str | None = None) -> dict[str, Any]:
        return self._document(job_id, owner, "ledger", "It appears when the job ends.")

    def artifacts(self, job_id: str, *, owner: str | None = None) -> Sequence[Artifact]:
        with self._database.read() as session:
            job_row(session, job_id, owner)
            wanted = select(ArtifactRow).where(ArtifactRow.job_id == job_id).order_by(ArtifactRow.name)
            return [artifact_view(row) for row in session.scalars(wanted)]

    def artifact(self, job_id: str, name: str, *, owner: str | None = None) -> StoredArtifact:
        with self._database.read() as session:
            job_row(session, job_id, owner)
            row = session.get(ArtifactRow, (job_id, name))
            if row is None:
                message = f"Job {job_id} has no artifact of that name."
                raise NotFoundError(message, code="artifact_not_found", param="name")
            return StoredArtifact(row.name, row.path, row.sha256)

    def checkpoints(self, job_id: str, *, owner: str | None = None) -> Sequence[Checkpoint]:
        """Newest first."""
        with self._database.read() as session:
            job_row(session, job_id, owner)
            wanted = select(CheckpointRow).where(CheckpointRow.job_id == job_id)
            rows = session.scalars(wanted.order_by(CheckpointRow.step.desc(), CheckpointRow.name.desc()))
            return [checkpoint_view(row) for row in rows]

    def submission_id(self, job_id: str, attempt: int | None, *, owner: str | None = None) -> tuple[int, str]:
        """(number, Ray's id) of an attempt, by default the newest. Raises NotFoundError."""
        with self._database.read() as session:
            number = job_row(session, job_id, owner).attempt if attempt is None else attempt
            row = session.get(AttemptRow, (job_id, number))
            if row is None:
                raise NotFoundError(f"Job {job_id} has no attempt {number}.", code="attempt_not_found", param="attempt")
            return number, row.submission_id

    def _document(self, job_id: str, owner: str | None, column: str, when: str) -> dict[str, Any]:
        with self._database.read() as session:
            job_row(session, job_id, owner)
            wanted = select(JobRow).where(JobRow.id == job_id).options(undefer(getattr(JobRow, column)))
            row = session.scalars(wanted.execution_options(populate_existing=True)).one()
            document: dict[str, Any] | None = getattr(row, column)
            if document is None:
                raise NotFoundError(f"Job {job_id} has no {column} yet.", code=f"{column}_not_found", remedy=when)
            return document
