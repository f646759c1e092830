"""A store, a fake Ray and supervisors over them, for tests that play drivers and users."""

from __future__ import annotations

import asyncio
from typing import Any

from service.ray_jobs import RayJobs
from service.schemas import Event, Job
from service.settings import Settings
from service.store import Store
from service.store.access import FIRST_USER
from service.supervisor import Supervisor
from tests.service.conftest import FakeRay
from workers.contract import JobSpec
from workers.events import EventLog


class Bench:
    """What one look after another makes of jobs; a restart of the API is a new supervisor."""

    def __init__(self, settings: Settings, store: Store, ray: FakeRay) -> None:
        self.settings = settings
        self.store = store
        self.ray = ray

    def looks(self, count: int = 1) -> None:
        """Some looks by a supervisor that remembers nothing of those before."""

        async def look() -> None:
            jobs = RayJobs("http://ray", "token", self.ray.transport())
            supervisor = Supervisor(self.settings, self.store, jobs)
            for _ in range(count):
                await supervisor._guard(supervisor.look(), "look")
            await supervisor._guard(supervisor.reconcile(), "reconcile")
            await jobs.close()

        asyncio.run(look())

    def submit(self, **spec: object) -> str:
        return self.store.jobs.create(JobSpec.model_validate(spec), owner=FIRST_USER)[0].id

    def job(self, job_id: str) -> Job:
        return self.store.jobs.get(job_id)

    def events(self, job_id: str, n: int = 1) -> EventLog:
        return EventLog(self.settings.attempt_dir(job_id, n))

    def history(self, job_id: str, type: str | None = None) -> list[Event]:
        """What the store has of a job's history, all or of one type."""
        return [event for event in self.store.records.events(job_id).data if type in (None, event.type)]

    def lines(self, job_id: str, n: int, *told: tuple[str, dict[str, Any]]) -> None:
        """Have an attempt's driver write these."""
        with self.events(job_id, n) as events:
            for type, data in told:
                events.emit(type, **data)


def sid(job_id: str, n: int = 1) -> str:
    """Ray's id of an attempt."""
    return f"job-{job_id}-a{n}"
