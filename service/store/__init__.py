"""The store: the only room that touches tables. Every method is one transaction, without network I/O inside it."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import text

from service.meters import Meters
from service.store.absorb import RunEvent
from service.store.access import Access, Caller
from service.store.actions import Actions
from service.store.admission import Place
from service.store.attempts import Attempt, Attempts
from service.store.census import Census
from service.store.database import Database
from service.store.datasets import DatasetQuery, Datasets
from service.store.jobs import JobQuery, Jobs
from service.store.leases import Leases
from service.store.outside import Outside
from service.store.queue import Queue
from service.store.records import Records, StoredArtifact
from service.store.sweeps import Sweeps
from service.store.views import Standing
from service.store.webhooks import Webhooks

__all__ = ["Attempt", "Caller", "DatasetQuery", "JobQuery", "Place", "RunEvent", "Standing", "Store", "StoredArtifact"]


class Store:
    """Shelves over one database.

    For those who ask: `jobs`, `sweeps`, `actions`, `outside`, `records`, `access`, `datasets`, `webhooks`. For the
    supervisor: `queue`, `attempts`, `leases`. For who watches the service: `census`.
    """

    def __init__(
        self,
        url: str,
        *,
        max_queued: int = 10_000,
        max_running_each: int | None = None,
        max_faults: int = 3,
        meters: Meters | None = None,
    ) -> None:
        self._database = Database(url, meters)
        self.jobs = Jobs(self._database, max_queued)
        self.sweeps = Sweeps(self._database, max_queued)
        self.actions = Actions(self._database)
        self.outside = Outside(self._database, max_queued)
        self.records = Records(self._database)
        self.access = Access(self._database)
        self.webhooks = Webhooks(self._database)
        self.datasets = Datasets(self._database)
        self.queue = Queue(self._database, max_running_each)
        self.attempts = Attempts(self._database, max_faults)
        self.leases = Leases(self._database)
        self.census = Census(self._database)

    def on_change(self, ring: Callable[[str], None]) -> None:
        """Have `ring` called with the job's id after every commit that touched it, on the committing thread."""
        self._database.on_change = ring

    def ping(self) -> None:
        """Raise unless the store answers, and a writing transaction gets its turn."""
        with self._database.write() as session:
            session.execute(text("SELECT 1"))

    def close(self) -> None:
        self.jobs.close()
        self._database.close()
