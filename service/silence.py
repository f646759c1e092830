"""Runs outside that have fallen silent are given up. While nobody could be heard, nobody was silent.

A run posts every few seconds for as long as it goes on. After a start of this service, and after a time in which its
store was away, all are given the whole time again.
"""

from __future__ import annotations

import logging
import time

from service.store import Store

LAPSE_S = 10.0  # after so long without a look, this process may have been deaf
log = logging.getLogger(__name__)


class Silence:
    """Looks after the runs outside, each of which may be silent for `silence_s`."""

    def __init__(self, store: Store, silence_s: float) -> None:
        self._store = store
        self._silence_s = silence_s
        self._since = self._looked = float("-inf")

    def look(self) -> None:
        """Give up those that have been silent for too long; called often."""
        now = time.monotonic()
        if now - self._looked > LAPSE_S:
            self._since = now
        self._looked = now
        if now - self._since < self._silence_s:
            return
        for job_id in self._store.outside.end_silent(time.time() - self._silence_s):
            log.warning("%s: its run, which is outside, has been silent for %g s", job_id, self._silence_s)
