"""The store: the only room that touches tables. Every method is one transaction, without network I/O inside it."""

from __future__ import annotations

from collections.abc import Callable

from service.store.absorb import RunEvent
from service.store.attempts import Attempt, Attempts
from service.store.database import Database
from service.store.jobs import JobQuery, Jobs, StoredArtifact
from service.store.keys import Keys

__all__ = ["Attempt", "JobQuery", "RunEvent", "Store", "StoredArtifact"]


class Store:
    """Three shelves over one database: `jobs` for those who ask, `attempts` for the supervisor, `keys` for the door."""

    def __init__(self, url: str) -> None:
        self._database = Database(url)
        self.jobs = Jobs(self._database)
        self.attempts = Attempts(self._database)
        self.keys = Keys(self._database)

    def on_change(self, ring: Callable[[str], None]) -> None:
        """Have `ring` called with the job's id after every commit that touched it, on the committing thread."""
        self._database.on_change = ring

    def ping(self) -> None:
        """Raise unless the store can be written."""
        with self._database.write():
            pass

    def close(self) -> None:
        self._database.close()
