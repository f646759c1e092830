"""The census: how many of everything there are, for whoever watches the service. Counts, of nobody in particular."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.lifecycle import JOB, JobState
from service.store.attempts import SETTLED
from service.store.database import Database
from service.tables import AttemptRow, DeliveryRow, JobRow

FAULTS = ("user", "system", "capacity")
OTHER = "other"
PENDING = "pending"


@dataclass(frozen=True)
class Counts:
    """Jobs by state, the failed ones by whose fault it was, and what waits. `oldest_queued_at` in Unix seconds."""

    jobs: Mapping[JobState, int]
    failed: Mapping[str, int]
    oldest_queued_at: float | None
    attempts_open: int
    deliveries_pending: int


class Census:
    """The census shelf of the store."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def take(self) -> Counts:
        with self._database.read() as session:
            counted = session.execute(
                select(JobRow.state, func.count()).where(JobRow.kind == JOB).group_by(JobRow.state)
            )
            jobs = dict.fromkeys(JobState, 0) | {JobState(state): count for state, count in counted}
            waiting = select(func.min(JobRow.queued_at)).where(JobRow.state == JobState.QUEUED, JobRow.kind == JOB)
            attempts = select(func.count()).select_from(AttemptRow).join(JobRow)
            attempts = attempts.where(AttemptRow.state != SETTLED, JobRow.outside.is_(False))
            deliveries = select(func.count()).where(DeliveryRow.state == PENDING)
            return Counts(
                jobs=jobs,
                failed=_by_fault(session),
                oldest_queued_at=session.scalar(waiting),
                attempts_open=session.scalar(attempts) or 0,
                deliveries_pending=session.scalar(deliveries) or 0,
            )


def _by_fault(session: Session) -> dict[str, int]:
    """A run may name any fault: those that we do not know count as one."""
    fault = JobRow.error["fault"].as_string()
    found = dict.fromkeys((*FAULTS, OTHER), 0)
    for name, count in session.execute(
        select(fault, func.count()).where(JobRow.state == JobState.FAILED, JobRow.kind == JOB).group_by(fault)
    ):
        found[name if name in FAULTS else OTHER] += count
    return found
