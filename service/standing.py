"""Where queued jobs stand: worked out when somebody asks, at most once in a while, however many ask."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

from service.store import Standing, Store

FRESH_S = 2.0  # 10,000 queued jobs take some 0.1 s to order


class Standings:
    """The queue's order, as of a moment ago."""

    def __init__(self, store: Store, max_running: int) -> None:
        self._store = store
        self._max_running = max_running
        self._lock = threading.Lock()
        self._known: Mapping[str, Standing] = {}
        self._looked_at = -FRESH_S

    def now(self) -> Mapping[str, Standing]:
        """Every queued job's place and expected start. While one caller works it out, others get the last answer."""
        if time.monotonic() - self._looked_at >= FRESH_S and self._lock.acquire(blocking=False):
            try:
                self._known = self._store.queue.standing(self._max_running)
                self._looked_at = time.monotonic()
            finally:
                self._lock.release()
        return self._known
